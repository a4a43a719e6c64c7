"""Prometheus metrics of an engine: vLLM's names where it has one, `kvist_engine_` for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvist.engine.load_stats import load_metrics
from kvist.engine.request import CachedTokens, CoreStats, Delta, Outputs, Ready

# vLLM's own bounds, so that its dashboards draw the same heat maps.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
BETWEEN_TOKENS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
REQUEST_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FINISH_REASONS = ("stop", "length", "abort", "error")
TIERS = ("hbm", "dram", "flash")


class _CoreCollector(Collector):
    """Shows the core's latest figures as they are: its totals only grow, so they are counters."""

    def __init__(self, latest: Callable[[], CoreStats], labels: Mapping[str, str]) -> None:
        self._latest = latest
        self._names = tuple(labels)
        self._values = tuple(labels.values())

    def collect(self) -> Iterator[Metric]:
        stats = self._latest()
        yield from self._gauges(stats)
        yield from self._vllm_totals(stats)
        yield from self._kvist_totals(stats)
        yield from load_metrics(stats.loads)

    def _gauges(self, stats: CoreStats) -> Iterator[Metric]:
        used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in the batch.", stats.running),
            ("vllm:num_requests_waiting", "Requests that wait for a place.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV pages in use, 1 is all.", used),
        ):
            family = GaugeMetricFamily(name, text, labels=self._names)
            family.add_metric(self._values, float(value))
            yield family
        yield GaugeMetricFamily(
            "kvist_engine_cache_attached",
            "1 while the DRAM and flash tiers are reachable.",
            value=float(stats.cache_state == "attached"),
        )

    def _vllm_totals(self, stats: CoreStats) -> Iterator[Metric]:
        hits = CachedTokens(**{tier: stats.hits_tokens.get(tier, 0) for tier in TIERS})
        external = 0 if stats.cache_state == "off" else stats.queries_tokens - hits.hbm
        for name, text, value in (
            ("vllm:prefix_cache_queries", "Tokens looked up in HBM.", stats.queries_tokens),
            ("vllm:prefix_cache_hits", "Tokens found in HBM.", hits.hbm),
            ("vllm:external_prefix_cache_queries", "Tokens looked up below HBM.", external),
            (
                "vllm:external_prefix_cache_hits",
                "Tokens found in DRAM or flash.",
                hits.dram + hits.flash,
            ),
            ("vllm:prompt_tokens", "Prompt tokens.", stats.computed_tokens + hits.total),
            ("vllm:prompt_tokens_cached", "Prompt tokens not computed.", hits.total),
            ("vllm:generation_tokens", "Output tokens.", stats.generated_tokens),
            ("vllm:num_preemptions", "Requests that lost their pages.", stats.preemptions),
        ):
            yield self._total(name, text, value)
        sources = CounterMetricFamily(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by where their KV came from.",
            labels=(*self._names, "source"),
        )
        for source, tokens in (
            ("local_compute", stats.computed_tokens),
            ("local_cache_hit", hits.hbm),
            ("external_kv_transfer", hits.dram + hits.flash),
        ):
            sources.add_metric((*self._values, source), tokens)
        yield sources

    def _kvist_totals(self, stats: CoreStats) -> Iterator[Metric]:
        for name, text, value in (
            ("kvist_engine_queries_tokens", "Prompt tokens looked up.", stats.queries_tokens),
            ("kvist_engine_reattaches", "Times the cache was found again.", stats.reattaches),
            ("kvist_engine_stored_blocks", "Blocks committed to it.", stats.stored_blocks),
            ("kvist_engine_load_seconds", "Time spent loading blocks.", stats.load_seconds),
            ("kvist_engine_steps", "Forward passes.", stats.steps),
        ):
            yield CounterMetricFamily(name, text, value=value)
        tiers = dict.fromkeys(TIERS, 0) | stats.hits_tokens
        for name, text, label, values in (
            ("kvist_engine_cached_tokens", "Prompt tokens served by a tier.", "tier", tiers),
            ("kvist_engine_missed_tokens", "Tokens not served.", "reason", stats.misses_tokens),
            ("kvist_engine_store_drops", "Blocks not stored.", "reason", stats.store_drops),
        ):
            split = CounterMetricFamily(name, text, labels=(label,))
            for key, value in values.items():
                split.add_metric((key,), value)
            yield split

    def _total(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=self._names)
        family.add_metric(self._values, value)
        return family


