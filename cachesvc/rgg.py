"""Run-ghost Gittins: keep the blocks whose room is best used, as learned from their like.

    class    how often a block was used, how near to the end of its prompt it stood then, and the
             rhythm of its uses (an average of the octave of the gaps; new blocks have the rhythm
             of the block they stand on)
    learn    a reuse is an event at the block's age, in its class. Ghosts (ghosts.py) tell the
             reuses that came after the block had gone, so nothing is learned from survivors only
    rank     the Gittins index of its class at its age (gittins.py); the lowest of 64 leaves taken
             at random goes, and from there up its chain as long as the next block ranks lowest
    guard    leaf-LRU is counted beside it all the time (shadow.py); a tier in which the policy
             falls behind for long is evicted by age for a while

Each number is smoothing or resolution. None was chosen for one workload; halving or doubling any
moves the hit ratio of two traces by tenths of a point.

Memory: 8 bytes a row and 4 for each tier; 35 to 43 a ghost. Time: 40 us for a chain of 250 blocks
found, 2 ms each 128 requests to learn, 5 us to choose a block and forget it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from math import log2
from random import Random

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.blocks import NO_ROW
from kvist.cachesvc.eviction import TICK_MASK, History, LeafLru, Policy, PolicyName, Rows, Tree
from kvist.cachesvc.ghosts import NO_GHOST, Ghosts
from kvist.cachesvc.gittins import (
    BUCKETS,
    CLASSES,
    EDGES,
    RHYTHM_KINDS,
    USE_KINDS,
    Estimator,
    Table,
)
from kvist.cachesvc.sampling import SampledOrder
from kvist.cachesvc.shadow import Shadow

REQUESTS_PER_REBUILD = 128
# A run is some blocks, so these are some millions; half as many ghosts as blocks cost 0.6 points in
# a cache of 1 % and 0.03 in one of 10 %, and a cache of more than a million blocks is not small.
GHOSTS_MAX = 1 << 20
# Rows and ghosts looked at to know what lives; the rest is inferred from them.
SCAN_MAX = 8192

# Rows of a chain that are quicker dealt with one by one.
_FEW = 12
_USES_MAX = 255
_TAIL_MAX = 16
_EDGE_LIST = EDGES.tolist()
# A rhythm is 1 + 16 times the octaves of its average gap over 1/4 s, up to 14 octaves, in a byte.
# 0 is none.
_RHYTHM_STEPS = 16
_FIRST_TICKS = _EDGE_LIST[0]


def _class_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Shares of the class number: by uses, by blocks up to the end, by rhythm; they add up."""
    uses = np.searchsorted([2, 3, 5], np.arange(_USES_MAX + 1), side="right")
    tail = np.searchsorted([1, 4, _TAIL_MAX], np.arange(_TAIL_MAX + 1), side="right")
    octave = (np.arange(256) - 1) // _RHYTHM_STEPS - 2  # of a gap in seconds
    rhythm = 1 + np.clip(octave + 1, 0, RHYTHM_KINDS - 2)
    rhythm[0] = 0
    tables = (uses * RHYTHM_KINDS, tail * RHYTHM_KINDS * USE_KINDS, rhythm)
    use_share, tail_share, rhythm_share = (table.astype(np.uint8) for table in tables)
    return use_share, tail_share, rhythm_share


_BY_USES, _BY_TAIL, _BY_RHYTHM = _class_tables()
_BY_USES_OF, _BY_TAIL_OF, _BY_RHYTHM_OF = _BY_USES.data, _BY_TAIL.data, _BY_RHYTHM.data


def _rhythm(gap: int) -> int:
    """Of one gap, in ticks."""
    return min(255, int(log2(max(gap, _FIRST_TICKS) / _FIRST_TICKS) * _RHYTHM_STEPS + 1.5))


