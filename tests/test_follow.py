"""Slots and records that are read while they rise from flash: part by part, and never wrong."""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sim.blocks import SHAPE, Block, make_block
from sim.flash import open_tier, store

from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn
from kvist.proto.record import PAGE_BYTES, Bytes, RecordShape, pack_header
from kvist.proto.slot import RisingReader, SlotReader, begin, fill_slot, publish, show, shown
from kvist.tiers.flash import FlashTier
from kvist.tiers.flash_io import part_ends

PARTS = SHAPE.record_bytes // PAGE_BYTES


# The slot.


def rising(block: Block, pages: int) -> memoryview:
    """A slot in which a block rises, of which so many pages are shown."""
    slot = memoryview(mmap.mmap(-1, SHAPE.record_bytes))
    begin(slot)
    fill_slot(slot, block.header, block.payload)
    show(slot, pages * PAGE_BYTES)
    return slot


def test_what_is_shown_can_be_read_and_counts_when_all_is_published() -> None:
    block = make_block(1)
    slot = rising(block, 1)
    with pytest.raises(BlockMissing):
        SlotReader(slot, block.wanted)
    reader = RisingReader(slot, block.wanted)
    assert (reader.has(0), reader.has(1), shown(slot)) == (True, False, PAGE_BYTES)
    show(slot, 2 * PAGE_BYTES)
    assert (reader.has(PAGE_BYTES), reader.has(PAGE_BYTES + 1)) == (True, False)
    show(slot, 3 * PAGE_BYTES)
    assert (reader.has(block.header.payload_bytes), reader.has(None)) == (True, False)
    with pytest.raises(BlockMissing):
        reader.check(None)
    publish(slot)
    assert reader.has(None)
    assert shown(slot) == len(slot)
    reader.check(block.header.checksum)
    with pytest.raises(BlockCorrupt):
        reader.check(block.header.checksum + 1)
    SlotReader(slot, block.wanted).check(block.header.checksum)


@pytest.mark.parametrize("ends", [[begin], [publish, begin], [begin, publish], [publish, publish]])
def test_a_rise_that_does_not_end_in_its_own_publishing_is_torn(
    ends: list[Callable[[memoryview], None]],
) -> None:
    block = make_block(1)
    slot = rising(block, 3)
    reader = RisingReader(slot, block.wanted)
    for change in ends:
        change(slot)
    with pytest.raises(BlockTorn):
        reader.check(None)


def test_a_header_that_is_not_shown_yet_is_not_looked_at() -> None:
    block = make_block(1)
    with pytest.raises(BlockMissing):
        RisingReader(rising(block, 0), block.wanted)
    with pytest.raises(BlockCorrupt, match="key"):
        RisingReader(rising(block, 1), make_block(2).wanted)


BIG = RecordShape(payload_bytes=8 * PAGE_BYTES, block_tokens=4)


def rise_forever(slot: memoryview) -> None:
    """Another value each time; every third rise fails."""
    block = make_block(0, BIG)
    payload = np.frombuffer(slot, np.uint8, BIG.payload_bytes, BIG.header_bytes)
    for turn in itertools.count():
        begin(slot)
        pack_header(block.header, slot)
        for stop in range(PAGE_BYTES, BIG.payload_bytes + 1, PAGE_BYTES):
            payload[stop - PAGE_BYTES : stop] = turn % 251
            show(slot, BIG.header_bytes + stop)
        if turn % 3:
            publish(slot)
            time.sleep(0.0005)  # for as long it is there


def follow(slot: memoryview, out: Bytes) -> None:
    """Copy what rises there; raises when that comes to nothing."""
    reader = RisingReader(slot, make_block(0, BIG).wanted)
    for stop in range(PAGE_BYTES, BIG.payload_bytes + 1, PAGE_BYTES):
        while not reader.has(stop):
            pass
        out[stop - PAGE_BYTES : stop] = reader.payload[stop - PAGE_BYTES : stop]
    while not reader.has(None):
        pass
    reader.check(None)


