"""The one file that knows there is a cache: finds, loads and stores blocks beside the steps.

Two threads copy blocks in, one copies them out; the core's thread only queues work and takes
results, so no step waits for a copy. A page that a thread copies is pinned until the thread is
done with it. What fails is a miss or a dropped store, never an error of a request.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Blocks
from dataclasses import dataclass

from kvist.cachesvc.log import Log
from kvist.cachesvc.storing import StoreItem, StoreResult
from kvist.engine.cache import Cache
from kvist.engine.flights import Flights
from kvist.engine.loading import LoadJob
from kvist.engine.pages import Pages
from kvist.engine.request import CACHE_BYPASS
from kvist.engine.sequence import Sequence, State
from kvist.engine.tally import Tally, outcome
from kvist.proto.keys import BlockKey, tenant_of
from kvist.proto.record import Bytes, Wanted
from kvist.proto.shm import STORABLE

LOADERS = 2
# How long a load may wait for blocks that rise from flash. A block takes 0.5 to 2 ms from a disk
# that is not busy; 2 s cover one that is.
LOAD_BASE_S = 2.0
LOAD_BLOCK_S = 0.01
STORE_BATCH = 128
# Pages pinned by stores are lost to requests meanwhile: a quarter of the pool at most.
STORE_QUEUE_BLOCKS = 256
STORE_POOL_SHARE = 4
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
    """

    sequence: Sequence
    blocks: int
    reason: str
    seconds: float
    pages: list[int]


@dataclass(frozen=True, slots=True)
class _Stored:
    result: StoreResult
    pages: list[int]


@dataclass(frozen=True, slots=True)
class _StoreJob:
    item: StoreItem
    page: int


