"""Gittins: from observed reuse ages to how worthy of being kept a block is.

A block's class says what is known of its kind, its age bucket how long ago it was used. For each
class the hazard of a reuse in each bucket is estimated as Kaplan and Meier do (Nonparametric
estimation from incomplete observations, 1958): reuses over blocks at risk, where blocks that are
still alive are at risk up to their present age. Classes with few blocks are drawn to those like
them, these to all, and all to a hazard that is constant per octave of age, which orders blocks as
LRU does.

The worth of a block is the best rate of "probability of a reuse per second of cache held", over
all times at which one could stop to wait: the index of Gittins (Bandit processes and dynamic
allocation indices, 1979), which is what a block's room should be given by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.policy.eviction import TICKS_PER_S
from kvist.cachesvc.policy.hints import EXPECTATIONS, PAUSE_KINDS, SOONEST

Table = NDArray[np.float64]

BUCKETS = 48
USE_KINDS, TAIL_KINDS, RHYTHM_KINDS = 4, 4, 12
# Of blocks with a hint, what was told of them stands in for their rhythm.
FORESIGHT_KINDS = RHYTHM_KINDS + EXPECTATIONS - 1
CLASSES = USE_KINDS * TAIL_KINDS * FORESIGHT_KINDS

# The smoothing, in blocks of prior weight. Halving or doubling any of them moved the hit ratio
# of two traces by 0.5 points at most and mostly by less than 0.1, the noise of the sampling.
POOL_BLOCKS = 20.0
CLASS_BLOCKS = 60.0
HAZARD_PER_OCTAVE = 0.05
DECAY = 0.975  # per rebuild: half of what was seen is forgotten after 27

# Ages over EDGES[j - 1] and up to EDGES[j] ticks are bucket j: half octaves, from 1/4 s to 24 days.
_FIRST_EDGE_S = 0.25
_EDGES_S = _FIRST_EDGE_S * 2.0 ** (np.arange(BUCKETS - 1) / 2)
EDGES = (_EDGES_S * TICKS_PER_S).astype(np.uint32)
WIDTHS_S = np.diff(np.concatenate([[0.0], _EDGES_S, [_EDGES_S[-1] * 2**0.5]]))

# Per bucket, half an octave; but the first one stands for four octaves, or what was used just now
# would seem worth less than what was used half a second ago.
_PRIOR = np.full((1, BUCKETS), HAZARD_PER_OCTAVE / 2)
_PRIOR[0, 0] = HAZARD_PER_OCTAVE * 4

# class -> the class without its rhythm, which is what a class with few blocks is drawn to.
_BASES = CLASSES // FORESIGHT_KINDS

# What a hint is taken to mean until it is known what came of its like: after the end of a session
# one block in 256 comes back that would have otherwise; in a pause next to none before half of it,
# then half of them in each half octave, and after twice the pause it is as if nothing was said.
_END_FACTOR = 1 / 256
_EARLY_FACTOR = 1 / 4
_DUE_HAZARD = 0.5


def _expected_hazards() -> tuple[Table, Table]:
    """By foresight and age: a factor of the class's own hazard, and what it is at least."""
    factor, least = np.ones((FORESIGHT_KINDS, BUCKETS)), np.zeros((FORESIGHT_KINDS, BUCKETS))
    factor[RHYTHM_KINDS] = _END_FACTOR
    middles_s = np.concatenate([[0.0], _EDGES_S]) * 2**0.25
    for octave in range(PAUSE_KINDS):
        row = RHYTHM_KINDS + SOONEST - 1 + octave
        factor[row, middles_s < 2.0**octave / 4] = _EARLY_FACTOR
        is_due = (middles_s > 2.0**octave / 4) & (middles_s < 2.0**octave * 2)
        least[row, is_due] = _DUE_HAZARD
    return factor, least


_FACTOR, _LEAST = _expected_hazards()
_IS_FORETOLD = np.arange(CLASSES) % FORESIGHT_KINDS >= RHYTHM_KINDS


