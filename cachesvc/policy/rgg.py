"""Run-ghost Gittins: keep the blocks whose room is best used, as learned from their like.

    class    how often a block was used, how near to the end of its prompt it stood then, and the
             rhythm of its uses (an average of the octave of the gaps; new blocks have the rhythm
             of the block they stand on)
    learn    a reuse is an event at the block's age, in its class. Ghosts (ghosts.py) tell the
             reuses that came after the block had gone, so nothing is learned from survivors only
    rank     the Gittins index of its class at its age (gittins.py); the lowest of 64 leaves taken
             at random goes, and from there up its chain as long as the next block ranks lowest
    hints    what the sender of a request says of its future stands in for the rhythm, in classes
             of their own (hints.py): so they are learned from, and not trusted for longer than
             they are right. A priority multiplies a block's worth
    guard    leaf-LRU is counted beside it all the time (shadow.py); the policy may stake what it
             has won, and a tier in which it falls behind is evicted by age for a while

Each number is smoothing or resolution. None was chosen for one workload; halving or doubling any
moves the hit ratio of two traces by tenths of a point.

Memory: 10 bytes a row and 4 for each tier; 36 to 44 a ghost. Time: 40 us for a chain of 250 blocks
found, 2 ms each 128 requests to learn, 5 us to choose a block and forget it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from random import Random

import numpy as np

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.policy.eviction import (
    BLOCK_TOKENS,
    EVEN_TOKENS,
    TICK_MASK,
    History,
    LeafLru,
    Policy,
    PolicyName,
    Rows,
    Tree,
)
from kvist.cachesvc.policy.ghosts import NO_GHOST, Ghosts
from kvist.cachesvc.policy.gittins import BUCKETS, CLASSES, EDGES, Estimator, Table
from kvist.cachesvc.policy.hints import UNTOLD, Hints
from kvist.cachesvc.policy.kinds import TAIL_MAX, USES_MAX, kind_of, kinds_of, rhythm_of, rhythms_of
from kvist.cachesvc.policy.sampling import SampledOrder
from kvist.cachesvc.policy.shadow import Shadow
from kvist.proto.hints import Hint

REQUESTS_PER_REBUILD = 128
# A run is some blocks, so these are some millions; half as many ghosts as blocks cost 0.6 points in
# a cache of 1 % and 0.03 in one of 10 %, and a cache of more than a million blocks is not small.
GHOSTS_MAX = 1 << 20
# Rows and ghosts looked at to know what lives; the rest is inferred from them.
SCAN_MAX = 8192

# Rows of a chain that are quicker dealt with one by one.
_FEW = 12
_EDGE_LIST = EDGES.tolist()


class Gittins:
    """The policy. One thread.

    Args:
        tree: the stored blocks.
        history: who used them last.
        capacity: blocks that may be stored at once; as many runs are remembered, up to GHOSTS_MAX.
        seed: of the choice of leaves.

    Attributes:
        name: "cost" multiplies the worth of a block by what it costs to compute again, which grows
            with the tokens before it; it has no guard, which counts blocks alike. "rgg" does not.
        shadows: one per order, in their order.
        block_tokens: see Policy.
    """

    name: PolicyName = "rgg"

    def __init__(self, tree: Tree, history: History, capacity: int, seed: int) -> None:
        self.block_tokens = BLOCK_TOKENS
        rows = len(history.request)
        self._tree = tree
        self._parent, self._name = tree.parent, tree.name
        self._history = history
        self._random = Random(seed)
        self._depths = np.asarray(tree.depth)
        self._uses = np.zeros(rows, np.uint8)  # 0: no block
        self._rhythm = np.zeros(rows, np.uint8)
        self._tail = np.zeros(rows, np.uint8)
        self._kind = np.zeros(rows, np.uint16)
        self._child_ghost = np.zeros(rows, np.int32)  # + 1; of the child evicted from its run
        self._use_of, self._rhythm_of = self._uses.data, self._rhythm.data
        self._tail_of, self._kind_of = self._tail.data, self._kind.data
        self._child_ghost_of = self._child_ghost.data
        self._hints = Hints(rows, tree.parent)
        self._fork = (0, NO_ROW)  # request, and the row that it may go on from otherwise
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
        shadow = Shadow(capacity, is_guarding=self.name != "cost")
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
        if self.name == "cost":
            worths = worths * (1 + self._depths[rows] * (self.block_tokens / EVEN_TOKENS))
        return worths * self._hints.weights(rows) if self._hints.is_on else worths

    def worth(self, row: int, at: int) -> float:
        """The same for one row."""
        cell = self._cell(self._kind_of[row], at - self._history.at_of[row])
        worth: float = self._estimator.worth_of[cell]
        if self.name == "cost":
            worth *= 1 + self._tree.depth[row] * self.block_tokens / EVEN_TOKENS
        return worth * self._hints.weight(row) if self._hints.is_on else worth

    def are_alike(self, row: int, other: int) -> bool:
        """Whether two rows are worth the same at all times, as those of a run are; of a chain the
        one before may cost less."""
        kind_of, at_of, weight = self._kind_of, self._history.at_of, self._hints.weight
        are_of_a_run = kind_of[row] == kind_of[other] and at_of[row] == at_of[other]
        return are_of_a_run and (not self._hints.is_on or weight(row) == weight(other))

    @staticmethod
    def _cell(kind: int, age: int) -> int:
        return kind * BUCKETS + bisect_left(_EDGE_LIST, age & TICK_MASK)

    # Learning.

    def found(self, rows: Rows, request: int, at: int) -> None:
        """See Learner. A later event of the same request finds blocks again or more of them."""
        self._begin(request, at)
        self._tell_shadows(rows, request)
        if self._hints.is_on:
            last = int(rows[-1])
            # One more block than the last request had found may be the end of its prompt.
            self._fork = (request, last) if self._tail_of[last] > 1 else (0, NO_ROW)
            self._hints.used(rows, request)
        if len(rows) <= _FEW:
            self._find_few(rows.tolist(), at)
        else:
            self._find(rows, at)

    def _find_few(self, rows: list[int], at: int) -> None:
        """As _find: 3 us a row, where that takes 50 for however many."""
        at_of, rhythms, use_of, depth = (
            self._history.at_of, self._rhythm_of, self._use_of, self._tree.depth,
        )  # fmt: skip
        for row in rows:
            gap = at - at_of[row] & TICK_MASK
            self._estimator.reused_at(self._cell(self._kind_of[row], gap), 1)
            rhythms[row] = rhythm_of(gap, rhythms[row])
            use_of[row] = min(use_of[row] + 1, USES_MAX)
            self._tail_of[row] = min(depth[rows[-1]] - depth[row], TAIL_MAX)
            self._child_ghost_of[row] = 0
            self._classify(row)

    def _find(self, rows: Rows, at: int) -> None:
        gaps = np.uint32(at) - self._history.at[rows]
        cells = self._kind[rows] * np.int64(BUCKETS) + np.searchsorted(EDGES, gaps)
        self._estimator.reused(cells)
        rhythm = rhythms_of(gaps, self._rhythm[rows])
        uses = np.minimum(self._uses[rows], USES_MAX - 1) + np.uint8(1)
        depths = self._depths[rows]
        tail = np.minimum(depths[-1] - depths, TAIL_MAX)
        self._uses[rows] = uses
        self._rhythm[rows] = rhythm
        self._tail[rows] = tail
        self._child_ghost[rows] = 0
        self._classify_all(rows)

    def _tell_shadows(self, rows: Rows, request: int) -> None:
        """Runs of blocks that were used together last."""
        last = self._history.request[rows]
        starts = [0, *(np.flatnonzero(last[1:] != last[:-1]) + 1).tolist()]
        runs = list(zip(last[starts].tolist(), pairwise([*starts, len(rows)]), strict=True))
        for shadow, held in zip(self.shadows, self._held, strict=True):
            kept = held(rows)
            shadow.found(kept)
            for owner, (start, stop) in runs:  # what a tier lacks of a chain is its end, mostly
                shadow.used(request, owner, stop - start, max(0, stop - max(start, kept)))

    def stored(self, rows: Rows, request: int, at: int) -> None:
        """See Learner."""
        self._begin(request, at)
        names = [self._name(row) for row in rows.tolist()]
        parent = self._parent[int(rows[0])]
        inherited = self._rhythm_of[parent] if parent != NO_ROW else 0
        is_new = self._ghosts.find(names[0]) == NO_GHOST
        start = 0
        while start < len(names):
            ghost = self._ghosts.find(names[start])
            if ghost != NO_GHOST:
                stop = min(len(names), start + self._ghosts.length[ghost])
                uses = min(self._ghosts.uses[ghost] + 1, USES_MAX)
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
        self._tail[rows] = np.minimum(np.arange(len(rows) - 1, -1, -1), TAIL_MAX)
        self._child_ghost[rows] = 0
        if self._hints.is_on:
            self._hints.stored(rows, request)
            self._note_fork(parent, request, is_new)
        self._classify_all(rows)
        self._move_end(parent, request, len(rows))

    def hinted(self, rows: Rows, request: int, hint: Hint) -> None:
        """See Learner."""
        self._hints.told(request, hint)
        if not self._estimator.is_foretold:  # the first one
            self._estimator.is_foretold = True
            self._rebuild(self._now)
        self._hints.used(rows, request)
        self._classify_all(rows)

    def _note_fork(self, parent: int, request: int, is_new: bool) -> None:
        """A prompt that goes on otherwise than the one before is of another session: the blocks
        that both have are shared. What goes on with an evicted block is no fork."""
        if is_new and self._fork == (request, parent):
            for row in self._hints.share(parent):
                self._classify(row)
        self._fork = (0, NO_ROW)

    def restored(self, rows: Rows, at: int) -> None:  # noqa: ARG002 - see Learner
        """See Learner. How they were used is not known: as once, and far from an end."""
        for shadow in self.shadows:
            shadow.stored(0, len(rows))
        self._uses[rows] = 1
        self._rhythm[rows] = 0
        self._tail[rows] = TAIL_MAX
        self._child_ghost[rows] = 0
        if self._hints.is_on:
            self._hints.stored(rows, 0)
        self._classify_all(rows)

    def _revive(self, ghost: int, blocks: int, request: int, at: int) -> int:
        """The first blocks of a run are stored again, the rest is lost sight of; its rhythm."""
        ghosts, estimator = self._ghosts, self._estimator
        gap = at - ghosts.at[ghost] & TICK_MASK
        lost, last = ghosts.length[ghost] - blocks, ghosts.request[ghost]
        cell = self._cell(ghosts.kind[ghost], gap)
        estimator.reused_at(cell, blocks)
        estimator.lost_at(cell, lost)
        for shadow in self.shadows:
            shadow.used(request, last, blocks, blocks)
            shadow.forget(last, lost)
        rhythm = rhythm_of(gap, ghosts.rhythm[ghost])
        ghosts.drop(ghost)
        return rhythm

    def _move_end(self, row: int, request: int, blocks: int) -> None:
        """A prompt goes on: the blocks before are that much further from its end."""
        request_of, tail_of, parent = self._history.request_of, self._tail_of, self._parent
        for tail in range(blocks, TAIL_MAX + 1):
            if row == NO_ROW or request_of[row] != request or tail_of[row] >= tail:
                return
            tail_of[row] = tail
            self._classify(row)
            row = parent[row]
        while row != NO_ROW and request_of[row] == request and tail_of[row] < TAIL_MAX:
            tail_of[row] = TAIL_MAX
            self._classify(row)
            row = parent[row]

    def _classify(self, row: int) -> None:
        expected = self._hints.expectation(row) if self._hints.is_on else UNTOLD
        self._kind_of[row] = kind_of(
            self._use_of[row], self._tail_of[row], self._rhythm_of[row], expected
        )

    def _classify_all(self, rows: Rows) -> None:
        """The same for many."""
        expected = self._hints.expectations(rows) if self._hints.is_on else None
        self._kind[rows] = kinds_of(
            self._uses[rows], self._tail[rows], self._rhythm[rows], expected
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
    policy = Gittins(tree, history, capacity, seed)
    policy.name = name
    return policy