class Connector:
    """Cache and pool, joined. Used by the core's thread only.

    Args:
        cache: None when there is no cache beyond the pool; closed by close.
        page_bytes: a page of the pool as writable bytes that share its memory.
        pages: the pool's books.
        log: where faults of the threads are told.
        now: clock of load deadlines and durations, the same as the cache's.

    Attributes:
        tally: of the lookups.
        stored_blocks: blocks committed.
        store_drops: reason -> blocks not stored.
        load_seconds: summed over loads.
        copying: jobs under way; their results come by poll.
    """

    def __init__(
        self,
        cache: Cache | None,
        page_bytes: Callable[[int], Bytes],
        pages: Pages,
        log: Log,
        now: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._page_bytes = page_bytes
        self._pages = pages
        self._log = log
        self._now = now
        self._store_room = min(STORE_QUEUE_BLOCKS, pages.total // STORE_POOL_SHARE)
        self._load_jobs: queue.SimpleQueue[LoadJob | None] = queue.SimpleQueue()
        self._store_jobs: queue.SimpleQueue[_StoreJob | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Loaded | _Stored] = queue.SimpleQueue()
        self._early: deque[Loaded | _Stored] = deque()
        self._closing = threading.Event()
        self.tally = Tally()
        self.stored_blocks = 0
        self.store_drops: Counter[str] = Counter()
        self.load_seconds = 0.0
        self.copying = 0
        self._threads: list[threading.Thread] = []
        self._flights = None if cache is None else Flights(cache, now)
        if cache is not None:
            self._start(cache)

    @property
    def state(self) -> str:
        """ "off", "attached" or "detached"."""
        return "off" if self._cache is None else self._cache.state

    @property
    def reattaches(self) -> int:
        """Sessions that followed an earlier one."""
        return 0 if self._cache is None else self._cache.reattaches

    @property
    def deferred(self) -> int:
        """Requests that wait for blocks of another engine."""
        return 0 if self._flights is None else self._flights.waiting

    def defers(self, sequence: Sequence, blocks: int) -> bool:
        """See scheduler.Finder and flights.Flights."""
        if self._flights is None or not sequence.reuses:
            return False
        return self._flights.defers(sequence, blocks)

    def arrive(self, sequence: Sequence) -> None:
        """A request has come: what of it is on flash begins to rise while it waits its turn."""
        if self._cache is None or not sequence.reuses:
            return
        keys = sequence.keys()[: sequence.usable_blocks]
        keys = keys[len(self._pages.lookup(keys)) :]
        blocks = self._cache.lookup(keys).blocks
        # Blocks leave DRAM deepest first, so the last one tells whether any is on flash only.
        if "flash" in self._cache.tiers(keys[blocks - 1 : blocks]):
            self._cache.prefetch(keys, blocks)

    def find(self, sequence: Sequence, blocks: int) -> None:
        """See scheduler.Finder. A lookup that needs no load is counted here."""
        if sequence.request.cache == CACHE_BYPASS:
            return
        sequence.found_end = "no_cache"
        if self._cache is not None and sequence.reuses:
            self._find(self._cache, sequence, blocks)
        if not sequence.found:
            self._count(sequence, 0, "")
            if self._flights is not None and sequence.reuses:
                self._flights.computing(sequence)

    def load(self, sequence: Sequence) -> None:
        """Begin to copy a sequence's found blocks into its pages."""
        assert self._cache is not None
        first, count = sequence.registered, len(sequence.found)
        pages = sequence.pages[first : first + count]
        self._pages.pin(pages)
        self.copying += 1
        self._prefetch(sequence.keys()[first : first + count], sequence.found)
        job = LoadJob(sequence, first, pages, self._now())
        if self._flights is not None:
            self._flights.computing(sequence, count)
        for _ in range(min(LOADERS, count)):
            self._load_jobs.put(job)

    def store(self, sequence: Sequence, blocks: Iterable[int]) -> None:
        """Queue complete blocks; what finds no room is dropped, and so are the blocks after it.

        Args:
            sequence: holds the blocks' pages.
            blocks: registered ones, in order, following those that were stored before.
        """
        if self._cache is None or self._flights is None:
            return
        for block in blocks:
            reason = self._refusal(sequence, self._cache)
            if reason:
                sequence.store_stopped = True
                self.store_drops[reason] += 1
                self._flights.dropped(sequence, block)
                continue
            page = sequence.pages[block]
            self._pages.pin((page,))
            self._store_room -= 1
            self.copying += 1
            self._store_jobs.put(_StoreJob(self._item(sequence, block, page), page))
        if sequence.reuses:
            self._flights.computing(sequence)

    def poll(self) -> list[Loaded]:
        """Take what the threads have finished: pages are unpinned, lookups counted."""
        if self._flights is not None:
            self._flights.prune()
        loads: list[Loaded] = []
        while True:
            try:
                result = self._early.popleft() if self._early else self._results.get_nowait()
            except queue.Empty:
                return loads
            self._pages.unpin(result.pages)
            if isinstance(result, Loaded):
                self.copying -= 1
                self.load_seconds += result.seconds
                if result.sequence.state is State.LOADING:
                    self._count(result.sequence, result.blocks, result.reason)
                    loads.append(result)
            else:
                self.copying -= len(result.pages)
                self._store_room += len(result.pages)
                self.stored_blocks += result.result.stored
                self.store_drops.update(result.result.dropped)

    def wait(self, timeout_s: float) -> None:
        """Wait until poll has something to take, or timeout_s have passed."""
        if not self._early:
            try:
                self._early.append(self._results.get(timeout=timeout_s))
            except queue.Empty:
                return

    def close(self) -> None:
        """Let stores drain for CLOSE_DRAIN_S, end the threads, detach."""
        if self._cache is None:
            return
        *loaders, storer = self._threads
        self._store_jobs.put(None)
        storer.join(CLOSE_DRAIN_S)
        self._closing.set()
        for _ in loaders:
            self._load_jobs.put(None)
        for thread in self._threads:
            thread.join(CLOSE_JOIN_S)
        self._cache.close()

    # On the core's thread.

    def _start(self, cache: Cache) -> None:
        targets = [("kvist-load", self._run_loads)] * LOADERS + [("kvist-store", self._run_stores)]
        for name, target in targets:
            thread = threading.Thread(target=target, args=(cache,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _find(self, cache: Cache, sequence: Sequence, blocks: int) -> None:
        """Look up what the pool lacks. The block before it is asked for as well: it tells
        whether the cache still has the prefix that the pool has, and can take what follows."""
        keys = sequence.keys()[: sequence.usable_blocks]
        known = 1 if blocks else 0
        asked = keys[blocks - known :]
        found = cache.lookup(asked, None if known else self._first(sequence))
        sequence.found = cache.tiers(asked[: found.blocks])[known:]
        # Should a found block be gone before its tier was read, it was evicted in between.
        sequence.found_end = found.reason or "evicted"
        if sequence.flight_late and found.reason in STORABLE:
            sequence.found_end = "flight_late"
        if known and not found.blocks and found.reason in STORABLE:
            # Dropped, evicted, damaged, or the sidecar began anew; without this no child of the
            # prefix could be stored for as long as the pool has it.
            self.store(sequence, range(cache.lookup(keys[:blocks]).blocks, blocks))

    def _first(self, sequence: Sequence) -> tuple[bytes, bytes] | None:
        """Origin and namespace of a sequence's first block, if it has a full one."""
        if sequence.digest is None or not sequence.keys():
            return None
        return sequence.origin(), sequence.digest

    def _prefetch(self, keys: Blocks[BlockKey], tiers: Blocks[str]) -> None:
        if self._cache is not None and "flash" in tiers:
            self._cache.prefetch(keys, len(tiers))

    def _refusal(self, sequence: Sequence, cache: Cache) -> str:
        if sequence.store_stopped:
            return "no_parent"
        if cache.state != "attached":
            return "detached"
        return "" if self._store_room > 0 else "queue_full"

    def _item(self, sequence: Sequence, block: int, page: int) -> StoreItem:
        assert sequence.digest is not None
        return StoreItem(
            key=sequence.keys()[block],
            parent=sequence.parent(block),
            namespace=sequence.digest,
            depth=block,
            tokens=sequence.block_tokens_bytes(block),
            payload=self._page_bytes(page),
            origin=b"" if block else sequence.origin(),
            tenant="" if block else tenant_of(sequence.request.cache_salt),
        )

    def _count(self, sequence: Sequence, loaded: int, reason: str) -> None:
        """Count a request's lookup, at its first admission only; see tally.outcome."""
        if sequence.counted:
            return
        lookup = outcome(sequence, loaded, reason)
        sequence.counted, sequence.cached = True, lookup.cached
        self.tally.add(lookup)
        if self._cache is not None:
            self._cache.count(lookup.requested, lookup.hits, lookup.misses)
            blocks = sequence.registered + loaded
            self._cache.touch(sequence.keys(), blocks, sequence.request.hint)

    # On threads of their own.

    def _run_loads(self, cache: Cache) -> None:
        while (job := self._load_jobs.get()) is not None:
            patience_s = LOAD_BASE_S + LOAD_BLOCK_S * len(job.pages)
            while (taken := job.take(self._now(), patience_s)) is not None:
                block, deadline = taken
                if job.give(block, self._load(cache, job, block, deadline)):
                    seconds = self._now() - job.started_s
                    result = Loaded(job.sequence, job.blocks, job.reason, seconds, job.pages)
                    self._results.put(result)

    def _load(self, cache: Cache, job: LoadJob, block: int, deadline: float) -> str | None:
        """Copy a block of a job; why it did not come, or None."""
        if job.sequence.state is not State.LOADING or self._closing.is_set():
            return "detached"  # aborted: nobody counts it
        try:
            page = job.pages[block]
            return self._load_block(cache, job.sequence, job.first + block, page, deadline)
        except Exception as error:
            self._log.error("load failed", request=job.sequence.id, error=repr(error))
            return "detached"

    def _load_block(
        self, cache: Cache, sequence: Sequence, block: int, page: int, deadline: float
    ) -> str | None:
        assert sequence.digest is not None
        out = self._page_bytes(page)
        key, tokens = sequence.keys()[block], sequence.block_tokens_bytes(block)
        return cache.load(Wanted(key, sequence.digest, tokens, out.nbytes), out, deadline)

    def _run_stores(self, cache: Cache) -> None:
        more = True
        while more:
            jobs: list[_StoreJob] = []
            more = self._take_batch(jobs)
            if not jobs:
                continue
            if self._closing.is_set():
                result = StoreResult(0, 0, {"closing": len(jobs)})
            else:
                result = self._store_batch(cache, [job.item for job in jobs])
            self._results.put(_Stored(result, [job.page for job in jobs]))

    def _take_batch(self, jobs: list[_StoreJob]) -> bool:
        """Wait for a job, take those that are queued behind it; False when no more come."""
        job = self._store_jobs.get()
        while job is not None:
            jobs.append(job)
            if len(jobs) == STORE_BATCH or self._store_jobs.empty():
                return True
            job = self._store_jobs.get()
        return False

    def _store_batch(self, cache: Cache, items: list[StoreItem]) -> StoreResult:
        try:
            return cache.store(items)
        except Exception as error:
            self._log.error("store failed", blocks=len(items), error=repr(error))
            return StoreResult(0, 0, {"failed": len(items)})
