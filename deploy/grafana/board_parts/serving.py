"""Board "Serving": how fast engines answer, where the time goes, what they take from the cache."""

from __future__ import annotations

from board_parts.board import BAD_OVER_0, ENGINE, ENGINE_JOB, GOOD_OVER_0, MODEL, Board, Panel
from board_parts.metrics import heat, mean, quantile, quantiles

NOTE = """\
Most panels use vLLM's own names, so this board also shows engines that are vLLM: choose their job
above. Those by priority, and most of *The cache, as engines see it*, are of `kvist serve` only;
vLLM with the plugin has `vllm:kvist_` metrics, see docs/vllm.md."""

HEALTHY = (
    Panel("stat", "Engines", {"": "count(count by (job, instance) (vllm:num_requests_running))"},
          "Engines that answered the last scrape.", steps=GOOD_OVER_0, width=3, height=4),
    Panel("stat", "Reach the cache", {"": "sum(kvist_engine_cache_attached)"},
          "Engines for which DRAM and flash are reachable; the others compute what their own pool "
          "does not have.", width=3, height=4),
    Panel("stat", "Running", {"": "sum(vllm:num_requests_running)"}, "In the batch now.",
          width=3, height=4),
    Panel("stat", "Waiting", {"": "sum(vllm:num_requests_waiting)"},
          "Not zero for long: more comes than can be served.",
          steps=((None, "green"), (1, "yellow"), (50, "red")), width=3, height=4),
    Panel("stat", "KV pages in use", {"": "max(vllm:kv_cache_usage_perc)"},
          "Of the fullest engine. At 1 requests wait or lose their pages.", "percentunit",
          steps=((None, "green"), (0.9, "yellow"), (0.98, "red")), width=3, height=4),
    Panel("stat", "Ended with an error",
          {"": 'sum(increase(vllm:request_success_total{finished_reason="error"}[RANGE]))'},
          "In the board's range.", steps=BAD_OVER_0, width=3, height=4),
    Panel("text", "", text=NOTE, width=6, height=4),
)  # fmt: skip

FAST = (
    Panel("lines", "Time to first token",
          {**quantiles("vllm:time_to_first_token_seconds"),
           "mean": mean("vllm:time_to_first_token_seconds")},
          "What a user waits; queue and prefill, less what the cache had.", "s"),
    Panel("lines", "Between two tokens", quantiles("vllm:inter_token_latency_seconds"),
          "How smoothly text runs. It rises with the batch and with long prefills beside it.", "s"),
    Panel("lines", "A whole request", quantiles("vllm:e2e_request_latency_seconds"),
          "From its arrival to its last token; long answers take long.", "s"),
    Panel("heat", "Time to first token, all requests", heat("vllm:time_to_first_token_seconds"),
          "Two bands are usual: requests that hit and requests that do not.", "s", width=12),
    Panel("heat", "Between two tokens, all", heat("vllm:inter_token_latency_seconds"),
          "The median is a step of decoding, the tail is steps with prefills in them.", "s",
          width=12),
)  # fmt: skip

TIME = (
    Panel("stack", "Where a request's time goes",
          {"queue": mean("vllm:request_queue_time_seconds"),
           "prefill": mean("vllm:request_prefill_time_seconds"),
           "decode": mean("vllm:request_decode_time_seconds")},
          "Means. A long queue wants more engines, a long prefill more hits, a long decode smaller "
          "batches or a faster device.", "s"),
    Panel("lines", "Queue",
          {"p50": quantile(0.5, "vllm:request_queue_time_seconds"),
           "p99": quantile(0.99, "vllm:request_queue_time_seconds")},
          "From a request's arrival in the engine to its first step.", "s"),
    Panel("lines", "Prefill",
          {"p50": quantile(0.5, "vllm:request_prefill_time_seconds"),
           "p99": quantile(0.99, "vllm:request_prefill_time_seconds")},
          "Hits shorten it; other requests' prefills beside it lengthen it.", "s"),
    Panel("lines", "Waiting, by reason",
          {"{{reason}}": "sum by (reason) (vllm:num_requests_waiting_by_reason)"},
          "capacity: for a place in the batch or pages. deferred: for blocks that are loaded or "
          "computed elsewhere."),
    Panel("stack", "Waiting, by priority",
          {"{{priority}}": "sum by (priority) (kvist_engine_requests_waiting)"},
          "A class that waits long is raised (--priority-aging-seconds)."),
    Panel("lines", "Preemptions a second",
          {"for {{for}}": "sum by (for) (rate(kvist_engine_preemptions_total[W]))",
           "all": "sum(rate(vllm:num_preemptions_total[W]))"},
          "Requests that lost their pages to others. Their blocks go to the cache and come back."),
)  # fmt: skip

