"""Where the copies of a block are, and how the index writes that in one word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvist.proto.shm import LOW_HALF, RISING


@dataclass(frozen=True, slots=True)
class Location:
    """Where the copies of a block are: slot numbers, or None where there is no copy.

    Attributes:
        dram: slot of the arena; None while the block is only on its way there.
        flash: slot of the flash tier; whether it can be read now says IndexReader.flash_state.
        rising: slot of the arena into which it rises, to be read with proto.slot.RisingReader.
    """

    dram: int | None
    flash: int | None
    rising: int | None = None


def unpack_location(word: int) -> Location | None:
    """Read a location word; None is a free row."""
    if not word:
        return None
    low, high = word & LOW_HALF, word >> 32
    flash = high - 1 if high else None
    if word & RISING:
        return Location(None, flash, (low & ~RISING) - 1)
    return Location(low - 1 if low else None, flash)


def dram_half(word: int) -> int:
    """DRAM slot + 1 of a block that is there, else 0."""
    return 0 if word & RISING else word & LOW_HALF


def dram_copies(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of some location words say that the block is in DRAM."""
    low: NDArray[np.uint64] = words & np.uint64(LOW_HALF)
    is_there: NDArray[np.bool_] = np.logical_and(low != 0, low < RISING)
    return is_there


def pack_location(dram: int | None, flash: int | None) -> int:
    """Write a location word; 0, a free row, when both are None."""
    return (0 if dram is None else dram + 1) | (0 if flash is None else flash + 1) << 32
