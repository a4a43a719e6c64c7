"""What the sidecar keeps for a block outside the arena, counted in its tables."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim.stores import Bench, chain

LIMIT_BYTES = 200
# Header, origins, claims, spare rows, learned curves and so on: the same for any number of slots.
# Tables that double where a power of two is passed make 4097 and 6000 the worst of the small ones.
FIXED_BYTES = 600 << 10


def held(owner: object, seen: set[int]) -> Iterator[tuple[object, int]]:
    """Every table in an object and in what it is made of, with its bytes; each once."""
    for value in list(getattr(owner, "__dict__", {}).values()):
        table: Any = value.obj if isinstance(value, memoryview) else value
        while isinstance(table, np.ndarray) and isinstance(table.base, np.ndarray):
            table = table.base
        if id(table) in seen:
            continue
        seen.add(id(table))
        if isinstance(table, np.ndarray):
            yield table, table.nbytes
        elif isinstance(table, array):
            yield table, len(table) * table.itemsize
        elif isinstance(table, bytearray):
            yield table, len(table)
        elif type(table).__module__.startswith("kvist."):
            yield from held(table, seen)


def table_bytes(bench: Bench) -> int:
    placement = bench.parts.placement
    index = placement.index.path.stat().st_size
    return index + sum(size for _, size in held(placement, set()))


@pytest.mark.parametrize("slots", [4096, 4097, 6000])
def test_tables_keep_no_more_than_the_limit_for_a_block(tmp_path: Path, slots: int) -> None:
    bench = Bench(tmp_path / "large", dram_slots=slots)
    bench.open()
    kept = table_bytes(bench)
    bench.close()
    assert kept > 40 * slots, "the tables are looked at"
    assert kept <= LIMIT_BYTES * slots + FIXED_BYTES


def test_tables_are_made_once_and_do_not_grow_with_the_blocks(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=512)
    bench.open()
    worker = bench.worker()
    worker.put(chain(0, 16))
    before = table_bytes(bench)
    for first in range(1000, 1400, 100):
        assert worker.put(chain(first, 64)) == ["stored"] * 64
    assert table_bytes(bench) <= before + 512 * 16, "what order and history need for a leaf"
    bench.close()
