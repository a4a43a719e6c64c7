"""Histograms with fixed bounds: what takes how long, and how well it was estimated.

A histogram is a row of counts, one per bound and one for what is over the last, and a sum. It costs
a bisection, 0.2 us. A worker's are words of its ring file (proto/shm), which add up over workers
and lives because the bounds are the same everywhere: to change them is a new SHM_VERSION.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

MOVE_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
)  # fmt: skip
"""Bounds of copies: a block from DRAM takes 0.1 ms, a long prompt from a slow disk seconds."""

LOOKUP_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2)

RATIOS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.11, 1.25, 1.5, 2.0, 4.0)
"""Bounds of what came over what was estimated; an estimate is good between 0.8 and 1.25."""

AGES_S = (
    1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0, 86400.0, 259200.0, 604800.0,
)  # fmt: skip
"""Bounds of how long a block lies, from a second to a week."""

TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)

WORKER_HISTOGRAMS: Mapping[str, tuple[float, ...]] = {
    "lookup_seconds": LOOKUP_S,
    "load_seconds.dram": MOVE_S,
    "load_seconds.flash": MOVE_S,
    "store_seconds": MOVE_S,
    "load_estimate_ratio.dram": RATIOS,
    "load_estimate_ratio.flash": RATIOS,
    "prefill_estimate_ratio": RATIOS,
    "ttft_seconds.none": TTFT_S,
    "ttft_seconds.hbm": TTFT_S,
    "ttft_seconds.dram": TTFT_S,
    "ttft_seconds.flash": TTFT_S,
}
"""What workers measure, by name; a tier stands behind a dot.

ttft_seconds: from a request's arrival at the engine to its first token, its queueing included, by
the tier that most of its cached tokens came from; none where less than half of it was cached.
"""

MICRO = 1_000_000
"""Words are whole numbers: seconds and ratios are kept in millionths."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A histogram as it is shown.

    Attributes:
        name: of the figure; labels: what tells it from others of that name.
        bounds: upper ones, growing.
        counts: values up to each bound and over the one before; one more for those over all.
        sum: of the values.
    """

    name: str
    labels: Mapping[str, str]
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class Histogram:
    """Counts of values. One thread at a time.

    Args:
        bounds: growing.

    Attributes:
        counts: (len(bounds) + 1,). sum: of the values.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value; one that equals a bound is in the bound's own count, as in Prometheus."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def shown(self, name: str, **labels: str) -> Shown:
        """What it counted so far."""
        return Shown(name, labels, self.bounds, tuple(self.counts), self.sum)


def words_of(name: str) -> tuple[str, ...]:
    """Names of a worker's histogram's words: its counts, then its sum in millionths."""
    counts = range(len(WORKER_HISTOGRAMS[name]) + 1)
    return (*(f"{name}.{at}" for at in counts), f"{name}.sum")


def shown_of(name: str, words: Mapping[str, int]) -> Shown:
    """A worker's histogram, or the sum of several ones, from the words; none is 0."""
    *counts, total = (words.get(word, 0) for word in words_of(name))
    figure, _, tier = name.partition(".")
    labels = {"tier": tier} if tier else {}
    return Shown(figure, labels, WORKER_HISTOGRAMS[name], tuple(counts), total / MICRO)
