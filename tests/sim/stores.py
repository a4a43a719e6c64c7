"""A store driven by hand: posted results and time move when the test says so; and its workers."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.catalog.index import IndexReader
from kvist.cachesvc.catalog.trees import tree
from kvist.cachesvc.core.host import Host
from kvist.cachesvc.core.parts import Parts
from kvist.cachesvc.core.store import Reserved, Store, StoreConfig
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.ring import RingWriter
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.record import RecordShape
from kvist.tiers.segment import DiskIo
from kvist.transfer.shm import ArenaMap
from sim.blocks import NAMESPACE, SHAPE, SLOT_BYTES, Block, empty, make_block

WAIT_S = 20.0


def tree_block(
    number: int,
    parent: Block | None = None,
    namespace: bytes = NAMESPACE,
    shape: RecordShape = SHAPE,
) -> Block:
    """The block of a number, on top of a parent, or a first block."""
    block = make_block(number, shape)
    header = replace(
        block.header,
        parent=parent.header.key if parent else NO_KEY,
        depth=parent.header.depth + 1 if parent else 0,
        namespace=namespace,
    )
    return Block(header, block.payload)


def chain(first: int, length: int, below: Block | None = None) -> list[Block]:
    """Blocks first, first + 1, ... that stand on each other."""
    blocks: list[Block] = []
    for number in range(first, first + length):
        below = tree_block(number, below)
        blocks.append(below)
    return blocks


def keys_of(blocks: Sequence[Block]) -> list[BlockKey]:
    return [block.header.key for block in blocks]


class Worker:
    """An attached worker, in this process: what it maps and what it does with it."""

    def __init__(self, store: Store, shape: RecordShape = SHAPE) -> None:
        self.store = store
        info = self.info = store.attach("worker", 1, NAMESPACE, "test", shape)
        self.ring = RingWriter(info.ring_path)
        self.arena = ArenaMap(info.arena_path, info.slot_bytes, info.dram_slots)
        self.index = IndexReader(info.index_path)

    def reserve(self, blocks: Sequence[Block]) -> list[Reserved]:
        names = [(block.header.key, block.header.parent) for block in blocks]
        return self.store.reserve(self.info.session, names)

    def fill(self, slot: int, block: Block) -> None:
        self.arena.fill(slot, block.header, block.payload)

    def commit(self, slots: Sequence[int]) -> list[bool]:
        return [not loss for loss in self.store.commit(self.info.session, slots)]

    def put(self, blocks: Sequence[Block]) -> list[str]:
        """Reserve, fill and commit; what became of each block."""
        answers = self.reserve(blocks)
        filled = []
        for answer, block in zip(answers, blocks, strict=True):
            if answer.slot is not None:
                self.fill(answer.slot, block)
                filled.append(answer.slot)
        committed = dict(zip(filled, self.commit(filled), strict=True))
        return [
            answer.reason or answer.outcome
            if answer.slot is None
            else ("stored" if committed[answer.slot] else "lost")
            for answer in answers
        ]

    def reads(self, block: Block) -> bool:
        """Whether the block is in DRAM and right; wrong bytes are never served."""
        location = self.index.find(block.header.key)
        if location is None or location.dram is None:
            return False
        out = empty(block)
        self.arena.read(location.dram, block.wanted, out)
        assert np.array_equal(out, block.payload)
        return True

    def close(self) -> None:
        self.store.session_closed(self.info.session)
        self.index.close()
        self.arena.close()
        self.ring.close()


class Bench:
    """A store and its surroundings.

    Attributes:
        clock_s: what the store takes for the time.
    """

    def __init__(self, folder: Path, dram_slots: int = 16, flash_slots: int = 0) -> None:
        self.config = StoreConfig(
            run_dir=folder / "run",
            shm_dir=folder / "shm",
            dram_bytes=dram_slots * SLOT_BYTES,
            flash_path=folder / "flash" if flash_slots else None,
            flash_bytes=flash_slots * SLOT_BYTES,
            slot_bytes=SLOT_BYTES,
            flash_admission="always",
            reservation_share=1.0,
            prefault=False,
        )
        self.clock_s = 1000.0
        self._posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._workers: list[Worker] = []

    def open(self, disk: DiskIo | None = None, **changes: object) -> Store:
        self.config = replace(self.config, **changes)  # type: ignore[arg-type]
        log, host = Log(sys.stderr, "error"), Host(disk=disk or DiskIo())
        self.store = Store(self.config, self._posted.put, lambda: self.clock_s, log, host=host)
        self.store.open()
        return self.store

    def worker(self, shape: RecordShape = SHAPE) -> Worker:
        worker = Worker(self.store, shape)
        self._workers.append(worker)
        return worker

    @property
    def parts(self) -> Parts:
        return self.store._made

    def deliver(self, wait_s: float = 0.0) -> bool:
        """Run one posted result, if there is one."""
        try:
            self._posted.get(timeout=wait_s)() if wait_s else self._posted.get_nowait()()
        except Empty:
            return False
        return True

    def run_until(self, reached: Callable[[], bool]) -> None:
        """Tick and deliver until something is so."""
        deadline = time.monotonic() + WAIT_S
        while not reached():
            assert time.monotonic() < deadline, "it did not come to that"
            self.store.tick()
            self.deliver(0.01)

    def settle(self) -> None:
        """Until nothing moves."""
        self.run_until(lambda: not self.parts.moves.busy)
        while self.deliver():
            pass

    def tiers(self, blocks: Sequence[Block]) -> list[str]:
        return self.store.lookup(keys_of(blocks))[0]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        self.store.close()
        while self.deliver():
            pass


def worker_of(bench: Bench) -> Worker:
    bench.open()
    return bench.worker()


def in_pieces(bench: Bench, blocks: int) -> Worker:
    """Open the store; no piece of what is dropped by and by is longer than so many blocks."""
    worker = worker_of(bench)
    bench.parts.moves.clearing.step_blocks = blocks
    return worker


def store_settled(bench: Bench, worker: Worker, first: int, length: int) -> list[BlockKey]:
    """Store a chain, a few blocks at a time so that each has room to sink; its keys."""
    blocks = chain(first, length)
    for start in range(0, length, 4):
        assert set(worker.put(blocks[start : start + 4])) == {"stored"}
        bench.settle()
    return keys_of(blocks)


def comes_back(bench: Bench) -> None:
    """Until flash is ready again, and what was on it is known."""

    def ready() -> bool:
        bench.clock_s += 2.0
        return bench.parts.moves.state == "ready"

    bench.run_until(ready)


def check(bench: Bench) -> None:
    """Everything that must hold between two calls of a store."""
    parts = bench.parts
    placement, blocks, index = parts.placement, parts.placement.blocks, parts.index
    rows = [row for row in range(index.rows) if not index.is_free(row)]
    hidden = index.hidden.of
    assert len(rows) == len(blocks) + sum(map(bool, hidden))
    assert not any(hidden) or parts.moves.clearing.busy
    children = dict.fromkeys(rows, 0)
    in_dram, on_flash = dict(children), dict(children)
    for row in rows:
        parent = blocks.parent[row]
        assert (index.locate(index.key(row)) == row) == (not hidden[row])
        is_cut_off = parent == NO_ROW and hidden[row]
        assert is_cut_off or blocks.depth[row] == (
            0 if parent == NO_ROW else blocks.depth[parent] + 1
        )
        if parent == NO_ROW:
            continue
        assert parent in children, "a block without the one before it"
        children[parent] += 1
        in_dram[parent] += index.dram(row) is not None
        on_flash[parent] += blocks.reaches_flash(row)
        assert not blocks.reaches_flash(row) or blocks.reaches_flash(parent)
    for row in rows:
        assert len(tree(blocks, row)) > children[row]
        assert blocks.dram_children[row] == in_dram[row]
        assert blocks.flash_children[row] == on_flash[row]
        if placement.may_leave_dram(row):
            assert row in placement._dram_leaves, "a leaf that eviction does not know"
        if placement.may_leave_flash(row):
            assert placement._flash_leaves is not None
            assert row in placement._flash_leaves, "a leaf that eviction does not know"
    held = [each for session in bench.store._sessions.each() for each in session.reserved.values()]
    awaited = Counter(each.parent for each in held if each.parent != NO_KEY)
    assert bench.store._sessions._awaited == awaited
    check_slots(bench, rows)


def check_slots(bench: Bench, rows: Sequence[int]) -> None:
    """No slot is lost and none is used twice."""
    parts = bench.parts
    index, jobs = parts.index, parts.placement.jobs
    dram = [slot for row in rows if (slot := index.dram(row)) is not None]
    dram += [slot for each in bench.store._sessions.each() for slot in each.reserved]
    dram += [job.dram_slot for job in jobs.values() if hasattr(job, "waiters")]
    assert len(set(dram)) == len(dram)
    assert parts.dram.slots - parts.dram.free_slots >= len(dram)
    if parts.flash is not None and not parts.flash.needs_rebuild:
        flash = [slot for row in rows if (slot := index.flash(row)) is not None]
        flash += [job.flash_slot for job in jobs.values() if not hasattr(job, "waiters")]
        assert len(set(flash)) == len(flash)
        assert parts.flash.slots - parts.flash.free_slots >= len(flash)
        if not parts.moves._sinking:
            lost = parts.flash._free.doomed.difference(flash)
            assert parts.flash.slots - parts.flash.free_slots - len(lost) == len(flash)
    if not parts.moves._rising:
        lost = parts.dram._free.doomed.difference(dram)
        assert parts.dram.slots - parts.dram.free_slots - len(lost) == len(dram)
