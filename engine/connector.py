"""The one file that knows there is a cache: finds, loads and stores blocks beside the steps.

The core's thread only queues work for the threads that copy (engine/copying) and takes results.
A page that a thread copies is pinned until the thread is done with it. What fails is a miss or a
dropped store, never an error of a request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Blocks

from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.cache import Cache
from kvist.engine.copying import Copiers, Loaded, StoreJob
from kvist.engine.flights import Flights
from kvist.engine.loading import LoadJob
from kvist.engine.pages import Pages
from kvist.engine.request import CACHE_BYPASS, LoadStats
from kvist.engine.rising import Rising
from kvist.engine.sequence import Sequence, State
from kvist.engine.step import Work
from kvist.engine.tally import Tally, outcome
from kvist.engine.weighing import Weigher, asked_blocks
from kvist.proto.keys import BlockKey
from kvist.proto.shm import STORABLE
from kvist.proto.trace import SpanNote
from kvist.transfer.device import PageCopies

# Pages pinned by stores are lost to requests meanwhile: a quarter of the pool at most.
STORE_QUEUE_BLOCKS = 256
STORE_POOL_SHARE = 4
# Rates are means over many requests; whoever looks at them is a person or a scrape.
SHOW_EVERY_S = 0.5
# How often a core that has nothing else to do looks whether one can be let in whose blocks rise.
LOOK_S = 0.0007


class Connector:
    """Cache and pool, joined. Used by the core's thread only.

    Args:
        cache: None when there is no cache beyond the pool; closed by close.
        copies: pages of the pool as ends of copies.
        pages: the pool's books.
        log: where faults of the threads are told.
        now: clock of load deadlines and durations, the same as the cache's.

    Attributes:
        tally: of the lookups.
        stored_blocks: blocks committed.
        store_drops: reason -> blocks not stored.
        load_seconds: summed over loads.
        copying: jobs under way; their results come by poll.
        notes: of traces, for whoever sends them on and clears them.
        weigher: chooses what is loaded and how; None loads all, before the computation. Set once.
    """

    def __init__(
        self,
        cache: Cache | None,
        copies: PageCopies,
        pages: Pages,
        log: Log,
        now: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._copies = copies
        self._pages = pages
        self._now = now
        self._store_room = max(1, min(STORE_QUEUE_BLOCKS, pages.total // STORE_POOL_SHARE))
        self.tally = Tally()
        self.stored_blocks = 0
        self.store_drops: Counter[str] = Counter()
        self.load_seconds = 0.0
        self.copying = 0
        self.notes: list[SpanNote] = []
        self._storing: set[BlockKey] = set()
        self.weigher: Weigher | None = None
        self._shown_s = self._told_s = now()
        self._flights = None if cache is None else Flights(cache, now)
        self._rising = None if cache is None else Rising(cache, now, self._rose)
        self._copiers = None if cache is None else Copiers(cache, copies, log, now)

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
        """Requests that wait in the queue for blocks, of another engine or from flash."""
        if self._flights is None or self._rising is None:
            return 0
        return self._flights.waiting + self._rising.waiting

    def defers(self, sequence: Sequence, blocks: int) -> bool:
        """See scheduler.Finder, flights.Flights and rising.Rising."""
        if sequence.preempted and self._storing:
            # What it lost is being copied out, which takes less than computing it again.
            keys = sequence.keys()[blocks : sequence.usable_blocks]
            if not self._storing.isdisjoint(keys):
                return True
        if self._flights is None or self._rising is None or not sequence.reuses:
            return False
        alone = self.weigher is not None and not self.weigher.beside
        return self._rising.waits(sequence, alone) or self._flights.defers(sequence, blocks)

    def arrive(self, sequence: Sequence) -> None:
        """A request has come: what of it is on flash begins to rise while it waits its turn."""
        if self._cache is None or not sequence.reuses:
            return
        keys = sequence.keys()[: sequence.usable_blocks]
        there = len(self._pages.lookup(keys))
        keys = keys[there:]
        blocks = self._cache.lookup(keys).blocks
        # Blocks leave DRAM deepest first, so the last one tells whether any is on flash only.
        if "flash" not in self._cache.tiers(keys[blocks - 1 : blocks]):
            return
        if self.weigher is None or self._rising is None:
            self._cache.prefetch(keys, blocks)
            return
        tiers, follow = self._cache.tiers(keys[:blocks]), self.weigher.by_layers
        flash = [i for i, tier in enumerate(tiers) if tier == "flash"]
        rising_s = self._ahead_s([keys[i] for i in flash])
        choice = self.weigher.weigh(sequence, there, tiers, follow, rising_s)
        self._cache.prefetch(keys, choice.blocks, follow)
        rises = [i for i in flash if i < choice.blocks]
        sequence.rose = frozenset(there + i for i in rises)
        if rises:
            block_bytes = self.weigher.block_bytes if follow else 0
            self._rising.begin(sequence, [keys[i] for i in rises], choice, block_bytes)

    def _ahead_s(self, keys: Blocks[BlockKey]) -> float:
        """Seconds until blocks on flash begin to rise if they are asked for now."""
        if not keys or self.weigher is None or self._rising is None:
            return 0.0
        return self._rising.ahead_s(keys, self.weigher.cost.block_s("flash"))

    def find(self, sequence: Sequence, blocks: int) -> None:
        """See scheduler.Finder. A lookup that needs no load is counted here."""
        if sequence.request.cache != CACHE_BYPASS:
            self._find_and_tell(sequence, blocks)
        if self.weigher is not None and (sequence.gate is not None or not sequence.found):
            self.weigher.beside += 1  # those that are let in after it compute beside it

    def _find_and_tell(self, sequence: Sequence, blocks: int) -> None:
        sequence.found_end, began_s = "no_cache", self._now()
        if self._cache is not None and sequence.reuses:
            self._find(self._cache, sequence, blocks)
        if sequence.trace is not None:
            sequence.trace.looked(sequence, began_s, self._now())
        if not sequence.found:
            self._count(sequence, 0, "")
            if self._flights is not None and sequence.reuses:
                self._flights.computing(sequence)

    def load(self, sequence: Sequence) -> None:
        """Begin to copy a sequence's found blocks into its pages."""
        assert self._cache is not None
        assert self._copiers is not None
        first, count = sequence.registered, len(sequence.found)
        pages = sequence.pages[first : first + count]
        self._pages.pin(pages)
        self.copying += 1
        if sequence.gate is None and "flash" in sequence.found:
            self._cache.prefetch(sequence.keys()[first : first + count], count)
        job = LoadJob(sequence, first, pages, self._now())
        if sequence.trace is not None:
            sequence.trace.asked_s = job.started_s
        if self.weigher is not None:
            job.gate, job.cuts = sequence.gate, self.weigher.cuts
            job.until_s, sequence.follow_until_s = sequence.follow_until_s, 0.0
        if self._flights is not None:
            self._flights.computing(sequence, count)
        self._copiers.load(job)

    def store(self, sequence: Sequence, blocks: Iterable[int], leaving: bool = False) -> None:
        """Queue complete blocks; what finds no room is dropped, and so are the blocks after it.

        Args:
            sequence: holds the blocks' pages.
            blocks: registered ones, in order, following those that were stored before.
            leaving: take them even where the queue is full; it is now or never.
        """
        if self._cache is None or self._flights is None or self._copiers is None:
            return
        for block in blocks:
            reason = self._refusal(sequence, self._cache, leaving)
            if reason:
                sequence.store_stopped = True
                self.store_drops[reason] += 1
                self._flights.dropped(sequence, block)
                continue
            page = sequence.pages[block]
            self._pages.pin((page,))
            self._store_room -= 1
            self.copying += 1
            self._storing.add(sequence.keys()[block])
            if sequence.trace is not None:
                sequence.trace.stores()
            item = self._item(sequence, block, page)
            self._copiers.store(StoreJob(item, page, sequence.tenant, sequence.trace))
        if sequence.reuses:
            self._flights.computing(sequence)

    def keep(self, sequence: Sequence) -> None:
        """See step.Finder: what of it the cache has not got is stored now.

        Nearly all of it is there or on its way, stored behind the steps that computed it. The rest
        was dropped, or evicted since; its pages stay until they are copied, whoever gets the
        others, and until then they are found in the pool.
        """
        if self._cache is None or not sequence.registered:
            return
        there = self._cache.lookup(sequence.keys()[: sequence.registered]).blocks
        sequence.store_stopped = False
        missing = range(there, sequence.registered)
        keys = sequence.keys()
        self.store(sequence, [i for i in missing if keys[i] not in self._storing], leaving=True)

    def poll(self) -> list[Loaded]:
        """Take what the threads have finished: pages are unpinned, lookups counted."""
        if self._flights is not None:
            self._flights.prune()
        if self._rising is not None:
            self._rising.prune()
        loads: list[Loaded] = []
        while self._copiers is not None and (result := self._copiers.take()) is not None:
            self._pages.unpin(result.pages)
            if isinstance(result, Loaded):
                self.copying -= 1
                if self.weigher is not None:
                    self.weigher.loaded(result)
                if result.sequence.trace is not None:
                    result.sequence.trace.loaded(result)
                self.load_seconds += result.seconds
                if _waits(result):
                    self._count(result.sequence, result.blocks, result.reason)
                    loads.append(result)
            else:
                for trace, blocks in result.traces.items():
                    self.notes += trace.stored(result.began_s, result.seconds, blocks)
                self._storing -= result.keys
                self.copying -= len(result.pages)
                if self.weigher is not None:
                    self.weigher.stored(result)
                self._store_room += len(result.pages)
                self.stored_blocks += result.result.stored
                self.store_drops.update(result.result.dropped)
        self._tell()
        return loads

    def _tell(self) -> None:
        """Tell the sidecar what was measured, at most twice a second."""
        if self.weigher is None or self._cache is None or not self.weigher.meter:
            return
        now = self._now()
        if now - self._told_s >= SHOW_EVERY_S:
            self._told_s = now
            self._cache.measured(*self.weigher.meter.take())

    def beside(self, running: int) -> None:
        """So many requests compute when the next step is scheduled."""
        if self.weigher is not None:
            self.weigher.beside = running

    def computed(self, works: Blocks[Work], seconds: float) -> None:
        """A step took so long; called before its loads are polled."""
        if self.weigher is None or self._cache is None:
            return
        self.weigher.computed(works, seconds)
        now = self._now()
        if now - self._shown_s >= SHOW_EVERY_S:
            self._shown_s = now
            pool = {
                "pool_blocks.total": self._pages.total,
                "pool_blocks.filled": self._pages.filled,
            }
            self._cache.show_rates({**self.weigher.look(), **pool})

    def began(self, sequence: Sequence, now_s: float) -> None:
        """A sequence has its first token."""
        if self.weigher is not None:
            self.weigher.began(sequence, now_s - sequence.arrived_s)

    def load_stats(self) -> LoadStats:
        """See there."""
        if self.weigher is None or self._cache is None:
            return LoadStats()
        return self.weigher.stats(self._cache.pace)

    def wait(self, timeout_s: float) -> None:
        """Wait until poll has something to take, or timeout_s have passed; while blocks rise, a
        part of that."""
        if self._copiers is not None and self._rising is not None:
            self._copiers.wait(min(timeout_s, LOOK_S) if self._rising.waiting else timeout_s)

    def close(self) -> None:
        """Let stores drain for a moment, end the threads, detach."""
        if self._cache is None or self._copiers is None:
            return
        self._copiers.close()
        if self.weigher is not None:
            self._cache.measured(*self.weigher.meter.take())
        self._cache.close()

    # On the core's thread.

    def _rose(self, blocks: int, seconds: float, all_came: bool) -> None:
        if self.weigher is not None:
            self.weigher.rose(blocks, seconds, all_came)

    def _find(self, cache: Cache, sequence: Sequence, blocks: int) -> None:
        """Look up what the pool lacks. The block before it is asked for as well: it tells
        whether the cache still has the prefix that the pool has, and can take what follows."""
        keys = sequence.keys()[: sequence.usable_blocks]
        known = 1 if blocks else 0
        asked = keys[blocks - known :]
        began_s = self._now()
        found = cache.lookup(asked, None if known else self._first(sequence))
        if self.weigher is not None:
            self.weigher.meter.observe("lookup_seconds", self._now() - began_s)
        sequence.found = cache.tiers(asked[: found.blocks])[known:]
        # Should a found block be gone before its tier was read, it was evicted in between.
        sequence.found_end = found.reason or "evicted"
        if self.weigher is not None and sequence.found:
            if sequence.follow_until_s <= began_s:  # let in, and passed over for another reason
                sequence.follow_until_s = 0.0
            first = blocks + asked_blocks(sequence, blocks, sequence.found)
            rising_s = self._ahead_s(keys[first : blocks + len(sequence.found)])
            self.weigher.choose(sequence, blocks, sequence.found, rising_s)
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

    def _refusal(self, sequence: Sequence, cache: Cache, leaving: bool) -> str:
        if sequence.store_stopped:
            return "no_parent"
        if cache.state != "attached":
            return "detached"
        return "" if leaving or self._store_room > 0 else "queue_full"

    def _item(self, sequence: Sequence, block: int, page: int) -> StoreItem:
        assert sequence.digest is not None
        return StoreItem(
            key=sequence.keys()[block],
            parent=sequence.parent(block),
            namespace=sequence.digest,
            depth=block,
            tokens=sequence.block_tokens_bytes(block),
            payload=self._copies.source(page),
            origin=b"" if block else sequence.origin(),
            tenant="" if block else sequence.tenant,
            request=sequence.id,
            trace="" if sequence.trace is None else str(sequence.trace.store),
        )

    def _count(self, sequence: Sequence, loaded: int, reason: str) -> None:
        """Count a request's lookup, at its first admission only; see tally.outcome."""
        if sequence.counted:
            return
        lookup = outcome(sequence, loaded, reason)
        sequence.counted, sequence.cached = True, lookup.cached
        if sequence.trace is not None:
            sequence.trace.counted(lookup)
        self.tally.add(lookup)
        if self._cache is not None:
            self._cache.count(lookup.requested, lookup.hits, lookup.misses, sequence.tenant)
            if self.weigher is not None:
                self.weigher.saved(sequence, loaded)
            blocks = sequence.registered + loaded
            self._cache.touch(sequence.keys(), blocks, sequence.request.hint)


def _waits(loaded: Loaded) -> bool:
    """Its sequence still waits for it: it was not aborted, and did not lose its pages."""
    if loaded.gate is not None:
        return loaded.sequence.gate is loaded.gate
    return loaded.sequence.state is State.LOADING
