"""In which order flash I/O happens: reads before writes, writes in batches with one transaction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import pytest
from sim.blocks import SLOT_BYTES, make_block

from kvist.cachesvc.core.host import Threads
from kvist.cachesvc.flash.flashio import BATCH_BLOCKS, FlashIo, Rise, Sink
from kvist.tiers.dram import DramTier
from kvist.tiers.flash import FlashEntry, FlashTier
from kvist.tiers.segment import DiskIo

BLOCKS = 24


class GatedDisk(DiskIo):
    """Notes what it is asked for, and holds writes until told.

    Attributes:
        asked: "read", "write" and "index N" for N entries, in their order.
        arrived: a write is held.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.arrived = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read."""
        self.asked.append("read")
        return super().pread(fd, buffers, offset)

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Write, when it may."""
        self.asked.append("write")
        self.arrived.set()
        assert self.gate.wait(20.0)
        super().pwrite(fd, buffers, offset)

    def hold(self) -> None:
        """Let no write through, from the next one on."""
        self.asked.clear()
        self.arrived.clear()
        self.gate.clear()


class Mover:
    """Blocks in DRAM, a flash tier, and what the I/O threads say."""

    def __init__(self, folder: Path, io_threads: int) -> None:
        self.disk = GatedDisk()
        self.dram = DramTier(folder / "arena", 2 * BLOCKS, SLOT_BYTES)
        flash = FlashTier.open(folder / "flash", BLOCKS * SLOT_BYTES, SLOT_BYTES, self.disk)
        self.flash: FlashTier = flash
        self.posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.sunk_keys: list[bytes] = []
        self.risen_keys: list[bytes] = []
        index_put = flash.index_put

        def put(entries: Sequence[FlashEntry]) -> None:
            self.disk.asked.append(f"index {len(entries)}")
            index_put(entries)

        flash.index_put = put  # type: ignore[method-assign]
        for number in range(BLOCKS):
            block = make_block(number)
            self.dram.write(self.dram.allocate(), block.header, block.payload)
            assert flash.allocate() == number
        self.io = FlashIo(self.dram, flash, Threads(), io_threads, self.posted.put, self)

    def clock(self) -> float:
        """See flashio.Owner."""
        return time.monotonic()

    def close(self) -> None:
        """End the threads, let files and memory go."""
        self.io.close()
        self.flash.close()
        self.dram.close()

    def sink(self, number: int) -> None:
        """Queue a block to sink."""
        self.io.sink(Sink(number, make_block(number).header.key, number, number))

    def rise(self, number: int) -> None:
        """Queue a block to rise."""
        key = make_block(number).header.key
        self.io.rise(Rise(number, key, number, BLOCKS + number))

    def sunk(self, jobs: list[Sink], offline: str) -> None:
        """See flashio.Owner."""
        assert not offline
        assert not [job.problem for job in jobs if job.problem]
        self.sunk_keys += [job.key for job in jobs]

    def risen(self, job: Rise) -> None:
        """See flashio.Owner."""
        assert job.problem is None
        self.risen_keys.append(job.key)

    def wait(self, sunk: int, risen: int = 0) -> None:
        """Until so many are."""
        while len(self.sunk_keys) < sunk or len(self.risen_keys) < risen:
            self.posted.get(timeout=20.0)()


@pytest.fixture(params=[1, 2])
def mover(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mover]:
    made = Mover(tmp_path, request.param)
    yield made
    made.disk.gate.set()
    made.io.close()
    made.flash.close()
    made.dram.close()


def test_what_waits_is_written_in_order_with_one_transaction_a_batch(mover: Mover) -> None:
    mover.disk.hold()
    for number in range(BLOCKS):
        mover.sink(number)
    assert mover.disk.arrived.wait(20.0)
    mover.disk.gate.set()
    mover.wait(BLOCKS)
    rest = BLOCKS - BATCH_BLOCKS
    assert mover.disk.asked == [
        *["write"] * BATCH_BLOCKS, f"index {BATCH_BLOCKS}", *["write"] * rest, f"index {rest}",
    ]  # fmt: skip
    assert mover.sunk_keys == [make_block(number).header.key for number in range(BLOCKS)]


def test_a_read_waits_for_one_write_at_most(tmp_path: Path) -> None:
    mover = Mover(tmp_path, io_threads=1)
    mover.sink(0)
    mover.wait(1)
    mover.disk.hold()
    for number in range(1, 9):
        mover.sink(number)
    assert mover.disk.arrived.wait(20.0)
    mover.rise(0)
    mover.disk.gate.set()
    mover.wait(9, risen=1)
    assert mover.disk.asked == ["write", "index 1", "read", *["write"] * 7, "index 7"]
    mover.close()


def test_a_second_thread_reads_while_the_first_one_writes(tmp_path: Path) -> None:
    mover = Mover(tmp_path, io_threads=2)
    mover.sink(0)
    mover.wait(1)
    mover.disk.hold()
    for number in range(1, 9):
        mover.sink(number)
    assert mover.disk.arrived.wait(20.0)
    mover.rise(0)
    mover.wait(1, risen=1)
    assert mover.disk.asked == ["write", "read"], "nobody else writes meanwhile"
    mover.disk.gate.set()
    mover.wait(9)
    mover.close()
