"""The threads that copy blocks: in, before a computation or beside it, and out."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.loading import LayerLoad
from kvist.cachesvc.worker.storing import StoreItem, StoreResult
from kvist.engine.cache import Cache
from kvist.engine.loading import LoadGate, LoadJob
from kvist.engine.priority import PRIORITIES
from kvist.engine.sequence import Sequence, State
from kvist.engine.sequence_trace import SequenceTrace
from kvist.proto.keys import BlockKey
from kvist.proto.record import Wanted
from kvist.transfer.device import PageCopies

LOADERS = 2
# How long a load may wait for blocks that rise from flash. A block takes 0.5 to 2 ms from a disk
# that is not busy; 2 s cover one that is.
LOAD_BASE_S = 2.0
LOAD_BLOCK_S = 0.01
STORE_BATCH = 128
CLOSE_DRAIN_S = 2.0
CLOSE_JOIN_S = LOAD_BASE_S + 5.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load has ended.

    Attributes:
        sequence: whose; it may have been aborted meanwhile.
        blocks: leading blocks of its `found` that are in its pages, verified.
        reason: why no more, a miss reason; "" when all came.
        seconds: since the load was asked for.
        pages: no longer written to.
        gate: that the sequence had when the load was asked for.
        busy_s: since a thread took it up.
    """

    sequence: Sequence
    blocks: int
    reason: str
    seconds: float
    pages: list[int]
    gate: LoadGate | None = None
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stored:
    """A batch of stores has ended, in so many seconds.

    Attributes:
        tenants: blocks that were whose. traces: of traced requests, their blocks.
    """

    result: StoreResult
    pages: list[int]
    keys: set[BlockKey]
    seconds: float
    tenants: Counter[str]
    began_s: float = 0.0
    traces: Mapping[SequenceTrace, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoreJob:
    """A block to store, the page that it is copied from, whose it is, and whose trace tells of
    it."""

    item: StoreItem
    page: int
    tenant: str
    trace: SequenceTrace | None = None


class _Line:
    """Loads that wait for a thread: those of a higher class first, then in the order in which they
    were asked for. One that a thread has taken up is not put off."""

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[tuple[int, int, LoadJob | None]] = queue.PriorityQueue()
        self._asked = itertools.count()

    def put(self, job: LoadJob) -> None:
        """Queue a load."""
        self._jobs.put((job.sequence.rank, next(self._asked), job))

    def end(self) -> None:
        """One thread gets None when no load is left."""
        self._jobs.put((len(PRIORITIES), next(self._asked), None))

    def get(self) -> LoadJob | None:
        """Wait for the next one."""
        return self._jobs.get()[-1]


class Copiers:
    """The threads and their queues. Every method is for the core's thread.

    Args:
        cache: where blocks come from and go to; not closed here.
        copies: pages of the pool as ends of copies.
        log: where faults of the threads are told.
        now: clock of load deadlines and durations, the same as the cache's.
    """

    def __init__(
        self,
        cache: Cache,
        copies: PageCopies,
        log: Log,
        now: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._copies = copies
        self._log = log
        self._now = now
        self._load_jobs = _Line()
        # Apart: a step waits for these, and the other loaders may be waiting for flash.
        self._layer_jobs = _Line()
        self._store_jobs: queue.SimpleQueue[StoreJob | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Loaded | Stored] = queue.SimpleQueue()
        self._early: deque[Loaded | Stored] = deque()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        targets = [("kvist-load", self._run_loads)] * LOADERS
        targets += [("kvist-layers", self._run_layers), ("kvist-store", self._run_stores)]
        for name, target in targets:
            thread = threading.Thread(target=target, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def load(self, job: LoadJob) -> None:
        """Queue a load; a Loaded comes of it."""
        self._cache.pace.begin_load()
        if job.gate is not None:
            self._layer_jobs.put(job)
            return
        for _ in range(min(LOADERS, len(job.pages))):
            self._load_jobs.put(job)

    def store(self, job: StoreJob) -> None:
        """Queue a store; it is in a Stored later."""
        self._store_jobs.put(job)

    def take(self) -> Loaded | Stored | None:
        """What has ended, in order; None when nothing has."""
        try:
            return self._early.popleft() if self._early else self._results.get_nowait()
        except queue.Empty:
            return None

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to take, or timeout_s have passed."""
        if not self._early:
            try:
                self._early.append(self._results.get(timeout=timeout_s))
            except queue.Empty:
                return

    def close(self) -> None:
        """Let stores drain for CLOSE_DRAIN_S and end the threads."""
        self._store_jobs.put(None)
        self._threads[-1].join(CLOSE_DRAIN_S)
        self._closing.set()
        self._layer_jobs.end()
        for _ in range(LOADERS):
            self._load_jobs.end()
        for thread in self._threads:
            thread.join(CLOSE_JOIN_S)

    # On the threads.

    def _run_loads(self) -> None:
        while (job := self._load_jobs.get()) is not None:
            patience_s = LOAD_BASE_S + LOAD_BLOCK_S * len(job.pages)
            while (taken := job.take(self._now(), patience_s)) is not None:
                block, deadline = taken
                if job.give(block, self._load(job, block, deadline)):
                    self._end(job, job.blocks, job.reason)

    def _run_layers(self) -> None:
        while (job := self._layer_jobs.get()) is not None:
            job.began_s = self._now()
            blocks, reason = self._stream(job)
            self._end(job, blocks, reason)

    def _end(self, job: LoadJob, blocks: int, reason: str) -> None:
        self._cache.pace.end_load()
        now = self._now()
        asked_s, busy_s = now - job.started_s, now - job.began_s
        self._results.put(
            Loaded(job.sequence, blocks, reason, asked_s, job.pages, job.gate, busy_s)
        )
        self._log.detail(
            2, "loaded", request=job.sequence.id, blocks=blocks, of=len(job.pages), seconds=asked_s,
            layers=job.gate is not None, reason=reason or "all",
        )  # fmt: skip
        # Last: who waits at the gate takes the result without waiting for it.
        if job.gate is not None:
            job.gate.end(not reason)

    def _stream(self, job: LoadJob) -> tuple[int, str]:
        """Copy a job's blocks layer by layer: how many came and why no more."""
        assert job.gate is not None
        if self._closing.is_set():
            return 0, "detached"
        reached = functools.partial(_reach, job.gate, self._copies)
        try:
            wanted, outs = [], []
            for block, page in enumerate(job.pages, job.first):
                outs.append(self._copies.target(page))
                wanted.append(self._wanted(job.sequence, block, outs[-1].nbytes))
            return self._cache.stream(LayerLoad(wanted, outs, job.cuts, reached, job.until_s))
        except Exception as error:
            self._log.error("load failed", request=job.sequence.id, error=repr(error))
            return 0, "detached"

    def _load(self, job: LoadJob, block: int, deadline: float) -> str | None:
        """Copy a block of a job; why it did not come, or None."""
        if job.sequence.state is not State.LOADING or self._closing.is_set():
            return "detached"  # aborted: nobody counts it
        try:
            out = self._copies.target(job.pages[block])
            wanted = self._wanted(job.sequence, job.first + block, out.nbytes)
            return self._cache.load(wanted, out, deadline)
        except Exception as error:
            self._log.error("load failed", request=job.sequence.id, error=repr(error))
            return "detached"

    def _wanted(self, sequence: Sequence, block: int, payload_bytes: int) -> Wanted:
        assert sequence.digest is not None
        tokens = sequence.block_tokens_bytes(block)
        return Wanted(sequence.keys()[block], sequence.digest, tokens, payload_bytes)

    def _run_stores(self) -> None:
        more = True
        while more:
            jobs: list[StoreJob] = []
            more = self._take_batch(jobs)
            if not jobs:
                continue
            began_s = self._now()
            if self._closing.is_set():
                result = StoreResult(0, 0, {"closing": len(jobs)})
            else:
                result = self._store_batch([job.item for job in jobs])
                self._tell(jobs, result, self._now() - began_s)
            pages, keys = [job.page for job in jobs], {job.item.key for job in jobs}
            tenants = Counter(job.tenant for job in jobs)
            traces = Counter(job.trace for job in jobs if job.trace is not None)
            seconds = self._now() - began_s
            self._results.put(Stored(result, pages, keys, seconds, tenants, began_s, traces))

    def _tell(self, jobs: list[StoreJob], result: StoreResult, seconds: float) -> None:
        if self._log.shows(2 - bool(result.dropped)):
            requests = ",".join(dict.fromkeys(job.item.request for job in jobs))
            self._log.debug(
                "store incomplete" if result.dropped else "stored", request=requests,
                blocks=len(jobs), stored=result.stored, present=result.present, seconds=seconds,
                **result.dropped,
            )  # fmt: skip

    def _take_batch(self, jobs: list[StoreJob]) -> bool:
        """Wait for a job, take those that are queued behind it; False when no more come."""
        job = self._store_jobs.get()
        while job is not None:
            jobs.append(job)
            if len(jobs) == STORE_BATCH or self._store_jobs.empty():
                return True
            job = self._store_jobs.get()
        return False

    def _store_batch(self, items: list[StoreItem]) -> StoreResult:
        try:
            return self._cache.store(items)
        except Exception as error:
            self._log.error("store failed", blocks=len(items), error=repr(error))
            return StoreResult(0, 0, {"failed": len(items)})


def _reach(gate: LoadGate, copies: PageCopies, layers: int) -> None:
    """The first so many layers have come, or will have when this thread's copies are done."""
    gate.reach(layers, copies.mark())
