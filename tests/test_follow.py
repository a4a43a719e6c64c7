"""Blocks that are read while they rise from flash: part by part, side by side, and never wrong."""

from __future__ import annotations

import errno
import itertools
import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sim.blocks import SHAPE, Block, empty, make_block
from sim.flash import open_tier, store
from sim.stores import Bench, Worker, chain, check, keys_of

from kvist.cachesvc.placing import moves
from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn
from kvist.proto.record import PAGE_BYTES, Bytes, RecordShape, pack_header
from kvist.proto.shm import FOLLOW
from kvist.proto.slot import RisingReader, SlotReader, begin, fill_slot, publish, show, shown
from kvist.tiers.flash import FlashTier
from kvist.tiers.flash_io import part_ends
from kvist.tiers.segment import DiskIo
from kvist.transfer.pipeline import LayerStream

BLOCKS = 4
PARTS = SHAPE.record_bytes // PAGE_BYTES
LAYERS = 6
LAYER_BYTES = SHAPE.payload_bytes // LAYERS


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


# The store.


class HeldDisk(DiskIo):
    """Reads of pages of records wait until they are let through.

    Attributes:
        held: whether they do.
        fails: reads to come that go well, before one fails; None fails none.
        offsets: of what was read while it was held.
    """

    def __init__(self) -> None:
        self.held = False
        self.fails: int | None = None
        self.offsets: list[int] = []
        self._through = threading.Semaphore(0)

    def let(self, reads: int = 1) -> None:
        """So many reads may go on."""
        for _ in range(reads):
            self._through.release()

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, when it is let."""
        if self.held:
            assert self._through.acquire(timeout=20)
            self.offsets.append(offset)
        if self.fails is not None:
            self.fails -= 1
            if self.fails < 0:
                raise OSError(errno.EIO, "the test was asked to fail")
        return super().pread(fd, buffers, offset)


class Followed:
    """A store whose first blocks are on flash only and can be followed; one I/O thread."""

    def __init__(self, folder: Path) -> None:
        self.disk = HeldDisk()
        self.bench = Bench(folder, dram_slots=4 * BLOCKS, flash_slots=48)
        self.bench.open(self.disk, io_threads=1)
        self.worker: Worker = self.bench.worker()
        self.blocks = chain(0, BLOCKS)
        assert set(self.worker.put(self.blocks)) == {"stored"}
        self.bench.settle()
        self.push_out()

    def push_out(self) -> None:
        """Store others until the blocks are on flash only."""
        for first in range(100, 100 + 12 * BLOCKS, BLOCKS):
            if self.tiers() == ["flash"] * BLOCKS:
                return
            self.worker.put(chain(first, BLOCKS))
            self.bench.settle()
        assert self.tiers() == ["flash"] * BLOCKS

    def tiers(self) -> list[str]:
        return self.bench.tiers(self.blocks)

    def follow(self) -> None:
        """Ask for the blocks, and hold the disk."""
        self.disk.held = True
        self.worker.ring.push(FOLLOW, BLOCKS, self.blocks[-1].header.key)
        self.bench.store.tick()
        assert self.bench.parts.moves.queued["read"] == BLOCKS

    def places(self) -> list[int | None]:
        """Slots into which the blocks rise, as a worker sees it."""
        found = [self.worker.index.find(key) for key in keys_of(self.blocks)]
        return [None if place is None else place.rising for place in found]

    def step(self, reads: int = 1) -> None:
        """Let the disk read so often, and the store see what came of it."""
        done = len(self.disk.offsets) + reads
        self.disk.let(reads)
        self.bench.run_until(lambda: len(self.disk.offsets) >= done)

    def readers(self) -> list[RisingReader]:
        """Of all blocks, whose headers are there."""
        slots = [slot for slot in self.places() if slot is not None]
        assert len(slots) == BLOCKS
        wanted = [block.wanted for block in self.blocks]
        made: list[RisingReader] = []
        self.bench.run_until(lambda: all(self.worker.arena.shown(slot) for slot in slots))
        for slot, each in zip(slots, wanted, strict=True):
            made.append(self.worker.arena.rising_reader(slot, each))
        return made

    def rest(self) -> None:
        """All rises end."""
        self.disk.held = False
        self.disk.let(100)
        self.bench.run_until(lambda: not self.bench.parts.moves._rising)
        self.bench.settle()

    def stream(self, cuts: Sequence[int], patience: Callable[[], bool]) -> tuple[int, object]:
        """Read the blocks layer by layer, and see that what came is right."""
        outs = [empty(block) for block in self.blocks]
        stream = LayerStream(self.readers(), outs, [False] * BLOCKS, patience)
        for layers in stream.copy(cuts, lambda _count: None):
            for block, out in zip(self.blocks, outs, strict=True):
                stop = layers * LAYER_BYTES
                assert np.array_equal(out[:stop], block.payload[:stop])
        blocks, error = stream.verdict()
        for block, out in zip(self.blocks[:blocks], outs, strict=False):
            assert np.array_equal(out, block.payload)
        return blocks, error


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Followed]:
    monkeypatch.setattr(moves, "PART_BYTES", PAGE_BYTES)
    made = Followed(tmp_path)
    yield made
    made.rest()
    check(made.bench)
    made.bench.close()


def test_blocks_that_are_followed_rise_side_by_side(followed: Followed) -> None:
    followed.follow()
    followed.step(BLOCKS * PARTS)
    starts = followed.disk.offsets[:BLOCKS]
    pages = [start + page * PAGE_BYTES for page in range(PARTS) for start in starts]
    assert followed.disk.offsets == pages
    followed.rest()
    assert followed.tiers() == ["dram"] * BLOCKS
    assert followed.places() == [None] * BLOCKS


def test_what_is_asked_for_later_rises_later(followed: Followed) -> None:
    disk, blocks = followed.disk, followed.blocks
    disk.held = True
    for last in (1, 3):  # the first two blocks, and then two more
        followed.worker.ring.push(FOLLOW, last + 1, blocks[last].header.key)
        followed.bench.store.tick()
    followed.step(BLOCKS * PARTS)
    slots = [offset // SHAPE.record_bytes for offset in disk.offsets]
    # The disk had begun with the first when the others were asked for.
    assert slots == [*slots[:2] * PARTS, *slots[-2:] * PARTS]
    assert len(set(slots)) == BLOCKS


def test_others_see_a_block_that_rises_as_one_on_flash(followed: Followed) -> None:
    followed.follow()
    followed.step(2 * BLOCKS)
    assert None not in followed.places()
    assert followed.tiers() == ["flash"] * BLOCKS
    first = followed.blocks[0]
    assert followed.worker.index.dram_slot(first.header.key) is None
    assert not followed.worker.reads(first)
    assert followed.worker.index.offered(first.header.key)
    assert followed.bench.store.prefetch(keys_of(followed.blocks)) == BLOCKS
    followed.rest()
    assert all(followed.worker.reads(block) for block in followed.blocks)
    assert followed.bench.parts.placement.counts.flash_read == BLOCKS


def test_a_prefetch_that_nobody_follows_reads_whole_records_and_shows_nothing(
    followed: Followed,
) -> None:
    followed.disk.held = True
    assert followed.bench.store.prefetch(keys_of(followed.blocks)) == BLOCKS
    assert followed.places() == [None] * BLOCKS
    followed.step(BLOCKS)
    followed.rest()
    assert len(followed.disk.offsets) == BLOCKS
    assert followed.tiers() == ["dram"] * BLOCKS


def test_layers_come_while_the_later_ones_still_rise(followed: Followed) -> None:
    followed.follow()
    followed.step(BLOCKS)
    reads: list[int] = []

    def patience() -> bool:
        reads.append(len(followed.disk.offsets))
        followed.disk.let()
        return followed.bench.deliver(0.001) or True

    assert followed.stream((1, 3, 6), patience) == (BLOCKS, None)
    assert min(reads) < 2 * BLOCKS, "a layer was there before all had risen"


def test_who_has_no_patience_gets_nothing_of_what_has_not_risen(followed: Followed) -> None:
    followed.follow()
    followed.step(2 * BLOCKS)
    blocks, error = followed.stream((1, 6), lambda: False)
    assert blocks == 0
    assert isinstance(error, BlockMissing)


@pytest.mark.parametrize("how", ["fails", "damaged", "cleared"])
def test_a_rise_that_comes_to_nothing_is_torn_for_who_follows_it(
    followed: Followed, how: str
) -> None:
    bench, disk = followed.bench, followed.disk
    if how == "damaged":
        location = bench.parts.index.find(followed.blocks[1].header.key)
        assert location is not None
        assert location.flash is not None
        with (bench.config.flash_path / "segment-00000").open("r+b") as file:  # type: ignore[operator]
            file.seek(location.flash * SHAPE.record_bytes + 2 * PAGE_BYTES)
            file.write(b"\x5a" * 64)
    followed.follow()
    followed.step(BLOCKS)
    readers = followed.readers()
    if how == "fails":
        disk.fails = BLOCKS + 1
    followed.step(BLOCKS)
    if how == "cleared":
        assert bench.store.clear(None) > 0
        assert followed.places() == [None] * BLOCKS
    followed.rest()
    disk.fails = None
    outs = [empty(block) for block in followed.blocks]
    stream = LayerStream(readers, outs, [False] * BLOCKS, lambda: False)
    list(stream.copy((1, 6), lambda _count: None))
    blocks, error = stream.verdict()
    assert blocks == {"fails": 1, "damaged": 1, "cleared": 0}[how]
    assert isinstance(error, BlockTorn)
    for block, out in zip(followed.blocks[:blocks], outs, strict=False):
        assert np.array_equal(out, block.payload)
    assert followed.places() == [None] * BLOCKS


def test_a_slot_that_another_block_gets_is_torn_although_it_is_published(
    followed: Followed,
) -> None:
    followed.follow()
    followed.step(BLOCKS)
    readers = followed.readers()
    slots = followed.places()
    followed.bench.store.clear(None)
    followed.rest()
    others = [make_block(900 + n) for n in range(4 * BLOCKS)]
    others = [Block(replace(b.header, parent=bytes(16), depth=0), b.payload) for b in others]
    assert set(followed.worker.put(others)) == {"stored"}
    again = {followed.worker.index.dram_slot(key) for key in keys_of(others)}
    assert again.issuperset(slots)
    for reader in readers:
        with pytest.raises(BlockTorn):
            reader.check(None)


def test_a_block_that_rises_is_not_evicted(followed: Followed) -> None:
    followed.follow()
    followed.step(BLOCKS + 1)
    for first in range(500, 500 + 4 * BLOCKS, BLOCKS):
        followed.worker.put(chain(first, BLOCKS))
    assert None not in followed.places()
    followed.rest()
    assert [tier for tier in followed.tiers() if tier != "dram"] == []
