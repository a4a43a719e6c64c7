"""Flash I/O off the service's thread: reads before writes, writes in batches and in order.

One thread at a time writes: a batch of records, then one index transaction. A single writer
reaches the device's rate (1 MiB records: 2.0 GB/s with one thread, 2.2 with four), and what was
queued in order, parents first, is on flash in that order. The other threads read meanwhile, and a
batch ends early when a read waits for a thread. Results are handed to the service's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from kvist.cachesvc.core.host import Threads
from kvist.proto.errors import BlockCorrupt, BlockMissing, FormatRefused, KvistError, TierOffline
from kvist.proto.keys import KEY_BYTES, BlockKey
from kvist.proto.record import BlockHeader, seal
from kvist.proto.slot import payload_of
from kvist.tiers.dram import DramTier
from kvist.tiers.flash import FlashEntry, FlashTier

# Records per index transaction: at 16 of 1 MiB a read waits 8 ms at worst for the only thread,
# and a transaction (0.1 ms and more) costs little beside them.
BATCH_BLOCKS = 16

Record = Future[memoryview]
Post = Callable[[Callable[[], None]], object]


@dataclass(slots=True, eq=False)
class Sink:
    """A block on its way from DRAM to flash.

    The job owns its flash slot, the block its DRAM slot. When the job is cancelled the block may
    be gone and its slot somebody else's; the result is then thrown away.

    Attributes:
        problem: why this block alone could not be written.
        queued_s, began_s, ended_s: when it was queued, and when a thread took it up and was done.
    """

    row: int
    key: BlockKey
    dram_slot: int
    flash_slot: int
    cancelled: bool = False
    problem: KvistError | None = None
    queued_s: float = 0.0
    began_s: float = 0.0
    ended_s: float = 0.0


@dataclass(slots=True, eq=False)
class Rise:
    """A block on its way from flash to DRAM; the job owns its DRAM slot, the block its flash slot.

    Attributes:
        waiters: get the record when it is there, or an error.
        header: what the record said, when it was read.
        problem: why it was not.
        queued_s, began_s, ended_s: see Sink.
    """

    row: int
    key: BlockKey
    flash_slot: int
    dram_slot: int
    waiters: list[Record] = field(default_factory=list)
    cancelled: bool = False
    header: BlockHeader | None = None
    problem: KvistError | None = None
    queued_s: float = 0.0
    began_s: float = 0.0
    ended_s: float = 0.0


def give(waiters: list[Record], dram: DramTier, slot: int) -> None:
    """Answer with a copy of the record in a DRAM slot, or with BlockCorrupt."""
    try:
        header = dram.header(slot)
        view = dram.slot_view(slot)[: header.shape.record_bytes]
        record = np.frombuffer(view, np.uint8).copy().data
        seal(header, payload_of(record, header), record)
    except KvistError as error:
        refuse(waiters, error)
        return
    for waiter in waiters:
        if waiter.set_running_or_notify_cancel():
            waiter.set_result(record)


def refuse(waiters: list[Record], error: KvistError) -> None:
    """Answer with an error."""
    for waiter in waiters:
        if waiter.set_running_or_notify_cancel():
            waiter.set_exception(_bare(error))


def _bare(error: KvistError) -> KvistError:
    """The same error without the frames that it came through: job, error and frames would keep
    each other, and the frames a view of the arena, which then stays mapped after its end.
    """
    return type(error)(*error.args)


def _split(queued: list[bytes]) -> list[BlockKey]:
    packed = b"".join(queued)
    starts = range(0, len(packed), KEY_BYTES)
    return [BlockKey(packed[start : start + KEY_BYTES]) for start in starts]


class Owner(Protocol):
    """Who is told how jobs ended, on the service's thread."""

    def clock(self) -> float:
        """Seconds; asked by any thread."""
        ...

    def risen(self, job: Rise) -> None:
        """A rise has ended."""
        ...

    def sunk(self, jobs: list[Sink], offline: str) -> None:
        """A batch of sinks has ended, in the order of their queueing.

        offline: why none got there; "" when those without a problem did.
        """
        ...


