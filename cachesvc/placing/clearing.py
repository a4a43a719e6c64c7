"""Clearing: many blocks are gone at once for all who look, and then piece by piece.

    cut     in one go: no key leads to the blocks any more (catalog/hidden), moves of them end, and
            their keys leave the flash index in one transaction, before anything else gets there
    step    at every tick, STEP_BLOCKS blocks, children first: slots become free, the policy learns

So go a namespace, or everything, that is cleared; what stands on a damaged block; and what is over
its time. A tree that is no longer than a piece goes at once.

Whoever looks after the cut finds none of what was stored before. A block stored meanwhile is a new
one, also under a key that was cut; one whose parent was cut is refused as without parent. Where a
slot is wanted and none is free, blocks that were cut go before others are evicted. A second cut
adds to the first. A sidecar that closes amid the pieces writes what leaves the flash index; one
that is killed before that transaction finds the blocks on flash again, as if nobody had cut.

A million blocks in DRAM kept the service's thread away for 15 s (leaf-LRU: 12 s) when they went in
one call. Now the cut takes 47 ms and a piece 4 ms (leaf-LRU: 3), 99 of 100 less than 8, two of
3,907 pieces 22 and 40: milliseconds of the processor, beside other work (benchmarks/browse.py).
With a million on one damaged block, or over their time, 17 to 20 s became a cut of 0.24 s, most of
it to find them, and the same pieces (benchmarks/cuts.py).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from kvist.cachesvc.catalog.trees import Rows
from kvist.cachesvc.placing.placement import Placement

STEP_BLOCKS = 256
# Of slots that are overwritten, in one piece: 4 ms.
WIPED_BYTES = 32 << 20
# For a slot that is wanted now.
_RECLAIM_BLOCKS = 16


@dataclass(slots=True)
class _Cut:
    """Rows, children first; those before at are dropped. A row is of this cut while the number of
    its namespace is one of numbers; it may have got another block since."""

    rows: Rows
    numbers: frozenset[int]
    at: int = 0


class Clearing:
    """What was cut and is not dropped yet. One thread.

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
        self._wiped = max(1, WIPED_BYTES // placement.dram.slot_bytes)
        placement.reclaim = self.reclaim
        placement.drop_trees = self.drop_trees

    @property
    def busy(self) -> bool:
        """Whether anything is left."""
        return bool(self._cuts)

    def cut(self, namespace: bytes | None) -> int:
        """Have no block of a namespace found any more, or none at all with None; how many."""
        rows, numbers = self._placement.blocks.hide(namespace)
        self._leave(_Cut(rows, numbers))
        return len(rows)

    def drop_trees(self, rows: Rows, why: str) -> None:
        """Have blocks found by nobody any more and drop them; now, if they are few.

        Args:
            rows: of blocks that can be found, and all that stand on these; children first.
            why: see catalog/hidden.REASONS.
        """
        group = self._placement.group(int(rows[0]))
        is_wiped = group is not None and group.limits.ttl is not None
        if len(rows) <= (min(self.step_blocks, self._wiped) if is_wiped else self.step_blocks):
            self._placement.drop_all(rows, why)
            return
        numbers, bereft = self._placement.blocks.hide_trees(rows, why)
        self._leave(_Cut(rows, numbers))
        for row in bereft:
            self._placement.offer(row)

    def _leave(self, cut: _Cut) -> None:
        """To be dropped by and by."""
        placement = self._placement
        self._end_moves(cut.numbers)
        placement.hottest.forget(cut.rows)
        unlisted = placement.index.hidden.keys_on_flash(cut.rows) if placement.flash else b""
        if unlisted:
            placement.unlisted.append(unlisted)
        if len(cut.rows):
            self._cuts.append(cut)

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
        cut, placement = self._cuts[0], self._placement
        rows = cut.rows[cut.at : cut.at + blocks]
        spaces = placement.blocks.spaces_of(rows).tolist()
        wiped = placement.counts.slots_wiped + self._wiped
        begun = cut.at
        for at, space in enumerate(spaces):
            if placement.counts.slots_wiped >= wiped:
                break
            cut.at += 1
            if space in cut.numbers:  # else it was evicted meanwhile
                placement.drop_all(rows[at : at + 1], "cleared")
        self.longest_step = max(self.longest_step, cut.at - begun)
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