AMOUNT = (
    Panel("lines", "Tokens a second",
          {"prompt": "sum(rate(vllm:prompt_tokens_total[W]))",
           "of these cached": "sum(rate(vllm:prompt_tokens_cached_total[W]))",
           "output": "sum(rate(vllm:generation_tokens_total[W]))",
           "computed for nothing": "sum(rate(kvist_engine_wasted_tokens_total[W]))"},
          "The difference of the first two is what went through the model as prompts."),
    Panel("stack", "Requests that ended, by reason",
          {"{{finished_reason}}":
           "sum by (finished_reason) (rate(vllm:request_success_total[W]))"},
          "abort: the client went away.", "reqps"),
    Panel("stack", "Running, by engine",
          {"{{instance}}": "sum by (instance) (vllm:num_requests_running)"},
          "How the router spreads them."),
    Panel("heat", "Tokens of a prompt", heat("vllm:request_prompt_tokens"),
          "A change here explains most changes of the other figures.", width=6),
    Panel("heat", "Tokens of a prompt that were computed",
          heat("vllm:request_prefill_kv_computed_tokens"),
          "The same prompts, without what was found.", width=6),
    Panel("heat", "Tokens of an answer", heat("vllm:request_generation_tokens"),
          "At max_tokens answers are cut.", width=6),
    Panel("lines", "Tokens of a step", {"{{instance}}":
          mean("vllm:iteration_tokens_total", "instance")},
          "Mean. The batch that the device sees; near --max-num-batched-tokens prefills queue.",
          width=6),
)  # fmt: skip

CACHE = (
    Panel("share", "Where prompt tokens came from",
          {"{{source}}": "sum by (source) (rate(vllm:prompt_tokens_by_source_total[W]))"
                         " / on () group_left () sum(rate(vllm:prompt_tokens_total[W]))"},
          "local_cache_hit is HBM, external_kv_transfer is DRAM and flash.", "percentunit",
          high=1),
    Panel("lines", "Hit rate, HBM and below",
          {"hbm": "sum(rate(vllm:prefix_cache_hits_total[W]))"
                  " / sum(rate(vllm:prefix_cache_queries_total[W]))",
           "DRAM and flash, of what HBM missed":
               "sum(rate(vllm:external_prefix_cache_hits_total[W]))"
               " / sum(rate(vllm:external_prefix_cache_queries_total[W]))"},
          "A small pool hits little, and leaves more for the tiers below.", "percentunit",
          high=1),
    Panel("stack", "Tokens computed, by reason",
          {"{{reason}}": "sum by (reason) (rate(kvist_engine_missed_tokens_total[W]))"},
          "docs/architecture.md, Miss reasons."),
    Panel("stack", "What was done with what was found",
          {"{{decision}}": "sum by (decision) (rate(kvist_engine_load_decisions_total[W]))"},
          "compute: loading would have taken longer.", "reqps"),
    Panel("lines", "Time that steps waited for layers",
          {"{{instance}}":
           "sum by (instance) (rate(kvist_engine_load_wait_seconds_total[W]))"},
          "Seconds a second. Loads run beside the computation; what they cannot hide is here.",
          "percentunit"),
    Panel("stack", "Blocks not stored, by reason",
          {"{{reason}}": "sum by (reason) (rate(kvist_engine_store_drops_total[W]))"},
          "queue_full: storing cannot keep up with computing."),
    Panel("lines", "Measured rates of copies",
          {"load {{instance}} {{tier}}": "kvist_engine_load_bytes_per_second",
           "store {{instance}} {{tier}}": "kvist_engine_store_bytes_per_second"},
          "By which load or compute is decided.", "Bps"),
    Panel("lines", "Measured rate of prefill",
          {"{{instance}} {{tokens}} tokens": "kvist_engine_prefill_tokens_per_second"},
          "Tokens a second of a prompt of so many."),
    Panel("lines", "Tokens from which loading pays",
          {"{{instance}} {{tier}}": "kvist_engine_break_even_tokens"},
          "A prefix that is shorter is computed. Infinite: loading never pays, look at the disk."),
)  # fmt: skip

BOARD = Board(
    "kvist-serving",
    "Serving",
    "How fast engines answer, where the time goes, and what they take from the cache.",
    (ENGINE_JOB, MODEL, ENGINE),
    {
        "Is it healthy?": HEALTHY,
        "How fast is it?": FAST,
        "Where does the time go?": TIME,
        "How much is asked?": AMOUNT,
        "The cache, as engines see it": CACHE,
    },
)