class FlashIo:
    """The queues and their threads. Its methods are called on the service's thread.

    Attributes:
        deletes_asked, deletes_done: calls of delete, and those whose keys are out of the index.

    Args:
        dram, flash: the tiers.
        threads: starts them; io_threads: how many, >= 1.
        post: runs a callable on the service's thread.
        owner: is told how jobs ended.
    """

    def __init__(
        self,
        dram: DramTier,
        flash: FlashTier,
        threads: Threads,
        io_threads: int,
        post: Post,
        owner: Owner,
    ) -> None:
        self._dram = dram
        self._flash = flash
        self._post = post
        self._owner = owner
        self._wake = threads.condition()
        self._reads: deque[Callable[[], None]] = deque()
        self._sinks: deque[Sink] = deque()
        self._deletes: list[bytes] = []
        self.deletes_asked = self.deletes_done = 0
        self._idle = 0
        self._broken = False
        self._writing = False
        self._closing = False
        self._threads = [
            threads.start(self._work, f"kvist-flash-{number}") for number in range(io_threads)
        ]

    def rise(self, job: Rise) -> None:
        """Queue a read."""
        job.queued_s = self._owner.clock()
        self._run(partial(self._rise, job))

    def probe(self, done: Callable[[bool], None]) -> None:
        """Look soon whether the device works; done is told so on the service's thread."""
        self._run(partial(self._probe, done))

    def sink(self, job: Sink) -> None:
        """Queue a write; after those queued before."""
        job.queued_s = self._owner.clock()
        with self._wake:
            self._sinks.append(job)
            self._wake.notify()

    def delete(self, keys: bytes) -> None:
        """Take blocks out of the flash index before anything that is queued later is written.

        What waits goes in one transaction; a batch that fails keeps its keys for the next one.

        Args:
            keys: of one block or more, one after the other.
        """
        with self._wake:
            self.deletes_asked += 1
            self._deletes.append(keys)
            self._wake.notify()

    def undeleted(self) -> frozenset[BlockKey]:
        """Keys that delete was told and that may still be in the flash index."""
        with self._wake:
            return frozenset(_split(self._deletes))

    def _run(self, task: Callable[[], None]) -> None:
        with self._wake:
            self._reads.append(task)
            self._wake.notify()

    def close(self) -> None:
        """Write what is queued, forget the reads, end the threads."""
        with self._wake:
            self._reads.clear()
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                task = self._next_task()
                while task is None:
                    if self._closing:
                        return
                    self._idle += 1
                    self._wake.wait()
                    self._idle -= 1
                    task = self._next_task()
            task()

    def _next_task(self) -> Callable[[], None] | None:
        if self._reads:
            return self._reads.popleft()
        # Deletes alone wait while the device is off: there is nothing they must go before.
        off = self._broken or self._flash.failure
        if not self._writing and (self._sinks or (self._deletes and not off)):
            self._writing = True
            return self._write_batch
        return None

    def _rise(self, job: Rise) -> None:
        job.began_s = self._owner.clock()
        if not job.cancelled:
            try:
                into = self._dram.slot_view(job.dram_slot)
                job.header = self._flash.read_record(job.flash_slot, into)
            except KvistError as error:
                job.problem = _bare(error)
            except Exception as error:  # our mistake; it must not end the thread for good
                job.problem = TierOffline(f"reading failed: {error!r}")
        job.ended_s = self._owner.clock()
        self._post(partial(self._owner.risen, job))

    def _probe(self, done: Callable[[bool], None]) -> None:
        try:
            works = self._flash.probe()
        except Exception:  # ours again; asked anew in a moment
            works = False
        self._post(partial(done, works))

    def _write_batch(self) -> None:
        jobs: list[Sink] = []
        written: list[tuple[Sink, FlashEntry]] = []
        offline = ""
        self._broken = False
        try:
            self._delete_queued()
            while (job := self._next_sink(len(jobs))) is not None:
                jobs.append(job)
                job.began_s = self._owner.clock()
                # What was evicted to make room for this job was queued before it.
                self._delete_queued()
                written += self._write(job)
                job.ended_s = self._owner.clock()
            self._put(written)
        except TierOffline as error:
            offline = str(error)
        except Exception as error:  # our mistake; it must not end the only writer for good
            offline = f"writing failed: {error!r}"
            self._broken = True
        with self._wake:
            self._writing = False
            if offline:  # what is queued would fare no better
                jobs += self._sinks
                self._sinks.clear()
            self._wake.notify()
        if jobs or offline:
            self._post(partial(self._owner.sunk, jobs, offline))

    def _next_sink(self, taken: int) -> Sink | None:
        with self._wake:
            read_waits = self._reads and not self._idle
            if taken == BATCH_BLOCKS or read_waits or not self._sinks:
                return None
            return self._sinks.popleft()

    def _delete_queued(self) -> None:
        with self._wake:
            queued = list(self._deletes)
        if queued:
            self._flash.index_delete(_split(queued))
            with self._wake:
                self.deletes_done += len(queued)
                del self._deletes[: len(queued)]

    def _write(self, job: Sink) -> list[tuple[Sink, FlashEntry]]:
        """Write a record; the entry to put into the index, or nothing."""
        if job.cancelled:
            return []
        try:
            header = self._dram.header(job.dram_slot)
            if header.key != job.key:
                raise BlockCorrupt("the slot holds another block")
            record = self._dram.slot_view(job.dram_slot)[: header.shape.record_bytes]
            self._flash.write_record(job.flash_slot, record)
        except (BlockMissing, BlockCorrupt, FormatRefused) as error:
            job.problem = _bare(error)
            return []
        entry = FlashEntry(
            job.flash_slot, header.key, header.parent, header.namespace, header.depth,
            header.payload_bytes, header.shape.block_tokens,
        )  # fmt: skip
        return [(job, entry)]

    def _put(self, written: list[tuple[Sink, FlashEntry]]) -> None:
        if written:
            self._flash.index_put([entry for _, entry in written])
