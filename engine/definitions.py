"""Every metric of an engine: vLLM's names where it has one, `kvist_engine_` for the rest.

The one list that /metrics, its documentation and boards are made from; see proto/metrics. Figures
are paths into CoreStats and into what figures_of adds to it. vLLM's have the labels engine and
model_name as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvist.engine.priority import PRIORITIES
from kvist.engine.request import CoreStats
from kvist.proto.metrics import Definition as D
from kvist.proto.shm import MISS_REASONS, NEVER, TIERS

FINISH_REASONS = ("stop", "length", "abort", "error")
STORE_DROPS = ("queue_full", "no_parent", "full", "share", "index_full", "torn", "detached")
"""Why a block is not stored: the queue's reasons, and those of StoreResult."""

# vLLM's own bounds, so that its dashboards draw the same heat maps.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_REQUEST_TOKENS = (
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0,
    50000.0, 100000.0,
)  # fmt: skip
_STEP_TOKENS = (
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
)  # fmt: skip
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)

BOUNDS: Mapping[str, tuple[float, ...]] = {
    "first_token": _FIRST_TOKEN_S,
    "between_tokens": _BETWEEN_TOKENS_S,
    "per_token": _BETWEEN_TOKENS_S,
    "whole": _REQUEST_S,
    "queue": _REQUEST_S,
    "prefill": _REQUEST_S,
    "decode": _REQUEST_S,
    "inference": _REQUEST_S,
    "prompt_tokens": _REQUEST_TOKENS,
    "computed_prompt_tokens": _REQUEST_TOKENS,
    "output_tokens": _REQUEST_TOKENS,
    "max_tokens": _REQUEST_TOKENS,
    "choices": _CHOICES,
    "step_tokens": _STEP_TOKENS,
}
"""Histograms that the API process keeps, by name of the figure."""

VLLM = (
    D("vllm:num_requests_running", "gauge", "requests", "Requests in the batch.", "running"),
    D("vllm:num_requests_waiting", "gauge", "requests", "Requests that wait for a place.",
      "waiting"),
    D("vllm:num_requests_waiting_by_reason", "gauge", "requests",
      "Requests that wait: for a place (capacity) or for blocks (deferred).",
      "waiting_by_reason[reason]", ("reason",)),
    D("vllm:kv_cache_usage_perc", "gauge", "ratio", "Share of KV pages in use, 1 is all.",
      "pages_share"),
    D("vllm:prefix_cache_queries_total", "counter", "tokens", "Tokens looked up in HBM.",
      "queries_tokens"),
    D("vllm:prefix_cache_hits_total", "counter", "tokens", "Tokens found in HBM.", "hits.hbm"),
    D("vllm:external_prefix_cache_queries_total", "counter", "tokens",
      "Tokens looked up below HBM.", "external_queries"),
    D("vllm:external_prefix_cache_hits_total", "counter", "tokens",
      "Tokens found in DRAM or flash.", "external_hits"),
    D("vllm:prompt_tokens_total", "counter", "tokens", "Prompt tokens, computed or found.",
      "prompt_tokens"),
    D("vllm:prompt_tokens_cached_total", "counter", "tokens", "Prompt tokens not computed.",
      "cached_tokens"),
    D("vllm:prompt_tokens_by_source_total", "counter", "tokens",
      "Prompt tokens by where their KV came from.", "by_source[source]", ("source",)),
    D("vllm:generation_tokens_total", "counter", "tokens", "Output tokens.", "generated_tokens"),
    D("vllm:num_preemptions_total", "counter", "requests", "Requests that lost their pages.",
      "all_preemptions"),
    D("vllm:request_success_total", "counter", "requests", "Requests that ended, by reason.",
      "finished[finished_reason]", ("finished_reason",)),
    D("vllm:time_to_first_token_seconds", "histogram", "seconds",
      "From a request's arrival to its first token.", "first_token"),
    D("vllm:inter_token_latency_seconds", "histogram", "seconds", "Between two tokens.",
      "between_tokens"),
    D("vllm:request_time_per_output_token_seconds", "histogram", "seconds",
      "Mean of a request's times between tokens.", "per_token"),
    D("vllm:e2e_request_latency_seconds", "histogram", "seconds",
      "From a request's arrival to its end.", "whole"),
    D("vllm:request_queue_time_seconds", "histogram", "seconds",
      "From a request's arrival in the core to its first step.", "queue"),
    D("vllm:request_prefill_time_seconds", "histogram", "seconds",
      "From its first step to its first token.", "prefill"),
    D("vllm:request_decode_time_seconds", "histogram", "seconds",
      "From its first token to its last.", "decode"),
    D("vllm:request_inference_time_seconds", "histogram", "seconds",
      "From its first step to its last token.", "inference"),
    D("vllm:request_prompt_tokens", "histogram", "tokens", "Tokens of a prompt.",
      "prompt_tokens"),
    D("vllm:request_prefill_kv_computed_tokens", "histogram", "tokens",
      "Those of them that were computed.", "computed_prompt_tokens"),
    D("vllm:request_generation_tokens", "histogram", "tokens", "Tokens of an answer.",
      "output_tokens"),
    D("vllm:request_max_num_generation_tokens", "histogram", "tokens",
      "The same: each choice is a request of its own.", "output_tokens"),
    D("vllm:request_params_max_tokens", "histogram", "tokens", "max_tokens of a request.",
      "max_tokens"),
    D("vllm:request_params_n", "histogram", "", "n of a request, once for each choice.",
      "choices"),
    D("vllm:iteration_tokens_total", "histogram", "tokens", "Tokens of a step.", "step_tokens"),
)  # fmt: skip

