"""From outcomes to figures, under the names that vLLM's benchmark gives them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kvist.engine.bench.client import Outcome
from kvist.proto.errors import ConfigInvalid

METRICS = ("ttft", "tpot", "itl", "e2el")
GOALS = ("ttft", "tpot", "e2el")
ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be reported.

    Attributes:
        metrics: which of METRICS.
        percentiles: of each, in [0, 100].
        goals: which of GOALS -> milliseconds that a good request stays within.
    """

    metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    percentiles: tuple[float, ...] = (99.0,)
    goals: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """The times of one good request, in seconds.

    Attributes:
        ttft: from when it was due, or sent, to its first chunk.
        e2el: to its last.
        tpot: per token after the first; None when there is no second.
        itl: between chunks.
    """

    ttft: float
    e2el: float
    tpot: float | None
    itl: list[float]

    @classmethod
    def of(cls, outcome: Outcome, from_due: bool) -> Times:
        """Take the times of a good request.

        Args:
            from_due: count from when it was due. A request that had to wait before it could be
                sent made its user wait, too; counting from when it was sent would leave out just
                the time that a slow server costs (coordinated omission).
        """
        assert outcome.good
        assert outcome.sent_s is not None
        begin = outcome.due_s if from_due else outcome.sent_s
        chunks = outcome.chunk_s
        ttft, e2el = chunks[0] - begin, outcome.end_s - begin
        rest = outcome.output_tokens - 1
        return cls(
            ttft,
            e2el,
            (e2el - ttft) / rest if rest > 0 else None,
            [b - a for a, b in pairwise(chunks)],
        )

    def meets(self, goals: Mapping[str, float]) -> bool:
        """All goals are kept; a request without a second token has a TPOT of 0."""
        had = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.e2el}
        return all(had[name] * 1e3 <= limit_ms for name, limit_ms in goals.items())


def summarize(
    outcomes: Sequence[Outcome], duration_s: float, from_due: bool, wanted: Wanted
) -> dict[str, Any]:
    """All figures of a run.

    Args:
        outcomes: of all requests that became due.
        duration_s: of the run.
        from_due: see Times.of.
        wanted: what to report.

    Returns:
        JSON-ready; times in milliseconds, rates per second.
    """
    good = [outcome for outcome in outcomes if outcome.good]
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    times = [Times.of(outcome, from_due) for outcome in good]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in good)
    output_tokens = sum(outcome.output_tokens for outcome in good)
    goals = wanted.goals or {}
    kept = sum(each.meets(goals) for each in times) if goals else None
    duration = max(duration_s, 1e-9)
    figures: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(failed),
        "interrupted": len(outcomes) - len(good) - len(failed),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "token_counts": _counted_by(good),
        "request_throughput": len(good) / duration,
        "request_goodput": None if kept is None else kept / duration,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration,
        "max_output_tokens_per_s": peak_rate(good),
        "max_concurrent_requests": peak_concurrency(outcomes, duration_s),
        "latency_from": "due" if from_due else "sent",
        "errors": _errors(failed),
    }
    delays = [o.sent_s - o.due_s for o in good if o.sent_s is not None] if from_due else []
    if delays:
        figures["mean_send_delay_ms"] = 1e3 * sum(delays) / len(delays)
        figures["max_send_delay_ms"] = 1e3 * max(delays)
    for name in wanted.metrics:
        figures |= spread(name, values_of(times, name), wanted.percentiles)
    return figures | cached_tokens(good)


def values_of(times: Sequence[Times], metric: str) -> list[float]:
    """One metric's values, in seconds."""
    if metric == "itl":
        return [gap for each in times for gap in each.itl]
    values = [getattr(each, metric) for each in times]
    return [value for value in values if value is not None]


def spread(name: str, values_s: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in ms; nothing of no values.

    Percentiles between two values lie on the line between them.
    """
    if not values_s:
        return {}
    values = np.asarray(values_s) * 1e3
    found = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    for percent in percentiles:
        found[f"p{percent:g}_{name}_ms"] = float(np.percentile(values, percent))
    return found


def peak_concurrency(outcomes: Sequence[Outcome], duration_s: float) -> int:
    """Most requests under way at one moment; those broken off ran to the end of the run."""
    steps: list[tuple[float, int]] = []
    for outcome in outcomes:
        if outcome.sent_s is not None:
            end = outcome.end_s if outcome.done else duration_s
            steps += [(outcome.sent_s, 1), (max(end, outcome.sent_s), -1)]
    # At one moment who leaves goes before who comes.
    steps.sort()
    peak = now = 0
    for _, step in steps:
        now += step
        peak = max(peak, now)
    return peak


def peak_rate(good: Sequence[Outcome]) -> float:
    """Output tokens of the best second; a chunk stands for its share of the answer's tokens."""
    seconds: defaultdict[int, float] = defaultdict(float)
    for outcome in good:
        share = outcome.output_tokens / max(1, len(outcome.chunk_s))
        for time in outcome.chunk_s:
            seconds[math.floor(time)] += share
    return max(seconds.values(), default=0.0)


def cached_tokens(good: Sequence[Outcome]) -> dict[str, Any]:
    """Prompt tokens that were not computed, by tier; None where the server does not say."""
    told = [outcome for outcome in good if outcome.cached is not None]
    if not told:
        return {"cached_tokens": None, "cached_tokens_by_tier": None, "computed_tokens": None}
    tiers: Counter[str] = Counter()
    for outcome in told:
        tiers.update(outcome.cached or {})
    prompt_tokens = sum(outcome.prompt_tokens for outcome in told)
    return {
        "cached_tokens": sum(tiers.values()),
        "cached_tokens_by_tier": dict(tiers),
        "computed_tokens": prompt_tokens - sum(tiers.values()),
    }


def _counted_by(good: Sequence[Outcome]) -> str:
    return "usage" if all(outcome.counted for outcome in good) else "planned prompts and chunks"


def _errors(failed: Sequence[Outcome]) -> dict[str, int]:
    counts = Counter(outcome.error or "" for outcome in failed)
    return dict(counts.most_common(ERRORS_SHOWN))


def parse_wanted(metrics: str, percentiles: str, goodput: Sequence[str] | None) -> Wanted:
    """Read the flags of the report.

    Args:
        metrics: names with commas.
        percentiles: numbers with commas.
        goodput: NAME:MILLISECONDS, several or none.

    Raises:
        ConfigInvalid: names the flag and the fix.
    """
    names = tuple(name.strip() for name in metrics.split(",") if name.strip())
    if unknown := [name for name in names if name not in METRICS]:
        raise ConfigInvalid(f"--percentile-metrics: {unknown[0]!r} is not of {', '.join(METRICS)}")
    try:
        percents = tuple(float(word) for word in percentiles.split(","))
    except ValueError:
        percents = (-1.0,)
    if not all(0 <= percent <= 100 for percent in percents):
        raise ConfigInvalid(f"--metric-percentiles: {percentiles!r}; give numbers like 50,99")
    goals: dict[str, float] = {}
    for pair in goodput or ():
        name, _, limit = pair.partition(":")
        try:
            goals[name] = float(limit)
        except ValueError:
            goals[name] = -1.0
        if name not in GOALS or not goals[name] >= 0:
            raise ConfigInvalid(
                f"--goodput: {pair!r}; give milliseconds as in ttft:500, of {', '.join(GOALS)}"
            )
    return Wanted(names, percents, goals or None)
