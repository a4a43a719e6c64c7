"""Errors that nobody foresaw: they cost a session or a tier for a moment, never a thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from sim.sidecar import QUIET, Prompt, Sidecar, namespace, wait_until
from sim.stores import Bench, chain, check, keys_of, store_settled, worker_of

from kvist.cachesvc.api.calls import Pending
from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.worker.control import GrpcControl
from kvist.proto import cache_pb2
from kvist.tiers.segment import DiskIo


class OddDisk(DiskIo):
    """Raises what no disk raises.

    Attributes:
        broken: operations that do so.
        spared: how many go well before that.
        raised: how often they did not.
    """

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.spared = 0
        self.raised = 0

    def _enter(self, operation: str) -> None:
        if operation in self.broken:
            self.spared -= 1
            if self.spared >= 0:
                return
            self.raised += 1
            raise RuntimeError("a mistake")

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, or raise."""
        self._enter("pread")
        return super().pread(fd, buffers, offset)

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Write, or raise."""
        self._enter("pwrite")
        super().pwrite(fd, buffers, offset)


class OddControl(GrpcControl):
    """Makes a mistake in its first attach, or in its next commit."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.attaches = 0
        self.spoil_commit = False

    def attach(self, request: cache_pb2.AttachRequest) -> cache_pb2.AttachReply:
        """See Control.attach."""
        self.attaches += 1
        if self.attaches == 1:
            raise RuntimeError("a mistake")
        return super().attach(request)

    def commit(self, request: cache_pb2.CommitRequest) -> Pending[cache_pb2.CommitReply]:
        """See Control.commit."""
        if self.spoil_commit:
            self.spoil_commit = False
            raise RuntimeError("a mistake")
        return super().commit(request)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=8, flash_slots=24)
    yield made
    check(made)
    made.close()


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path)
    made.start()
    yield made
    made.close()


def come_back(bench: Bench) -> None:
    """Let the probes find that flash works."""

    def ready() -> bool:
        bench.clock_s += 2.0
        return bench.parts.moves.state == "ready"

    bench.run_until(ready)


def test_a_mistake_while_writing_turns_flash_off_and_the_next_block_sinks(bench: Bench) -> None:
    disk = OddDisk()
    bench.open(disk)
    worker = bench.worker()
    disk.broken = {"pwrite"}
    worker.put(chain(0, 4))
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    bench.settle()
    assert disk.raised
    disk.broken.clear()
    come_back(bench)
    store_settled(bench, worker, 100, 4)
    assert bench.parts.placement.counts.flash_written == 4


def test_a_mistake_while_reading_gives_the_slot_back_and_the_block_rises_later(
    bench: Bench,
) -> None:
    disk = OddDisk()
    bench.open(disk)
    worker = bench.worker()
    for first in (0, 100, 200):
        store_settled(bench, worker, first, 8)
    blocks = chain(0, 4)
    assert bench.tiers(blocks) == ["flash"] * 4
    disk.broken = {"pread"}
    bench.store.prefetch(keys_of(blocks))
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    bench.settle()
    disk.broken.clear()
    come_back(bench)
    bench.store.prefetch(keys_of(blocks))
    bench.run_until(lambda: bench.tiers(blocks) == ["dram"] * 4)
    bench.settle()


def test_a_mistake_in_a_scan_does_not_leave_the_tier_rebuilding_for_good(
    bench: Bench, tmp_path: Path
) -> None:
    store_settled(bench, worker_of(bench), 0, 4)
    bench.close()
    (tmp_path / "flash" / "index.mdb").unlink()
    disk = OddDisk()
    disk.broken, disk.spared = {"pread"}, 1  # that of the opening
    bench.open(disk)
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    disk.broken.clear()
    come_back(bench)
    assert bench.tiers(chain(0, 4)) == ["flash"] * 4


def test_a_mistake_in_a_posted_result_ends_the_store_by_its_next_tick(bench: Bench) -> None:
    store = bench.open()

    def broken() -> None:
        raise AssertionError("a broken invariant")

    store._post(broken)
    with pytest.raises(AssertionError, match="broken invariant"):
        bench.deliver()
    with pytest.raises(AssertionError, match="broken invariant"):
        store.tick()


def test_a_mistake_in_a_session_costs_this_session_only(sidecar: Sidecar) -> None:
    control = OddControl(sidecar.address)
    client = CacheClient(control, namespace(), "odd", QUIET)
    client.start()
    try:
        assert client.wait_attached(10), "the thread that attaches has ended"
    finally:
        client.close()


def test_a_mistake_between_reserve_and_commit_leaves_nothing_reserved(sidecar: Sidecar) -> None:
    control = OddControl(sidecar.address)
    control.attaches = 1
    client = CacheClient(control, namespace(), "odd", QUIET)
    client.start()
    try:
        assert client.wait_attached(10)
        control.spoil_commit = True
        prompt = Prompt(3, 4)
        with pytest.raises(RuntimeError):
            client.store(prompt.items)
        wait_until(lambda: client.reattaches == 1 and client.state == "attached", "a new session")
        wait_until(lambda: client.store(prompt.items).stored == 4, "the slots to come back")
    finally:
        client.close()