def hazards(seen: Sequence[Table], weight: float, prior: Table) -> Table:
    """Probability of a reuse within each age bucket, for those who reach it.

    Args:
        seen: blocks reused, by the age at which they were; blocks lost sight of, by age; blocks
            that live, by their present age: half of them have reached the middle of their
            bucket. Each (classes, BUCKETS).
        weight: blocks of prior knowledge per bucket.
        prior: hazards, broadcast.
    """
    events, ends, alive = seen
    reached = np.cumsum((events + ends + alive)[:, ::-1], axis=1)[:, ::-1]
    hazard: Table = (events + weight * prior) / (reached - alive / 2 + weight)
    return hazard


def worths(hazard: Table) -> Table:
    """The Gittins index for each class and age bucket, per second.

    Args:
        hazard: (classes, BUCKETS), each 0 <= h < 1.
    """
    # A horizon of `ahead` more buckets, for all ages at once: the next one adds its share.
    padded = np.pad(hazard, ((0, 0), (0, BUCKETS)))
    seconds = np.pad(WIDTHS_S * (1 - hazard / 2), ((0, 0), (0, BUCKETS)))
    waits = np.ones_like(hazard)
    hits, held_s, best = np.zeros_like(hazard), np.zeros_like(hazard), np.zeros_like(hazard)
    for ahead in range(BUCKETS):
        next_hazard = padded[:, ahead : ahead + BUCKETS]
        hits += waits * next_hazard
        held_s += waits * seconds[:, ahead : ahead + BUCKETS]
        np.maximum(best, hits / held_s, out=best)
        waits *= 1 - next_hazard
    return best


class Estimator:
    """What was seen of all classes, and what it means. 240 KiB, whatever the cache holds.

    Attributes:
        worth: (CLASSES * BUCKETS,), per second; index is class * BUCKETS + bucket.
        worth_of: the same memory, for single values.
        is_foretold: there are hints, so what they mean is worked out.
    """

    def __init__(self) -> None:
        self.is_foretold = False
        # Sums stay exact up to 2**24 in 4 bytes; a cell gets some million before it decays.
        self._events = np.zeros(CLASSES * BUCKETS, np.float32)
        self._ends = np.zeros(CLASSES * BUCKETS, np.float32)
        self.worth = np.zeros(CLASSES * BUCKETS, np.float32)
        self.worth_of = self.worth.data
        self.rebuild(np.zeros(CLASSES * BUCKETS))

    def reused(self, cells: NDArray[np.int64], blocks: float = 1.0) -> None:
        """Blocks were used again; each at its cell, class * BUCKETS + bucket of its age."""
        np.add.at(self._events, cells, blocks)

    def reused_at(self, cell: int, blocks: int) -> None:
        """So were some blocks of one cell."""
        self._events[cell] += blocks

    def lost_at(self, cell: int, blocks: int) -> None:
        """Blocks of one cell are not watched any more."""
        self._ends[cell] += blocks

    def rebuild(self, alive: Table) -> None:
        """Learn. About 2 ms.

        Args:
            alive: (CLASSES * BUCKETS,), blocks stored or remembered, by class and present age.
        """
        shape = (CLASSES, BUCKETS)
        tables = (self._events, self._ends, alive)
        seen = [table.reshape(shape).astype(np.float64) for table in tables]
        all_kinds = [table.sum(axis=0, keepdims=True) for table in seen]
        by_base = [table.reshape(_BASES, FORESIGHT_KINDS, BUCKETS).sum(axis=1) for table in seen]
        pool = hazards(all_kinds, POOL_BLOCKS, _PRIOR)
        base = hazards(by_base, POOL_BLOCKS, pool)
        # A class of which nothing was seen is its base; few of them are ever seen.
        is_active = _IS_FORETOLD & self.is_foretold
        for table in seen:
            is_active |= table.any(axis=1)
        active = np.flatnonzero(is_active)
        of_active, told = base[active // FORESIGHT_KINDS], active % FORESIGHT_KINDS
        prior = np.maximum(of_active * _FACTOR[told], _LEAST[told])
        own = hazards([table[active] for table in seen], CLASS_BLOCKS, prior)
        worth = worths(np.concatenate([base, own]))
        table = np.repeat(worth[:_BASES], FORESIGHT_KINDS, axis=0)
        table[active] = worth[_BASES:]
        self.worth[:] = table.reshape(-1)
        self._events *= DECAY
        self._ends *= DECAY