def test_no_mixture_of_two_rises_is_accepted_without_a_checksum_either() -> None:
    slot = memoryview(mmap.mmap(-1, BIG.record_bytes))
    out = np.empty(BIG.payload_bytes, np.uint8)
    writer = multiprocessing.get_context("fork").Process(target=rise_forever, args=(slot,))
    writer.start()
    accepted = torn = 0
    try:
        while accepted < 100 or torn < 5:
            try:
                follow(slot, out)
            except BlockMissing:
                continue
            except BlockTorn:
                torn += 1
            else:
                accepted += 1
                assert out.min() == out.max(), "bytes of two rises"
    finally:
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()


# The record on flash.


def test_a_record_is_cut_into_a_short_part_and_even_ones_of_whole_pages() -> None:
    def pages(length: int, part_bytes: int) -> list[int]:
        ends = part_ends(length * PAGE_BYTES, part_bytes)
        assert not any(end % PAGE_BYTES for end in ends)
        return [end // PAGE_BYTES for end in ends]

    assert pages(8, 0) == [8]
    assert pages(8, 5 * PAGE_BYTES) == [8]
    assert pages(8, 4 * PAGE_BYTES) == [2, 8]
    assert pages(10, 4 * PAGE_BYTES) == [2, 6, 10]
    assert pages(361, 80 * PAGE_BYTES) == [40, 120, 200, 280, 361]
    assert pages(7, PAGE_BYTES) == [1, 2, 3, 4, 5, 6, 7]


def test_a_record_read_in_parts_is_the_record_and_its_generation_stays(tmp_path: Path) -> None:
    tier, block = open_tier(tmp_path), make_block(3)
    slot = store(tier, block)
    into = memoryview(mmap.mmap(-1, SHAPE.record_bytes))
    into.cast("Q")[0] = 99
    seen = []
    for part in tier.read_parts(slot, into, PAGE_BYTES):
        seen.append((part.end, part.is_last))
        assert part.header == block.header
        there = block.payload[: max(0, part.end - PAGE_BYTES)]
        assert bytes(into[PAGE_BYTES : PAGE_BYTES + len(there)]) == there.tobytes()
    assert seen == [((n + 1) * PAGE_BYTES, n == PARTS - 1) for n in range(PARTS)]
    assert into.cast("Q")[0] == 99
    tier.close()


def test_a_header_that_is_longer_than_a_part_is_waited_for(tmp_path: Path) -> None:
    shape = RecordShape(payload_bytes=PAGE_BYTES, block_tokens=2000)
    tier = FlashTier.open(tmp_path, 4 * shape.record_bytes, shape.record_bytes)
    block = make_block(3, shape)
    slot = store(tier, block)
    into = memoryview(mmap.mmap(-1, shape.record_bytes))
    ends = [part.end for part in tier.read_parts(slot, into, PAGE_BYTES)]
    assert ends == [2 * PAGE_BYTES, 3 * PAGE_BYTES]
    assert bytes(into[shape.header_bytes :]) == block.payload.tobytes()
    tier.close()


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_damage_behind_the_first_part_is_found_by_the_last(tmp_path: Path, how: str) -> None:
    tier, block = open_tier(tmp_path), make_block(3)
    slot = store(tier, block)
    with (tmp_path / "segment-00000").open("r+b") as file:
        at = slot * SHAPE.record_bytes + 2 * PAGE_BYTES
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1])) if how == "flipped" else file.truncate(at)
    parts = tier.read_parts(slot, memoryview(mmap.mmap(-1, SHAPE.record_bytes)), PAGE_BYTES)
    assert [next(parts).end, next(parts).end] == [PAGE_BYTES, 2 * PAGE_BYTES]
    with pytest.raises(BlockCorrupt, match="checksum" if how == "flipped" else "ends inside"):
        next(parts)
    tier.close()


def test_a_slot_that_is_given_away_between_two_parts_is_missing(tmp_path: Path) -> None:
    tier, block = open_tier(tmp_path), make_block(3)
    slot = store(tier, block)
    parts = tier.read_parts(slot, memoryview(mmap.mmap(-1, SHAPE.record_bytes)), PAGE_BYTES)
    next(parts)
    tier.free(slot)
    with pytest.raises(BlockMissing):
        next(parts)
    tier.close()
