"""Measures: how long blocks lie before they are used again or go, and how long moves take."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvist.cachesvc.flash.flashio import Rise, Sink
from kvist.cachesvc.policy.eviction import TICK_MASK, TICKS_PER_S, History, Rows
from kvist.proto.hints import Hint
from kvist.proto.histograms import AGES_S, MOVE_S, Histogram, Shown

_TIERS = ("dram", "flash")
_WAYS = ("read", "write")


class Measures:
    """Learns of requests as a policy does (policy/eviction.Learner), and is told of moves.

    About 8 us a request and 1 us an evicted block; 4 bytes a row.

    Args:
        history: who used each block last; written after this is told.
        rows: of the index.

    Attributes:
        reuse_gap: between two uses of a block.
        idle: tier -> since the last use of a copy that was evicted; lifetime: since its block was
            stored, or found on flash at the start.
        rise, sink: from when a move was queued to when it was done.
        queued: "read" or "write" -> from when it was queued to when a thread began.
        busy_s: the same -> what threads took for those that went well.
    """

    def __init__(self, history: History, rows: int) -> None:
        self._history = history
        self._born = np.zeros(rows, np.uint32)
        self._born_of: Final = self._born.data
        self._bounds = np.array(AGES_S)
        self.reuse_gap = Histogram(AGES_S)
        self.idle = {tier: Histogram(AGES_S) for tier in _TIERS}
        self.lifetime = {tier: Histogram(AGES_S) for tier in _TIERS}
        self.rise, self.sink = Histogram(MOVE_S), Histogram(MOVE_S)
        self.queued = {way: Histogram(MOVE_S) for way in _WAYS}
        self.busy_s = dict.fromkeys(_WAYS, 0.0)

    # What a policy is told, see Learner.

    def found(self, rows: Rows, request: int, at: int) -> None:  # noqa: ARG002
        """See Learner.found."""
        gaps = (np.uint32(at) - self._history.at[rows]) / TICKS_PER_S
        counts = np.bincount(np.searchsorted(self._bounds, gaps), minlength=len(AGES_S) + 1)
        for at_bound in np.flatnonzero(counts).tolist():
            self.reuse_gap.counts[at_bound] += int(counts[at_bound])
        self.reuse_gap.sum += float(gaps.sum())

    def stored(self, rows: Rows, request: int, at: int) -> None:  # noqa: ARG002
        """See Learner.stored."""
        self._born[rows] = at

    def hinted(self, rows: Rows, request: int, hint: Hint) -> None:
        """Not of interest."""

    def restored(self, rows: Rows, at: int) -> None:
        """See Learner.restored."""
        self._born[rows] = at

    def removed(self, row: int) -> None:
        """Told by evicted, where it was; what was cleared is of no interest."""

    # What placement and moves tell.

    def evicted(self, tier: str, row: int, at: int) -> None:
        """A copy is about to be dropped to make room; at is in ticks."""
        idle = at - self._history.at_of[row] & TICK_MASK
        self.idle[tier].add(idle / TICKS_PER_S)
        self.lifetime[tier].add((at - self._born_of[row] & TICK_MASK) / TICKS_PER_S)

    def risen(self, job: Rise, now_s: float) -> None:
        """A block has come up from flash."""
        self.rise.add(now_s - job.queued_s)
        self._moved("read", job, job.busy_s)

    def sunk(self, job: Sink, now_s: float) -> None:
        """A block has got to flash, and its batch into the index."""
        self.sink.add(now_s - job.queued_s)
        self._moved("write", job, job.ended_s - job.began_s)

    def _moved(self, way: str, job: Rise | Sink, busy_s: float) -> None:
        self.queued[way].add(job.began_s - job.queued_s)
        self.busy_s[way] += busy_s

    def shown(self, has_flash: bool) -> tuple[Shown, ...]:
        """All histograms; those of flash only where there is one."""
        tiers = _TIERS if has_flash else _TIERS[:1]
        all_ = [self.reuse_gap.shown("reuse_gap_seconds")]
        for tier in tiers:
            all_.append(self.idle[tier].shown("idle_before_evict_seconds", tier=tier))
            all_.append(self.lifetime[tier].shown("lifetime_seconds", tier=tier))
        if has_flash:
            all_ += [self.rise.shown("rise_seconds"), self.sink.shown("sink_seconds")]
            all_ += [self.queued[way].shown("flash_queue_seconds", way=way) for way in _WAYS]
        return tuple(all_)
