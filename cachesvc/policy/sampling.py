"""Sampling: the candidates of a tier when their order changes with time, as Gittins' does."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Protocol

import numpy as np

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.policy.eviction import TICK_MASK, History, Rows, Tree
from kvist.cachesvc.policy.gittins import Table
from kvist.cachesvc.policy.shadow import Shadow

# At least so many, up to twice as many. 32 or 128 leaves changed the hit ratio by 0.2 points at
# most, 8 by a point.
SAMPLE = 64
# Ages up to 1/4 s are not told apart, so a sample is good for as long.
_SAMPLE_TICKS = 8


class Ranks(Protocol):
    """What ranks rows at a time."""

    @property
    def tree(self) -> Tree:
        """The stored blocks."""
        ...

    @property
    def history(self) -> History:
        """Who used them last."""
        ...

    def worths(self, rows: Rows, at: int) -> Table:
        """How worthy of being kept rows are; the lowest goes first."""
        ...

    def worth(self, row: int, at: int) -> float:
        """The same for one row."""
        ...

    def are_alike(self, row: int, other: int) -> bool:
        """Whether two rows are worth the same at all times; one may have gone."""
        ...


class SampledOrder:
    """Candidates in an array, of which a few taken at random are ranked at each take.

    Then the chain of what went is followed upwards for as long as its blocks rank below all the
    others of the sample: one sample for a run of blocks, not for each.

    Args:
        ranks: what ranks.
        shadow: while it is losing, the block used longest ago goes first.
        may_go: whether a row's copy in this tier may go now.
        random: chooses.
    """

    def __init__(
        self,
        ranks: Ranks,
        shadow: Shadow,
        may_go: Callable[[int], bool],
        random: Random,
    ) -> None:
        self._ranks = ranks
        self._shadow = shadow
        self._may_go = may_go
        self._random = random
        self._history = ranks.history
        self._parent, self._depth = ranks.tree.parent, ranks.tree.depth
        self._place = np.zeros(len(self._history.request), np.int32).data  # + 1
        self._rows = np.zeros(SAMPLE, np.int32)
        self._count = 0
        self._next = self._gone = NO_ROW
        self._bound = 0.0
        self._sampled_at = 0

    def __len__(self) -> int:
        """See Order."""
        return self._count

    def __contains__(self, row: int) -> bool:
        """See Order."""
        return bool(self._place[row])

    def offer(self, row: int) -> None:
        """See Order. Rows that may not go are taken out, for they would spoil the samples."""
        if not self._may_go(row):
            if self._place[row]:
                self._withdraw(row)
        elif not self._place[row]:
            if self._count == len(self._rows):
                self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._rows[self._count] = row
            self._count += 1
            self._place[row] = self._count

    def take(self, at: int, than: int = NO_ROW) -> int:
        """See Order."""
        while self._count:
            row = self._following(at, than)
            if row == NO_ROW:
                row = self._sampled(at, than)
            if row == NO_ROW:
                return NO_ROW
            self._withdraw(row)
            if self._may_go(row):
                self._gone, self._next = row, self._parent[row]
                self._shadow.evicted(self._history.request_of[row])
                return row
        return NO_ROW

    def _following(self, at: int, than: int) -> int:
        """The block before the one that went last, if it goes next; else NO_ROW."""
        row = self._next
        if row == NO_ROW or not self._place[row]:
            return NO_ROW
        if at - self._sampled_at & TICK_MASK > _SAMPLE_TICKS:
            return NO_ROW
        if than != NO_ROW and not self._is_before(row, than):
            return NO_ROW
        if self._ranks.are_alike(row, self._gone) or self._worth(row, at) <= self._bound:
            return row
        return NO_ROW

    def _is_before(self, row: int, other: int) -> bool:
        """Whether a block was used before another one; of one prompt the end counts as before."""
        request_of, depth = self._history.request_of, self._depth
        return (request_of[row], -depth[row]) < (request_of[other], -depth[other])

    def _worth(self, row: int, at: int) -> float:
        if self._shadow.is_cautious:
            return -float(at - self._history.at_of[row] & TICK_MASK)
        return self._ranks.worth(row, at)

    def _sampled(self, at: int, than: int) -> int:
        """The lowest of a few; of equals the one used longest ago, then the deepest."""
        step = max(1, self._count // SAMPLE)
        start = self._random.randrange(step)
        rows = self._rows[start : self._count : step].astype(np.int64)
        if than != NO_ROW:
            rows = np.array([row for row in rows.tolist() if self._is_before(row, than)], np.int64)
            if not len(rows):
                return NO_ROW
        ages = np.uint32(at) - self._history.at[rows]
        worths = (
            -ages.astype(np.float64) if self._shadow.is_cautious else self._ranks.worths(rows, at)
        )
        first = int(worths.argmin())
        lowest = worths[first]
        equals = np.flatnonzero(worths == lowest)
        if len(equals) > 1:
            request_of = self._history.request_of
            ranks = [(request_of[rows[i]], -self._depth[rows[i]], i) for i in equals.tolist()]
            first = min(ranks)[2]
            self._bound = float(lowest)
        else:
            worths[first] = np.inf
            self._bound = float(worths.min())
        self._sampled_at = at
        return int(rows[first])

    def _withdraw(self, row: int) -> None:
        place = self._place[row] - 1
        self._count -= 1
        last = int(self._rows[self._count])
        self._rows[place] = last
        self._place[last] = place + 1
        self._place[row] = 0
