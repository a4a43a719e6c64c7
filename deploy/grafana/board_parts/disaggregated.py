"""Board "Disaggregated serving": engines beside each other, and the cache between them."""

from __future__ import annotations

from board_parts.board import ENGINE, ENGINE_JOB, SIDECAR, SIDECAR_JOB, Board, Panel
from board_parts.metrics import quantile, quantiles

NOTE = """\
Several engines on one node share one sidecar: what one computes, the others load. That is what
Kvist has of disaggregated serving today, and what is shown here, engine by engine. Engines have no
roles: *Prefill's share of the tokens* says of each what its traffic makes of it. Which engine
stored a block that another loads is not recorded; *Waits for another engine* is the one figure of
work that was handed over while it was done. Remote tiers and transfers between nodes are not built
yet; their panels come with them."""
_COMPUTED = (
    'sum by (instance) (rate(vllm:prompt_tokens_by_source_total{source="local_compute"}[W]))'
)
_OUTPUT = "sum by (instance) (rate(vllm:generation_tokens_total[W]))"
_EACH = "{{instance}}"

WHO = (
    Panel("text", "", text=NOTE, width=24, height=4),
    Panel("lines", "Prompt tokens computed", {_EACH: _COMPUTED},
          "Prefill's work, without what was found."),
    Panel("lines", "Output tokens", {_EACH: _OUTPUT}, "Decode's work."),
    Panel("lines", "Prefill's share of the tokens",
          {_EACH: f"{_COMPUTED} / ({_COMPUTED} + {_OUTPUT})"},
          "Near 1 an engine prefills, near 0 it decodes; in between it does both, and each "
          "disturbs the other.", "percentunit", high=1),
    Panel("lines", "Requests running", {_EACH: "sum by (instance) (vllm:num_requests_running)"},
          "Uneven: the router does not balance, or prefers engines that hit."),
    Panel("lines", "Requests waiting", {_EACH: "sum by (instance) (vllm:num_requests_waiting)"},
          "One engine's queue while others have none is the router's doing."),
    Panel("lines", "KV pages in use", {_EACH: "max by (instance) (vllm:kv_cache_usage_perc)"},
          "Full pools preempt, and refuse what a prefilling engine would hand over.",
          "percentunit", high=1),
)  # fmt: skip

FAST = (
    Panel("lines", "Time to first token, p99",
          {_EACH: quantile(0.99, "vllm:time_to_first_token_seconds", "instance")},
          "Prefill's figure.", "s"),
    Panel("lines", "Between two tokens, p99",
          {_EACH: quantile(0.99, "vllm:inter_token_latency_seconds", "instance")},
          "Decode's figure. An engine on which it rises with the prompt tokens computed is one "
          "that should not prefill long prompts.", "s"),
    Panel("lines", "Queue, p99",
          {_EACH: quantile(0.99, "vllm:request_queue_time_seconds", "instance")},
          "An engine's own backlog.", "s"),
)  # fmt: skip

BETWEEN = (
    Panel("lines", "Share of prompt tokens from DRAM and flash",
          {_EACH: "sum by (instance) "
                  '(rate(kvist_engine_cached_tokens_total{tier=~"dram|flash"}[W]))'
                  " / sum by (instance) (rate(kvist_engine_queries_tokens_total[W]))"},
          "What an engine takes from the node: its own blocks that left its pool, and others'.",
          "percentunit", high=1),
    Panel("lines", "Bytes loaded",
          {"{{instance}} {{tier}}":
           "sum by (instance, tier) (rate(kvist_engine_loaded_bytes_total[W]))"},
          "By the tier they were in when the request came.", "Bps"),
    Panel("lines", "Blocks stored",
          {_EACH: "sum by (instance) (rate(kvist_engine_stored_blocks_total[W]))"},
          "An engine that prefills stores, one that decodes loads."),
    Panel("lines", "Waits for another engine",
          {"{{outcome}}": "sum by (outcome) (rate(kvist_flight_waits_total[W]))"},
          "Two engines were asked for the same text at once, and one of them waited instead of "
          "computing it too. lost: it did not come in time.", "reqps"),
    Panel("lines", "Tokens that came by waiting",
          {"tokens": "sum(rate(kvist_flight_tokens_total[W]))"},
          "Work that was done once instead of twice."),
    Panel("lines", "Won a second, by engine",
          {_EACH: "sum by (instance) (rate(kvist_engine_saved_seconds_total[W]))"
                  " - sum by (instance) (rate(kvist_engine_moved_seconds_total[W]))"
                  " - sum by (instance) (rate(kvist_engine_store_seconds_total[W]))"},
          "Seconds of prefill saved, less loads and stores. Below 0: it stores for others.",
          "none", low=None),
)  # fmt: skip

TRANSFERS = (
    Panel("lines", "A load takes", quantiles("kvist_load_seconds", "tier"),
          "All engines of the sidecar, a request's blocks.", "s"),
    Panel("lines", "Loads a second, by way",
          {"{{instance}} {{way}}": "sum by (instance, way) (rate(kvist_engine_loads_total[W]))"},
          "layers: beside the computation. blocks: before it.", "reqps"),
    Panel("lines", "Time that steps waited for layers",
          {_EACH: "sum by (instance) (rate(kvist_engine_load_wait_seconds_total[W]))"},
          "Seconds a second: the part of transfers that computation does not hide.",
          "percentunit"),
    Panel("lines", "Loads undone",
          {_EACH: "sum by (instance) (rate(kvist_engine_loads_undone_total[W]))"},
          "A block proved wrong or late while its layers were used; the request was computed."),
    Panel("lines", "Time waited for a bandwidth cap",
          {"{{instance}} {{direction}}":
           "sum by (instance, direction) (rate(kvist_engine_throttled_seconds_total[W]))"},
          "--cache-load-bandwidth and --cache-store-bandwidth.", "percentunit"),
    Panel("lines", "Preempted tokens, by what gave them back",
          {"{{instance}} {{source}}":
           "sum by (instance, source) (rate(kvist_engine_resumed_tokens_total[W]))"},
          "computed is what a preemption costs; the rest came from the tiers."),
)  # fmt: skip

BOARD = Board(
    "kvist-disaggregated-serving",
    "Disaggregated serving",
    "Engines beside each other: who prefills, who decodes, and what goes between them.",
    (SIDECAR_JOB, SIDECAR, ENGINE_JOB, ENGINE),
    {
        "Who does what?": WHO,
        "How fast is each?": FAST,
        "What goes between them?": BETWEEN,
        "What do transfers cost?": TRANSFERS,
    },
)
