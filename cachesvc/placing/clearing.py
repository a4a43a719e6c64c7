"""Clearing: a namespace, or everything, is gone at once for all who look, then piece by piece.

    cut     in one go: no key leads to the blocks any more (catalog/hidden), moves of them end, and
            their keys leave the flash index in one transaction, before anything else gets there
    step    at every tick, STEP_BLOCKS blocks, children first: slots become free, the policy learns

Whoever looks after the cut finds none of what was stored before. A block stored meanwhile is a new
one, also under a key that was cleared; one whose parent was cleared is refused as without parent.
Where a slot is wanted and none is free, cleared blocks go before others are evicted. A second cut
adds to the first. A sidecar that closes amid the pieces writes what leaves the flash index; one
that is killed before that transaction finds the blocks on flash again, as if nobody had cleared.

A million blocks in DRAM kept the service's thread away for 15 s (leaf-LRU: 12 s) when they went in
one call. Now the cut takes 47 ms and a piece 4 ms (leaf-LRU: 3), 99 of 100 less than 8, two of
3,907 pieces 22 and 40: milliseconds of the processor, beside other work (benchmarks/browse.py).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.placing.placement import Placement

STEP_BLOCKS = 256
# For a slot that is wanted now.
_RECLAIM_BLOCKS = 16


@dataclass(slots=True)
class _Cut:
    """Rows, children first; those before at are dropped. A row is of this cut while the number of
    its namespace is one of numbers; it may have got another block since."""

    rows: NDArray[np.int64]
    numbers: frozenset[int]
    at: int = 0


class Clearing:
    """What was cleared and is not dropped yet. One thread.

    Args:
        placement: the blocks.

    Attributes:
        step_blocks: dropped in one piece, at most.
        longest_step: blocks looked at in the longest piece so far.
    """

    def __init__(self, placement: Placement) -> None:
        self.step_blocks = STEP_BLOCKS
        self.longest_step = 0
        self._placement = placement
        self._cuts: deque[_Cut] = deque()
        self._waiters: list[Future[None]] = []
        placement.reclaim = self.reclaim

    @property
    def busy(self) -> bool:
        """Whether anything is left."""
        return bool(self._cuts)

    def cut(self, namespace: bytes | None) -> int:
        """Have no block of a namespace found any more, or none at all with None; how many."""
        placement = self._placement
        rows, numbers = placement.blocks.hide(namespace)
        self._end_moves(numbers)
        placement.hottest.forget(rows)
        unlisted = placement.index.hidden.keys_on_flash(rows) if placement.flash else b""
        if unlisted:
            placement.unlisted.append(unlisted)
        if len(rows):
            self._cuts.append(_Cut(rows, numbers))
        return len(rows)

    def _end_moves(self, numbers: frozenset[int]) -> None:
        blocks, jobs = self._placement.blocks, self._placement.jobs
        rows = [row for row in jobs if blocks.space(row) in numbers]
        for row in sorted(rows, key=lambda row: -blocks.depth[row]):
            self._placement.cancel_job(row)
            self._placement.offer(row)
            self._placement.offer(blocks.parent[row])

    def step(self) -> None:
        """Drop the next piece."""
        self._drop(self.step_blocks)

    def reclaim(self) -> None:
        """Drop a few, for whoever needs a slot."""
        self._drop(_RECLAIM_BLOCKS)

    def _drop(self, blocks: int) -> None:
        if not self._cuts:
            return
        cut = self._cuts[0]
        rows = cut.rows[cut.at : cut.at + blocks].tolist()
        cut.at += len(rows)
        space = self._placement.blocks.space
        for row in rows:
            if space(row) in cut.numbers:  # else it was evicted meanwhile
                self._placement.drop_all([row], "cleared")
        self.longest_step = max(self.longest_step, len(rows))
        if cut.at == len(cut.rows):
            self._cuts.popleft()

    def waiter(self) -> Future[None]:
        """Something that is done when tell is called next."""
        waiter: Future[None] = Future()
        self._waiters.append(waiter)
        return waiter

    def tell(self) -> None:
        """Nothing that was cleared is left, or nobody will drop it any more."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)