class Gittins:
    """The policy. One thread.

    Args:
        tree: the stored blocks.
        history: who used them last.
        capacity: blocks that may be stored at once; as many runs are remembered, up to GHOSTS_MAX.
        seed: of the choice of leaves.

    Attributes:
        shadows: one per order, in their order.
    """

    name: PolicyName = "rgg"

    def __init__(self, tree: Tree, history: History, capacity: int, seed: int) -> None:
        rows = len(history.request)
        self._tree = tree
        self._parent, self._name = tree.parent, tree.name
        self._history = history
        self._random = Random(seed)
        self._depths = np.asarray(tree.depth)
        self._uses = np.zeros(rows, np.uint8)  # 0: no block
        self._rhythm = np.zeros(rows, np.uint8)
        self._tail = np.zeros(rows, np.uint8)
        self._kind = np.zeros(rows, np.uint8)
        self._child_ghost = np.zeros(rows, np.int32)  # + 1; of the child evicted from its run
        self._use_of, self._rhythm_of = self._uses.data, self._rhythm.data
        self._tail_of, self._kind_of = self._tail.data, self._kind.data
        self._child_ghost_of = self._child_ghost.data
        self._ghosts = Ghosts(min(capacity, GHOSTS_MAX))
        self._estimator = Estimator()
        self.shadows: list[Shadow] = []
        self._held: list[Callable[[Rows], int]] = []
        self._newest = 0
        self._rebuilds = 0

    def order(
        self, may_go: Callable[[int], bool], held: Callable[[Rows], int], capacity: int
    ) -> SampledOrder:
        """See Policy."""
        shadow = Shadow(capacity)
        self.shadows.append(shadow)
        self._held.append(held)
        return SampledOrder(self, shadow, may_go, self._random)

    # For SampledOrder.

    @property
    def tree(self) -> Tree:
        """The stored blocks."""
        return self._tree

    @property
    def history(self) -> History:
        """Who used them last."""
        return self._history

    def worths(self, rows: Rows, at: int) -> Table:
        """How worthy of being kept rows are, (rows,); the lowest goes first."""
        ages = np.uint32(at) - self._history.at[rows]
        cells = self._kind[rows] * np.int64(BUCKETS) + np.searchsorted(EDGES, ages)
        worths: Table = self._estimator.worth[cells]
        return worths

    def worth(self, row: int, at: int) -> float:
        """The same for one row."""
        cell = self._cell(self._kind_of[row], at - self._history.at_of[row])
        worth: float = self._estimator.worth_of[cell]
        return worth

    def are_alike(self, row: int, other: int) -> bool:
        """Whether two rows are worth the same at all times, as those of a run are."""
        kind_of, at_of = self._kind_of, self._history.at_of
        return kind_of[row] == kind_of[other] and at_of[row] == at_of[other]

    @staticmethod
    def _cell(kind: int, age: int) -> int:
        return kind * BUCKETS + bisect_left(_EDGE_LIST, age & TICK_MASK)

    # Learning.

    def found(self, rows: Rows, request: int, at: int) -> None:
        """See Learner. A later event of the same request finds blocks again or more of them."""
        self._begin(request, at)
        self._tell_shadows(rows, request)
        if len(rows) <= _FEW:
            self._find_few(rows.tolist(), at)
        else:
            self._find(rows, at)

    def _find_few(self, rows: list[int], at: int) -> None:
        """As _find: 3 us a row, where that takes 50 for however many."""
        at_of, rhythm_of, use_of, depth = (
            self._history.at_of, self._rhythm_of, self._use_of, self._tree.depth,
        )  # fmt: skip
        for row in rows:
            gap = at - at_of[row] & TICK_MASK
            self._estimator.reused_at(self._cell(self._kind_of[row], gap), 1)
            old, fresh = rhythm_of[row], _rhythm(gap)
            rhythm_of[row] = (old + fresh) // 2 if old else fresh
            use_of[row] = min(use_of[row] + 1, _USES_MAX)
            self._tail_of[row] = min(depth[rows[-1]] - depth[row], _TAIL_MAX)
            self._child_ghost_of[row] = 0
            self._classify(row)

    def _find(self, rows: Rows, at: int) -> None:
        gaps = np.uint32(at) - self._history.at[rows]
        cells = self._kind[rows] * np.int64(BUCKETS) + np.searchsorted(EDGES, gaps)
        self._estimator.reused(cells)
        octaves = np.log2(np.maximum(gaps, _FIRST_TICKS) / _FIRST_TICKS)
        fresh = np.minimum(octaves * _RHYTHM_STEPS + 1.5, 255).astype(np.int64)
        old = self._rhythm[rows]
        rhythm = np.where(old == 0, fresh, (old + fresh) // 2)
        uses = np.minimum(self._uses[rows], _USES_MAX - 1) + np.uint8(1)
        depths = self._depths[rows]
        tail = np.minimum(depths[-1] - depths, _TAIL_MAX)
        self._uses[rows] = uses
        self._rhythm[rows] = rhythm
        self._tail[rows] = tail
        self._kind[rows] = _BY_USES[uses] + _BY_TAIL[tail] + _BY_RHYTHM[rhythm]
        self._child_ghost[rows] = 0

    def _tell_shadows(self, rows: Rows, request: int) -> None:
        """Runs of blocks that were used together last."""
        last = self._history.request[rows]
        starts = [0, *(np.flatnonzero(last[1:] != last[:-1]) + 1).tolist()]
        runs = list(zip(last[starts].tolist(), pairwise([*starts, len(rows)]), strict=True))
        for shadow, held in zip(self.shadows, self._held, strict=True):
            shadow.found(held(rows))
            for owner, (start, stop) in runs:
                shadow.used(request, owner, stop - start)

    def stored(self, rows: Rows, request: int, at: int) -> None:
        """See Learner."""
        self._begin(request, at)
        names = [self._name(row) for row in rows.tolist()]
        parent = self._parent[int(rows[0])]
        inherited = self._rhythm_of[parent] if parent != NO_ROW else 0
        start = 0
        while start < len(names):
            ghost = self._ghosts.find(names[start])
            if ghost != NO_GHOST:
                stop = min(len(names), start + self._ghosts.length[ghost])
                uses = min(self._ghosts.uses[ghost] + 1, _USES_MAX)
                inherited = self._revive(ghost, stop - start, request, at)
            else:
                stop, uses = start + 1, 1
                while stop < len(names) and self._ghosts.find(names[stop]) == NO_GHOST:
                    stop += 1
                for shadow in self.shadows:
                    shadow.stored(request, stop - start)
            self._uses[rows[start:stop]] = uses
            self._rhythm[rows[start:stop]] = inherited
            start = stop
        tail = np.minimum(np.arange(len(rows) - 1, -1, -1), _TAIL_MAX)
        self._tail[rows] = tail
        self._child_ghost[rows] = 0
        self._kind[rows] = (
            _BY_USES[self._uses[rows]] + _BY_TAIL[tail] + _BY_RHYTHM[self._rhythm[rows]]
        )
        self._move_end(parent, request, len(rows))

    def restored(self, rows: Rows, at: int) -> None:  # noqa: ARG002 - see Learner
        """See Learner. How they were used is not known: as once, and far from an end."""
        for shadow in self.shadows:
            shadow.stored(0, len(rows))
        self._uses[rows] = 1
        self._rhythm[rows] = 0
        self._tail[rows] = _TAIL_MAX
        self._child_ghost[rows] = 0
        self._kind[rows] = _BY_USES[1] + _BY_TAIL[_TAIL_MAX]

    def _revive(self, ghost: int, blocks: int, request: int, at: int) -> int:
        """The first blocks of a run are stored again, the rest is lost sight of; its rhythm."""
        ghosts, estimator = self._ghosts, self._estimator
        gap = at - ghosts.at[ghost] & TICK_MASK
        lost, last = ghosts.length[ghost] - blocks, ghosts.request[ghost]
        cell = self._cell(ghosts.kind[ghost], gap)
        estimator.reused_at(cell, blocks)
        estimator.lost_at(cell, lost)
        for shadow in self.shadows:
            shadow.used(request, last, blocks)
            shadow.forget(last, lost)
        old = ghosts.rhythm[ghost]
        fresh = _rhythm(gap)
        ghosts.drop(ghost)
        return (old + fresh) // 2 if old else fresh

    def _move_end(self, row: int, request: int, blocks: int) -> None:
        """A prompt goes on: the blocks before are that much further from its end."""
        request_of, tail_of, parent = self._history.request_of, self._tail_of, self._parent
        for tail in range(blocks, _TAIL_MAX + 1):
            if row == NO_ROW or request_of[row] != request or tail_of[row] >= tail:
                return
            tail_of[row] = tail
            self._classify(row)
            row = parent[row]
        while row != NO_ROW and request_of[row] == request and tail_of[row] < _TAIL_MAX:
            tail_of[row] = _TAIL_MAX
            self._classify(row)
            row = parent[row]

    def _classify(self, row: int) -> None:
        self._kind_of[row] = (
            _BY_USES_OF[self._use_of[row]]
            + _BY_TAIL_OF[self._tail_of[row]]
            + _BY_RHYTHM_OF[self._rhythm_of[row]]
        )

    def removed(self, row: int) -> None:
        """See Learner."""
        ghosts, history, name = self._ghosts, self._history, self._name(row)
        request, uses, kind = history.request_of[row], self._use_of[row], self._kind_of[row]
        ghost = self._child_ghost_of[row] - 1
        is_same_run = (
            ghost != NO_GHOST
            and ghosts.length[ghost]
            and ghosts.request[ghost] == request
            and ghosts.kind[ghost] == kind
            and ghosts.uses[ghost] == uses
        )
        if is_same_run:
            ghosts.grow(ghost, name)
        else:
            if ghosts.length[ghosts.next()]:
                self._expire(ghosts.next())
            ghost = ghosts.open(name)
            ghosts.request[ghost], ghosts.at[ghost] = request, history.at_of[row]
            ghosts.uses[ghost], ghosts.rhythm[ghost] = uses, self._rhythm_of[row]
            ghosts.kind[ghost] = kind
        parent = self._parent[row]
        if parent != NO_ROW and history.request_of[parent] == request:
            self._child_ghost_of[parent] = ghost + 1
        self._use_of[row] = 0

    def _expire(self, ghost: int) -> None:
        ghosts, blocks = self._ghosts, self._ghosts.length[ghost]
        age = self._now - ghosts.at[ghost]
        self._estimator.lost_at(self._cell(ghosts.kind[ghost], age), blocks)
        for shadow in self.shadows:
            shadow.forget(ghosts.request[ghost], blocks)
        ghosts.drop(ghost)

    def _begin(self, request: int, at: int) -> None:
        """An event of a request; learns before each REQUESTS_PER_REBUILDth."""
        self._now = at
        if request <= self._newest:
            return
        self._newest = request
        for shadow in self.shadows:
            shadow.begin(request)
        if request % REQUESTS_PER_REBUILD == 0:
            self._rebuild(at)

    _now = 0

    def _rebuild(self, at: int) -> None:
        """Learn; who is alive is counted from a part of the rows and ghosts, another each time."""
        ghosts = self._ghosts
        self._rebuilds += 1
        alive = np.zeros(CLASSES * BUCKETS)
        for counts, kinds, ats in (
            (self._uses, self._kind, self._history.at),
            (ghosts.lengths, ghosts.kinds, ghosts.ats),
        ):
            step = -(-len(counts) // SCAN_MAX)
            part = slice(self._rebuilds % step, None, step)
            cells = kinds[part] * np.int64(BUCKETS) + np.searchsorted(
                EDGES, np.uint32(at) - ats[part]
            )
            blocks = np.minimum(counts[part], 1) if counts is self._uses else counts[part]
            alive += np.bincount(cells, weights=blocks * float(step), minlength=len(alive))
        self._estimator.rebuild(alive)


def make_policy(name: PolicyName, tree: Tree, history: History, capacity: int, seed: int) -> Policy:
    """The policy of a name, for a cache of that many blocks; see Gittins."""
    if name == "lru":
        return LeafLru(tree, history)
    return Gittins(tree, history, capacity, seed)
