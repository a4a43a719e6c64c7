"""What the sidecar keeps for a block outside the arena, counted in its tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.stores import Bench, chain

from kvist.cachesvc.placement import Placement

LIMIT_BYTES = 200
# Header, origins, claims and the like: the same for any number of slots.
FIXED_BYTES = 128 << 10
# A leaf has an int and its place in a list (cachesvc/eviction.py); at worst each block is one.
LEAF_BYTES = 44


def tables(owner: object) -> Iterator[int]:
    """Bytes of what an object holds itself, rows of all kinds."""
    for name in set(vars(owner)) if hasattr(owner, "__dict__") else ():
        value = getattr(owner, name)
        if isinstance(value, memoryview):
            yield value.nbytes
        elif isinstance(value, bytearray):
            yield len(value)
        elif hasattr(value, "nbytes"):
            yield value.nbytes
        elif hasattr(value, "itemsize"):
            yield len(value) * value.itemsize


def kept_bytes(placement: Placement) -> int:
    owners = (
        placement.blocks, placement.policy, placement._dram_leaves, placement._flash_leaves,
        placement.dram._free,
    )  # fmt: skip
    return sum(sum(tables(owner)) for owner in owners) + placement.index.path.stat().st_size


@pytest.mark.parametrize("slots", [4096, 4097, 6000])
def test_tables_keep_no_more_than_the_limit_for_a_block(tmp_path: Path, slots: int) -> None:
    bench = Bench(tmp_path, dram_slots=slots)
    bench.open()
    placement = bench.parts.placement
    assert max(tables(placement.blocks)) >= 4 * slots, "the tables are looked at"
    assert kept_bytes(placement) - FIXED_BYTES + LEAF_BYTES * slots <= LIMIT_BYTES * slots
    bench.close()


def test_no_object_is_kept_for_a_block(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=512)
    bench.open()
    worker = bench.worker()
    worker.put(chain(0, 16))
    placement = bench.parts.placement
    owners = (placement, placement.blocks, placement.policy, placement.index)
    before = [objects(owner) for owner in owners]
    for first in range(1000, 1400, 100):
        assert worker.put(chain(first, 64)) == ["stored"] * 64
    assert [objects(owner) for owner in owners] == before
    bench.close()


def objects(owner: object) -> int:
    """Entries of the dictionaries, sets and lists that an object holds."""
    held = [value for value in vars(owner).values() if isinstance(value, dict | set | list)]
    return sum(len(value) for value in held)
