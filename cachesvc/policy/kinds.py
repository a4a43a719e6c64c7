"""Kinds: which class a block is of, by what is known of it; the classes are those of gittins.py."""

from __future__ import annotations

from math import log2

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.policy.gittins import EDGES, FORESIGHT_KINDS, RHYTHM_KINDS, USE_KINDS
from kvist.cachesvc.policy.hints import UNTOLD

USES_MAX = 255
TAIL_MAX = 16
# A rhythm is 1 + 16 times the octaves of its average gap over 1/4 s, up to 14 octaves, in a byte.
# 0 is none.
_RHYTHM_STEPS = 16
_FIRST_TICKS = int(EDGES[0])
_FORETOLD = RHYTHM_KINDS - 1  # + expectation, which is 1 or more

Bytes = NDArray[np.uint8]
Kinds = NDArray[np.uint16]


def _class_tables() -> tuple[Kinds, Kinds, Kinds]:
    """Shares of the class number: by uses, by blocks up to the end, by rhythm; they add up."""
    uses = np.searchsorted([2, 3, 5], np.arange(USES_MAX + 1), side="right")
    tail = np.searchsorted([1, 4, TAIL_MAX], np.arange(TAIL_MAX + 1), side="right")
    octave = (np.arange(256) - 1) // _RHYTHM_STEPS - 2  # of a gap in seconds
    rhythm = 1 + np.clip(octave + 1, 0, RHYTHM_KINDS - 2)
    rhythm[0] = 0
    tables = (uses * FORESIGHT_KINDS, tail * FORESIGHT_KINDS * USE_KINDS, rhythm)
    use_share, tail_share, rhythm_share = (table.astype(np.uint16) for table in tables)
    return use_share, tail_share, rhythm_share


_BY_USES, _BY_TAIL, _BY_RHYTHM = _class_tables()
_BY_USES_OF, _BY_TAIL_OF, _BY_RHYTHM_OF = _BY_USES.data, _BY_TAIL.data, _BY_RHYTHM.data


def kind_of(uses: int, tail: int, rhythm: int, expectation: int) -> int:
    """Class of a block.

    Args:
        uses: up to USES_MAX. tail: blocks up to the end of its prompt, up to TAIL_MAX.
        rhythm: see rhythm. expectation: see hints.py; it goes before the rhythm.
    """
    foresight = _FORETOLD + expectation if expectation else _BY_RHYTHM_OF[rhythm]
    return int(_BY_USES_OF[uses] + _BY_TAIL_OF[tail] + foresight)


def kinds_of(uses: Bytes, tail: Bytes, rhythm: Bytes, expectation: Bytes | None) -> Kinds:
    """The same for many; None is no expectation for any."""
    foresight = _BY_RHYTHM[rhythm]
    if expectation is not None:
        told = (_FORETOLD + expectation).astype(np.uint16)
        foresight = np.where(expectation == UNTOLD, foresight, told)
    kinds: Kinds = _BY_USES[uses] + _BY_TAIL[tail] + foresight
    return kinds


def rhythm_of(gap: int, old: int) -> int:
    """The rhythm after a gap, in ticks; old is the one before it, 0 for none."""
    fresh = min(255, int(log2(max(gap, _FIRST_TICKS) / _FIRST_TICKS) * _RHYTHM_STEPS + 1.5))
    return (old + fresh) // 2 if old else fresh


def rhythms_of(gaps: NDArray[np.uint32], old: Bytes) -> NDArray[np.int64]:
    """The same for many."""
    octaves = np.log2(np.maximum(gaps, _FIRST_TICKS) / _FIRST_TICKS)
    fresh = np.minimum(octaves * _RHYTHM_STEPS + 1.5, 255).astype(np.int64)
    return np.where(old == 0, fresh, (old + fresh) // 2)
