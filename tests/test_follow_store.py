"""Blocks that a store lets rise side by side for who follows them, and what becomes of it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sim.blocks import SHAPE, Block, empty, make_block
from sim.stores import Bench, Worker, chain, check, keys_of

from kvist.cachesvc.placing import moves
from kvist.proto.errors import BlockMissing, BlockTorn
from kvist.proto.record import PAGE_BYTES
from kvist.proto.shm import FOLLOW
from kvist.proto.slot import RisingReader
from kvist.tiers.segment import DiskIo
from kvist.transfer.pipeline import LayerStream

BLOCKS = 4
PARTS = SHAPE.record_bytes // PAGE_BYTES
LAYERS = 6
LAYER_BYTES = SHAPE.payload_bytes // LAYERS


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
