"""Prometheus metrics of an engine, kept in its API process; what they are says definitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvist.engine.definitions import BOUNDS, FINISH_REASONS, KVIST, VLLM, figures_of
from kvist.engine.request import CoreStats, Delta, Outputs, Ready
from kvist.proto.exposition import exposition
from kvist.proto.histograms import Histogram


class EngineMetrics:
    """All metrics of one engine, built once and passed down. Used by the API's thread.

    Args:
        others: collectors of other things, shown behind; two engines in one process take two.
        model: label `model_name`.
        now: seconds, monotonic.

    Attributes:
        times: histograms by name of definitions.BOUNDS.
    """

    def __init__(self, others: CollectorRegistry, model: str, now: Callable[[], float]) -> None:
        self.now = now
        self.others = others
        self.times = {name: Histogram(bounds) for name, bounds in BOUNDS.items()}
        self._labels = {"engine": "0", "model_name": model}
        self._stats = CoreStats()
        self._finished = Counter(dict.fromkeys(FINISH_REASONS, 0))

    def text(self) -> bytes:
        """What a scrape gets: the core's latest figures as they are, and the times of requests."""
        shown = tuple(times.shown(name) for name, times in self.times.items())
        figures = figures_of(self._stats) | {"finished": self._finished, "histograms": shown}
        ours = exposition(VLLM, figures, self._labels) + exposition(KVIST, figures)
        return ours.encode() + generate_latest(self.others)

    def observe_ready(self, ready: Ready, prefix_caching: bool) -> None:
        """Show what the pool looks like; once."""
        values = {
            **self._labels,
            "block_size": str(ready.block_tokens),
            "num_gpu_blocks": str(ready.pages),
            "enable_prefix_caching": str(prefix_caching),
            "namespace": ready.namespace,
        }
        self.others.register(_Info("vllm:cache_config_info", "The paged KV pool.", values))

    def observe_outputs(self, outputs: Outputs) -> None:
        """Take one step's figures."""
        if outputs.stats.steps > self._stats.steps:
            self.times["step_tokens"].add(outputs.stats.step_tokens)
        self._stats = outputs.stats

    def finish(self, reason: str) -> None:
        """Count a request that ended."""
        self._finished[reason if reason in FINISH_REASONS else "error"] += 1

    def start_timer(self, prompt_tokens: int, max_tokens: int, choices: int = 1) -> RequestTimer:
        """Start the clock of a request that is about to be submitted, one of several choices."""
        return RequestTimer(self, prompt_tokens, max_tokens, choices)


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

    def __init__(
        self, metrics: EngineMetrics, prompt_tokens: int, max_tokens: int, choices: int
    ) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens
        self._choices = choices
        self._cached = 0
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
        now, times = self._metrics.now(), self._metrics.times
        if self._first is None:
            self._first = now
            self._prefill_s = delta.prefill_s
            self._cached = delta.cached.total if delta.cached is not None else 0
            times["first_token"].add(now - self._arrived)
            times["queue"].add(delta.queue_s)
            times["prefill"].add(delta.prefill_s)
        else:
            times["between_tokens"].add((now - self._last) / len(delta.tokens))
        self._last = now
        self._tokens += len(delta.tokens)

    def finish(self, reason: str) -> None:
        """The request ended; later calls do nothing, so an abort may always be reported last."""
        if self._done:
            return
        self._done = True
        metrics, times = self._metrics, self._metrics.times
        metrics.finish(reason)
        if reason not in ("stop", "length") or self._first is None:
            return
        decode_s = self._last - self._first
        times["whole"].add(metrics.now() - self._arrived)
        times["decode"].add(decode_s)
        times["inference"].add(self._prefill_s + decode_s)
        times["prompt_tokens"].add(self._prompt_tokens)
        times["computed_prompt_tokens"].add(self._prompt_tokens - self._cached)
        times["output_tokens"].add(self._tokens)
        times["max_tokens"].add(self._max_tokens)
        times["choices"].add(self._choices)
        if self._tokens > 1:
            times["per_token"].add(decode_s / (self._tokens - 1))


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
