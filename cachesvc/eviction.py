"""Eviction: which block of a tier goes first.

Only leaves go, so that no block is kept that cannot be reached. A Policy ranks blocks, Leaves
keeps the candidates of one tier in order of rank. The base line is leaf-LRU, ties broken deepest
first, so that a prompt used as a whole goes from its end.

Cost: offer and take are O(log n) in the leaves of the tier. A use is not put into the order at
once; an entry that turns out to be used since is moved when it comes up, once for all its uses.
So one take may have to move every leaf (64 ms for 100,000 of them, all used since; 0.8 us when
none was), but each of those moves stands for uses that cost nothing. Memory: 44 bytes a leaf, in
ints, which the garbage collector does not visit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

_DEPTH_BITS = 20
_DEPTH_MAX = (1 << _DEPTH_BITS) - 1
_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1


class Policy(Protocol):
    """Ranks blocks by what is known of their use; one for all tiers. One thread.

    A row belongs to one block from inserted to removed. Ticks grow with each use.
    """

    def inserted(self, row: int, depth: int, tick: int) -> None:
        """A block was stored; depth is the number of blocks before it."""
        ...

    def touched(self, rows: Iterable[int], tick: int) -> None:
        """These blocks were used together."""
        ...

    def removed(self, row: int) -> None:
        """The block is in no tier any more."""
        ...

    def rank(self, row: int) -> int:
        """How worthy of being kept; the lowest goes first. It never falls while the row lives."""
        ...


class LeafLru:
    """The block used longest ago goes first; of those used together the deepest. 12 bytes a row."""

    def __init__(self, rows: int) -> None:
        """rows: row numbers are below this."""
        self._last_use = np.zeros(rows, np.int64).data
        self._depth = np.zeros(rows, np.int32).data

    def inserted(self, row: int, depth: int, tick: int) -> None:
        """See Policy."""
        self._depth[row] = min(depth, _DEPTH_MAX)
        self._last_use[row] = tick

    def touched(self, rows: Iterable[int], tick: int) -> None:
        """See Policy."""
        last_use = self._last_use
        for row in rows:
            last_use[row] = tick

    def removed(self, row: int) -> None:
        """See Policy."""
        self._last_use[row] = 0

    def rank(self, row: int) -> int:
        """See Policy."""
        return self._last_use[row] << _DEPTH_BITS | _DEPTH_MAX - self._depth[row]


class Leaves:
    """The candidates of one tier. A block that cannot go now is dropped from it when it comes up;
    whoever changes that offers it again.

    Args:
        policy: what ranks.
        rows: row numbers are below this.
        may_go: whether a row's copy in this tier may go now.
    """

    def __init__(self, policy: Policy, rows: int, may_go: Callable[[int], bool]) -> None:
        self._policy = policy
        self._may_go = may_go
        self._heap: list[int] = []
        self._is_in = bytearray(rows)

    def __len__(self) -> int:
        """Rows in the heap, some of which may turn out not to be candidates any more."""
        return len(self._heap)

    def offer(self, row: int) -> None:
        """Something about the row has changed; it becomes a candidate if its copy may go."""
        if not self._is_in[row] and self._may_go(row):
            self._is_in[row] = 1
            heapq.heappush(self._heap, self._entry(row))

    def take(self, below: int | None = None) -> int | None:
        """Take out the candidate that goes first.

        Args:
            below: leave blocks of this rank and above alone; None: any may go.

        Returns: its row; None when there is no candidate (below that rank).
        """
        heap = self._heap
        while heap:
            entry = heap[0]
            row = entry & _ROW_MASK
            if not self._may_go(row):
                heapq.heappop(heap)
                self._is_in[row] = 0
                continue
            current = self._entry(row)
            if current != entry:
                heapq.heapreplace(heap, current)
                continue
            if below is not None and current >> _ROW_BITS >= below:
                return None
            heapq.heappop(heap)
            self._is_in[row] = 0
            return row
        return None

    def _entry(self, row: int) -> int:
        return self._policy.rank(row) << _ROW_BITS | row
