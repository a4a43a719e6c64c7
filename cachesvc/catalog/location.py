"""Where the copies of a block are, and how the index writes that in one word."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.proto.shm import LOW_HALF


@dataclass(frozen=True, slots=True)
class Location:
    """Where the copies of a block are: slot numbers, or None where there is no copy.

    Attributes:
        dram: slot of the arena.
        flash: slot of the flash tier; whether it can be read now says IndexReader.flash_state.
    """

    dram: int | None
    flash: int | None


def unpack_location(word: int) -> Location | None:
    """Read a location word; None is a free row."""
    if not word:
        return None
    low, high = word & LOW_HALF, word >> 32
    return Location(low - 1 if low else None, high - 1 if high else None)


def pack_location(dram: int | None, flash: int | None) -> int:
    """Write a location word; 0, a free row, when both are None."""
    return (0 if dram is None else dram + 1) | (0 if flash is None else flash + 1) << 32