LOOKUPS = (
    D("kvist_engine_queries_tokens_total", "counter", "tokens",
      "Prompt tokens looked up: cached and missed.", "queries_tokens"),
    D("kvist_engine_cached_tokens_total", "counter", "tokens", "Those found, by tier.",
      "hits[tier]", ("tier",)),
    D("kvist_engine_missed_tokens_total", "counter", "tokens", "Those computed, by reason.",
      "misses_tokens[reason]", ("reason",)),
    D("kvist_engine_cache_attached", "gauge", "", "1 while DRAM and flash are reachable.",
      "attached"),
    D("kvist_engine_reattaches_total", "counter", "", "Times the cache was found again.",
      "reattaches"),
)  # fmt: skip

LOADS = (
    D("kvist_engine_load_decisions_total", "counter", "requests",
      "Found prefixes, by what was done: all loaded, a part, or computed.",
      "loads.decisions[decision]", ("decision",)),
    D("kvist_engine_loads_total", "counter", "requests",
      "Loads, beside the computation layer by layer (rising: from flash) or before it.",
      "loads.ways[way]", ("way",)),
    D("kvist_engine_loads_undone_total", "counter", "requests",
      "Loads that failed beside the computation.", "loads.undone"),
    D("kvist_engine_loaded_bytes_total", "counter", "bytes",
      "Bytes that were brought in, by the tier they were in.", "loads.loaded_bytes[tier]",
      ("tier",)),
    D("kvist_engine_load_seconds_total", "counter", "seconds",
      "From when loads were asked for to their end, summed over requests.", "load_seconds"),
    D("kvist_engine_load_busy_seconds_total", "counter", "seconds",
      "Time that loads took which came whole.", "loads.load_s"),
    D("kvist_engine_load_estimated_seconds_total", "counter", "seconds",
      "Time that loads were estimated to take.", "loads.estimated_load_s"),
    D("kvist_engine_load_compute_estimated_seconds_total", "counter", "seconds",
      "Estimated time to compute what was not loaded of the same prompts.",
      "loads.estimated_compute_s"),
    D("kvist_engine_load_wait_seconds_total", "counter", "seconds",
      "Time that steps waited for layers.", "loads.gate_wait_s"),
    D("kvist_engine_load_waits_total", "counter", "", "Times that a step waited for a layer.",
      "loads.gate_waits"),
    D("kvist_engine_saved_seconds_total", "counter", "seconds",
      "Prefill that hits did not take, by tier.", "loads.saved_s[tier]", ("tier",)),
    D("kvist_engine_moved_seconds_total", "counter", "seconds",
      "Time that it took to bring them in, the wait for flash included.", "loads.moved_s[tier]",
      ("tier",)),
    D("kvist_engine_store_seconds_total", "counter", "seconds", "Time that stores took.",
      "loads.store_s"),
    D("kvist_engine_stored_blocks_total", "counter", "blocks", "Blocks committed to the cache.",
      "stored_blocks"),
    D("kvist_engine_store_drops_total", "counter", "blocks", "Blocks not stored, by reason.",
      "store_drops[reason]", ("reason",)),
    D("kvist_engine_store_yields_total", "counter", "",
      "Store copies that let loads go first.", "loads.store_yields"),
    D("kvist_engine_throttled_seconds_total", "counter", "seconds", "Time waited for a cap.",
      "loads.throttled_s[direction]", ("direction",)),
    D("kvist_engine_load_bytes_per_second", "gauge", "bytes", "Measured rate of loads.",
      "rates.load_bytes_per_s[tier]", ("tier",)),
    D("kvist_engine_store_bytes_per_second", "gauge", "bytes", "Measured rate of stores.",
      "rates.store_bytes_per_s[tier]", ("tier",)),
    D("kvist_engine_prefill_tokens_per_second", "gauge", "tokens",
      "Measured rate of a prompt of so many tokens.", "rates.prefill_tokens_per_s[tokens]",
      ("tokens",)),
    D("kvist_engine_break_even_tokens", "gauge", "tokens",
      "Tokens from which loading beats computing; +Inf when never.",
      "rates.break_even_tokens[tier]", ("tier",)),
)  # fmt: skip

