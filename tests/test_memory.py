"""Maps of shared files: where they lie, how long they live, and huge pages."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from sim.blocks import empty, make_block

from kvist.proto.memory import HUGE_BYTES, _address, collapse, map_shared, populate
from kvist.proto.record import RecordShape
from kvist.tiers.dram import DramTier
from kvist.transfer.shm import ArenaMap

BIG = RecordShape(payload_bytes=1 << 20, block_tokens=4)


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile(dir="/dev/shm") as made:
        os.truncate(made.fileno(), 3 * HUGE_BYTES + 4096)
        yield made.fileno()


def is_mapped(address: int) -> bool:
    spans = re.findall(r"^(\w+)-(\w+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return any(int(low, 16) <= address < int(high, 16) for low, high in spans)


def can_collapse(file: int) -> bool:
    return collapse(map_shared(file, HUGE_BYTES))


def test_a_map_begins_at_a_huge_page_and_leaves_nothing_beside_it(file: int) -> None:
    length = 3 * HUGE_BYTES + 4096
    before = Path("/proc/self/maps").read_text().count("\n")
    view = map_shared(file, length)
    assert _address(view) % HUGE_BYTES == 0
    assert (len(view), view.format, view.readonly) == (length, "B", False)
    assert Path("/proc/self/maps").read_text().count("\n") <= before + 1
    view[-1] = 7
    assert os.pread(file, 1, length - 1) == b"\7"


def test_a_map_lives_as_long_as_its_last_view(file: int) -> None:
    view = map_shared(file, HUGE_BYTES)
    address = _address(view)
    part = np.frombuffer(view[4096:8192], np.uint8)
    view.release()
    del view
    part[0] = 3
    assert is_mapped(address)
    assert os.pread(file, 1, 4096) == b"\3"
    del part
    assert not is_mapped(address)


def test_a_map_that_cannot_be_made_is_an_error_and_leaves_no_hole(tmp_path: Path) -> None:
    read_only = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
    before = Path("/proc/self/maps").read_text().count("\n")
    try:
        with pytest.raises(PermissionError):
            map_shared(read_only, HUGE_BYTES)
    finally:
        os.close(read_only)
    assert Path("/proc/self/maps").read_text().count("\n") <= before


def test_collapsing_and_populating_change_no_byte(file: int) -> None:
    view = map_shared(file, 2 * HUGE_BYTES)
    data = np.frombuffer(view, np.uint8)
    data[:] = np.random.default_rng(0).integers(0, 256, len(view), dtype=np.uint8)
    want = data.copy()
    collapse(view[HUGE_BYTES:])  # whether it can or not
    assert populate(view, Event())
    assert np.array_equal(data, want)


def test_an_arena_in_dev_shm_lies_in_huge_pages_and_every_block_stays_right(file: int) -> None:
    if not can_collapse(file):
        pytest.skip("this kernel makes no huge pages of shared memory (Linux 6.1 does)")
    path = Path(f"/dev/shm/kvist-test-{os.getpid()}")
    tier = DramTier(path, 8, BIG.record_bytes)
    try:
        assert tier.pages == "plain"
        blocks = [make_block(number, BIG) for number in range(8)]
        slots = [tier.allocate() for _ in blocks]
        for slot, block in zip(slots, blocks, strict=True):
            tier.write(slot, block.header, block.payload)
        early = ArenaMap(path, tier.slot_bytes, 8)
        assert tier.prefault(Event())
        assert tier.pages == "huge"
        assert tier.huge_bytes == 8 * BIG.record_bytes // HUGE_BYTES * HUGE_BYTES
        for arena in (early, ArenaMap(path, tier.slot_bytes, 8)):
            for slot, block in zip(slots, blocks, strict=True):
                out = empty(block)
                arena.read(slot, block.wanted, out)
                assert np.array_equal(out, block.payload)
            arena.close()
    finally:
        tier.close()


def test_an_arena_too_small_for_a_huge_page_works_with_plain_ones(tmp_path: Path) -> None:
    tier = DramTier(tmp_path / "arena", 2, make_block(0).header.shape.record_bytes)
    assert tier.prefault(Event())
    assert (tier.pages, tier.huge_bytes) == ("plain", 0)
    tier.close()