class EngineMetrics:
    """All metrics of one engine, built once and passed down.

    Args:
        registry: where they are shown; two engines in one process take two.
        model: label `model_name`.
        now: seconds, monotonic.
    """

    def __init__(self, registry: CollectorRegistry, model: str, now: Callable[[], float]) -> None:
        self.now = now
        self.registry = registry
        self._labels = {"engine": "0", "model_name": model}
        self._stats = CoreStats()
        registry.register(_CoreCollector(lambda: self._stats, self._labels))
        self._finished = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            [*self._labels, "finished_reason"],
            registry=registry,
        )
        for reason in FINISH_REASONS:
            self._finished.labels(*self._labels.values(), reason)
        seconds = self._histogram
        self.first_token = seconds("vllm:time_to_first_token_seconds", FIRST_TOKEN_S)
        self.between_tokens = seconds("vllm:inter_token_latency_seconds", BETWEEN_TOKENS_S)
        self.per_token = seconds("vllm:request_time_per_output_token_seconds", BETWEEN_TOKENS_S)
        self.whole = seconds("vllm:e2e_request_latency_seconds", REQUEST_S)
        self.queue = seconds("vllm:request_queue_time_seconds", REQUEST_S)
        self.prefill = seconds("vllm:request_prefill_time_seconds", REQUEST_S)
        self.decode = seconds("vllm:request_decode_time_seconds", REQUEST_S)
        self.inference = seconds("vllm:request_inference_time_seconds", REQUEST_S)
        self.prompt_tokens = seconds("vllm:request_prompt_tokens", REQUEST_TOKENS)
        self.output_tokens = seconds("vllm:request_generation_tokens", REQUEST_TOKENS)
        self._step_tokens = seconds("vllm:iteration_tokens_total", STEP_TOKENS)

    def _histogram(self, name: str, bounds: tuple[float, ...]) -> Histogram:
        text = name.removeprefix("vllm:").replace("_", " ").capitalize() + "."
        family = Histogram(name, text, list(self._labels), registry=self.registry, buckets=bounds)
        return family.labels(*self._labels.values())

    def observe_ready(self, ready: Ready, prefix_caching: bool) -> None:
        """Show what the pool looks like; once."""
        values = {
            **self._labels,
            "block_size": str(ready.block_tokens),
            "num_gpu_blocks": str(ready.pages),
            "enable_prefix_caching": str(prefix_caching),
            "namespace": ready.namespace,
        }
        self.registry.register(_Info("vllm:cache_config_info", "The paged KV pool.", values))

    def observe_outputs(self, outputs: Outputs) -> None:
        """Take one step's figures."""
        if outputs.stats.steps > self._stats.steps:
            self._step_tokens.observe(outputs.stats.step_tokens)
        self._stats = outputs.stats

    def finish(self, reason: str) -> None:
        """Count a request that ended."""
        known = reason if reason in FINISH_REASONS else "error"
        self._finished.labels(*self._labels.values(), known).inc()

    def start_timer(self, prompt_tokens: int) -> RequestTimer:
        """Start the clock of a request that is about to be submitted."""
        return RequestTimer(self, prompt_tokens)


class _Info(Collector):
    """A constant gauge of 1 whose labels are the information."""

    def __init__(self, name: str, text: str, labels: Mapping[str, str]) -> None:
        self._name, self._text, self._labels = name, text, labels

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), 1.0)
        yield family


class RequestTimer:
    """One request's times, observed as its deltas arrive at the API process."""

    def __init__(self, metrics: EngineMetrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._arrived = metrics.now()
        self._first: float | None = None
        self._last = self._arrived
        self._prefill_s = 0.0
        self._tokens = 0
        self._done = False

    def observe(self, delta: Delta) -> None:
        """Take a delta; the clock is read once per delta, however many tokens it holds."""
        if not delta.tokens:
            return
        now = self._metrics.now()
        if self._first is None:
            self._first = now
            self._prefill_s = delta.prefill_s
            self._metrics.first_token.observe(now - self._arrived)
            self._metrics.queue.observe(delta.queue_s)
            self._metrics.prefill.observe(delta.prefill_s)
        else:
            self._metrics.between_tokens.observe((now - self._last) / len(delta.tokens))
        self._last = now
        self._tokens += len(delta.tokens)

    def finish(self, reason: str) -> None:
        """The request ended; later calls do nothing, so an abort may always be reported last."""
        if self._done:
            return
        self._done = True
        metrics = self._metrics
        metrics.finish(reason)
        if reason not in ("stop", "length") or self._first is None:
            return
        decode_s = self._last - self._first
        metrics.whole.observe(metrics.now() - self._arrived)
        metrics.decode.observe(decode_s)
        metrics.inference.observe(self._prefill_s + decode_s)
        metrics.prompt_tokens.observe(self._prompt_tokens)
        metrics.output_tokens.observe(self._tokens)
        if self._tokens > 1:
            metrics.per_token.observe(decode_s / (self._tokens - 1))


class Pace:
    """What the log line says every few seconds: rates between two looks at the running totals."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._before = CoreStats()
        self._at = now()

    def line(self, stats: CoreStats) -> str | None:
        """Describe the time since the last call; None when nothing ran and nothing was done."""
        before, at = self._before, self._at
        self._before, self._at = stats, self._now()
        seconds = max(self._at - at, 1e-9)
        computed = stats.computed_tokens - before.computed_tokens
        generated = stats.generated_tokens - before.generated_tokens
        if not (stats.running or stats.waiting or computed or generated):
            return None
        queries = stats.queries_tokens - before.queries_tokens
        shares = [
            f"{tier} {_percent(now_hit - before.hits_tokens.get(tier, 0), queries)}"
            for tier, now_hit in stats.hits_tokens.items()
            if now_hit > before.hits_tokens.get(tier, 0)
        ]
        hits = sum(stats.hits_tokens.values()) - sum(before.hits_tokens.values())
        detail = f" ({', '.join(shares)})" if shares else ""
        return (
            f"running {stats.running}, waiting {stats.waiting}, "
            f"KV {_percent(stats.pages_used, stats.pages_total)}, "
            f"hit {_percent(hits, queries)}{detail}, "
            f"prompt {computed / seconds:.0f} tok/s computed, "
            f"output {generated / seconds:.1f} tok/s"
        )


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