STEPS = (
    D("kvist_engine_steps_total", "counter", "", "Forward passes.", "steps"),
    D("kvist_engine_wasted_tokens_total", "counter", "tokens", "Computed and thrown away.",
      "wasted_tokens"),
    D("kvist_engine_preemptions_total", "counter", "requests", "Lost pages, for whom.",
      "preemptions[for]", ("for",)),
    D("kvist_engine_resumed_tokens_total", "counter", "tokens",
      "Tokens of preempted requests, by what gave them back.", "resumed_tokens[source]",
      ("source",)),
    D("kvist_engine_requests_waiting", "gauge", "requests",
      "Requests in the queue, by priority class.", "waiting_of[priority]", ("priority",)),
    D("kvist_engine_requests_loading", "gauge", "requests",
      "Requests whose blocks are being loaded.", "loading_of[priority]", ("priority",)),
    D("kvist_engine_requests_running", "gauge", "requests", "Requests in the batch.",
      "running_of[priority]", ("priority",)),
)  # fmt: skip

GROUPS = {
    "Serving, in vLLM's names": VLLM,
    "Look-ups": LOOKUPS,
    "Loads and stores": LOADS,
    "Steps and classes": STEPS,
}
"""Title -> metrics, in the order in which they are documented."""

DEFINITIONS = tuple(one for group in GROUPS.values() for one in group)
KVIST = DEFINITIONS[len(VLLM) :]
_RATES = ("load_bytes_per_s", "store_bytes_per_s", "prefill_tokens_per_s", "break_even_tokens")


def figures_of(stats: CoreStats) -> dict[str, Any]:
    """The fields of CoreStats by name, and what follows from them."""
    hits = {tier: stats.hits_tokens.get(tier, 0) for tier in TIERS}
    external, cached = hits["dram"] + hits["flash"], sum(hits.values())
    is_off = stats.cache_state == "off"
    return {
        **{name: getattr(stats, name) for name in stats.__struct_fields__},
        # From 0 on: Prometheus sees no rise in a counter that begins at its first event.
        "misses_tokens": dict.fromkeys(MISS_REASONS, 0) | stats.misses_tokens,
        "store_drops": dict.fromkeys(STORE_DROPS, 0) | stats.store_drops,
        "resumed_tokens": dict.fromkeys((*TIERS, "computed"), 0) | stats.resumed_tokens,
        "hits": hits,
        "cached_tokens": cached,
        "external_hits": external,
        "external_queries": 0 if is_off else stats.queries_tokens - hits["hbm"],
        "prompt_tokens": stats.computed_tokens + cached,
        "by_source": {
            "local_compute": stats.computed_tokens,
            "local_cache_hit": hits["hbm"],
            "external_kv_transfer": external,
        },
        "pages_share": stats.pages_used / stats.pages_total if stats.pages_total else 0.0,
        "waiting_by_reason": {
            "capacity": stats.waiting - stats.waiting_deferred,
            "deferred": stats.waiting_deferred,
        },
        "all_preemptions": sum(stats.preemptions.values()),
        "attached": float(stats.cache_state == "attached"),
        "waiting_of": dict(zip(PRIORITIES, stats.waiting_by_class, strict=False)),
        "loading_of": dict(zip(PRIORITIES, stats.loading_by_class, strict=False)),
        "running_of": dict(zip(PRIORITIES, stats.running_by_class, strict=False)),
        "rates": _rates(stats.loads.rates),
    }


def _rates(rates: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Kind -> label -> what was measured; nothing of what was not."""
    shown: dict[str, dict[str, float]] = {kind: {} for kind in _RATES}
    for name, value in rates.items():
        kind, _, which = name.partition(".")
        shown[kind][which] = float("inf") if value == NEVER else float(value)
    return shown
