"""A small flash tier in a directory, filled, reopened and read with every byte compared."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import numpy as np

from kvist.proto.errors import BlockCorrupt, BlockMissing
from kvist.tiers.flash import FlashTier
from kvist.tiers.segment import DiskIo
from sim.blocks import SLOT_BYTES, Block, empty, make_block, number_of

SLOTS = 24
CAPACITY = SLOTS * SLOT_BYTES


def open_tier(path: Path, disk: DiskIo | None = None, slots: int = SLOTS) -> FlashTier:
    return FlashTier.open(path, slots * SLOT_BYTES, SLOT_BYTES, disk)


def store(tier: FlashTier, block: Block) -> int:
    slot = tier.allocate()
    tier.write(slot, block.header, block.payload)
    tier.index_put([block.entry(slot)])
    return slot


def load(tier: FlashTier, slot: int, block: Block) -> bool:
    """Whether the slot serves the block; bytes that are served must be right."""
    out = empty(block)
    try:
        tier.read(slot, block.wanted, out)
    except (BlockCorrupt, BlockMissing):
        return False
    assert np.array_equal(out, block.payload), "wrong bytes were served"
    return True


def filled(path: Path, blocks: int = 8, disk: DiskIo | None = None) -> dict[int, Block]:
    """A closed directory with blocks in it; slot -> block."""
    tier = open_tier(path, disk)
    stored = {store(tier, block): block for block in map(make_block, range(blocks))}
    tier.close()
    return stored


def recovered(tier: FlashTier) -> dict[int, int]:
    """Take what the tier still knows; slot -> number of the block."""
    entries = [*tier.entries(), *(tier.scan(Event()) if tier.needs_rebuild else ())]
    assert all(tier.take(entry) for entry in entries)
    return {entry.slot: number_of(entry.key) for entry in entries}


def flip(file: Path, offset: int) -> None:
    """Change a byte of a file."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        (byte,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 0xFF]))
