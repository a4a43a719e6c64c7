"""One host pool's pages in the cache: looked up, brought in, taken out, by SGLang's page hashes.

Called by SGLang's storage threads: one looks up, one brings in, one takes out. What brings pages
in copies each from the arena to its place in the pool, verifies it there, and says so by page.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import StoreItem, StoreResult
from kvist.engine.plugins.common import HashNames
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.record import Bytes, Wanted

# How long one call may wait for pages that are still on flash.
LOAD_PATIENCE_S = 2.0
# A page that was wished for rises in a few ms; one that takes longer may stand behind a gap in its
# chain, where a wish for a later page does not reach, and is wished for by itself.
NUDGE_S = 0.05
# Marks of pages that SGLang looked up and never fetched; 10 MB of them at most.
MARKS_MAX = 65536
_PLACED_ANEW = ("no_parent", "torn")


class PageStore:
    """Pages of one pool.

    A page is stored on top of the page before it, so that eviction takes the ends of prompts
    first. SGLang stores a page once; when the page before it has gone since (a sidecar that
    restarted without flash), it becomes the first of a chain of its own: SGLang looks up from
    where its own cache ends, and finds it there.

    Args:
        cache: closed by close.
        names: of the pool's namespace.
        page_tokens: tokens of a page in the accounts; 0 for a pool that only goes with another
            one, of which SGLang keeps single pages: they stand alone and are not counted.
        log: where faults are told.
    """

    def __init__(self, cache: CacheClient, names: HashNames, page_tokens: int, log: Log) -> None:
        self._cache = cache
        self._names = names
        self._is_chained = page_tokens > 0
        self._page_tokens = page_tokens
        self._log = log
        self._storing = threading.Lock()
        self._helper = ThreadPoolExecutor(1, "kvist-load")
        # Depth of pages below one that became the first of its chain; others follow from SGLang.
        self._depths: dict[BlockKey, int] = {}
        self._slow: set[BlockKey] = set()

    # On the thread that looks up.

    def leading(self, pages: Sequence[bytes]) -> int:
        """How many pages are there, counted from the first; those on flash begin to rise.

        Args:
            pages: hashes, of consecutive pages of one prompt.
        """
        keys = [self._names.key(page) for page in pages]
        tiers = self._cache.tiers(keys)
        found = len(tiers)
        if "flash" in tiers:
            self._mark(key for key, tier in zip(keys, tiers, strict=False) if tier == "flash")
            self._cache.prefetch(keys, found)
        if found < len(pages) and self._is_chained:
            first = (self._names.origin(pages[found]), self._names.digest)
            missed = self._cache.lookup(keys[found : found + 1], first)
            self._count(Counter(), {missed.reason or "evicted": len(pages) - found})
        return found

    def present(self, pages: Sequence[bytes]) -> list[bool]:
        """Whether each page is there, of a pool whose pages stand alone; those on flash rise."""
        found = []
        for page in pages:
            key = self._names.key(page)
            tiers = self._cache.tiers([key])
            found.append(bool(tiers))
            if tiers == ("flash",):
                self._cache.prefetch([key], 1)
        return found

    def _mark(self, keys: Iterable[BlockKey]) -> None:
        if len(self._slow) > MARKS_MAX:
            self._slow.clear()
        self._slow.update(keys)

    # On the thread that brings in.

    def load(self, pages: Sequence[bytes], outs: Sequence[Bytes]) -> list[bool]:
        """Bring pages in; for each, whether its place holds it now, whole and verified.

        SGLang uses pages up to the first that did not come, so no other is tried behind one.

        Args:
            outs: where each goes; undefined where it did not come.
        """
        wanted = [self._names.wanted(page) for page in pages]
        reasons = self._bring(wanted, outs)
        came = next((at for at, reason in enumerate(reasons) if reason), len(pages))
        self._account([one.key for one in wanted], came, "".join(reasons[came : came + 1]))
        return [not reason for reason in reasons]

    def _account(self, keys: Sequence[BlockKey], came: int, reason: str) -> None:
        if not self._is_chained:
            for at in range(came):
                self._cache.touch(keys[at:], 1)
        elif keys:
            tiers = Counter("flash" if key in self._slow else "dram" for key in keys[:came])
            self._count(tiers, {reason: len(keys) - came} if reason else {})
            self._slow.difference_update(keys)
            self._cache.touch(keys, came)

    def _bring(self, wanted: Sequence[Wanted], outs: Sequence[Bytes]) -> list[str]:
        """Why each page did not come, "" when it did; by two threads, since one is half a memory's
        speed. No thread writes to a page any more when this returns."""
        reasons = ["torn"] * len(wanted)
        turn, failed = itertools.count(), threading.Event()
        deadline = time.monotonic() + LOAD_PATIENCE_S

        def work() -> None:
            while not failed.is_set() and (at := next(turn)) < len(wanted):
                reasons[at] = self._bring_one(wanted[at], outs[at], deadline)
                if reasons[at]:
                    failed.set()

        beside = [self._helper.submit(work)] if len(wanted) > 1 else []
        work()
        wait(beside)
        first = next((reason for reason in reasons if reason), "")
        # Pages behind the failed one that were not tried end for its reason.
        return [reason and first for reason in reasons]

    def _bring_one(self, wanted: Wanted, out: Bytes, deadline: float) -> str:
        try:
            nudge = min(deadline, time.monotonic() + NUDGE_S)
            reason = self._cache.load(wanted, out, nudge)
            if reason == "flash_late" and nudge < deadline:
                self._cache.prefetch([wanted.key], 1)
                reason = self._cache.load(wanted, out, deadline)
            return reason or ""
        except Exception as error:  # a mistake costs these pages, never the request
            self._log.error("load failed", error=repr(error))
            return "detached"

    # On the thread that takes out.

    def store(
        self, pages: Sequence[bytes], payloads: Sequence[Bytes], before: Sequence[bytes] | None
    ) -> list[bool]:
        """Take pages out; for each, whether it is cached now.

        Args:
            payloads: of each page; may change when this returns.
            before: hashes of all pages before the first of them, [] when it is the first; None
                when that is not known.
        """
        keys = [self._names.key(page) for page in pages]
        with self._storing:
            result = self._put(self._items(pages, payloads, before))
            if not self._is_chained:
                return self.present(pages)
            found = len(self._cache.tiers(keys))
            if found < len(pages) and any(why in result.dropped for why in _PLACED_ANEW):
                # What should stand before it is not there, or at another depth than we think.
                self._put(self._items(pages[found:], payloads[found:], None))
                found = len(self._cache.tiers(keys))
        return [at < found for at in range(len(pages))]

    def _items(
        self, pages: Sequence[bytes], payloads: Sequence[Bytes], before: Sequence[bytes] | None
    ) -> list[StoreItem]:
        parent = self._names.key(before[-1]) if before and self._is_chained else NO_KEY
        depth = self._depths.get(parent, len(before) - 1) + 1 if before and parent != NO_KEY else 0
        is_moved = self._is_chained and (before is None or parent in self._depths)
        items = []
        for page, payload in zip(pages, payloads, strict=True):
            item = self._names.item(page, parent, depth, payload)
            items.append(item)
            if is_moved:
                self._depths[item.key] = depth
            if self._is_chained:
                parent, depth = item.key, depth + 1
        while len(self._depths) > MARKS_MAX:
            del self._depths[next(iter(self._depths))]
        return items

    def _put(self, items: list[StoreItem]) -> StoreResult:
        try:
            return self._cache.store(items)
        except Exception as error:  # a mistake costs these pages, not the thread
            self._log.error("store failed", pages=len(items), error=repr(error))
            return StoreResult(0, 0, {"error": len(items)})

    # Both.

    def clear(self) -> int:
        """Drop every page of the namespace; how many. Raises: Detached."""
        with self._storing:
            self._depths.clear()
            return self._cache.clear()

    def _count(self, hits: Counter[str], misses: dict[str, int]) -> None:
        """A page is counted once: as a miss when it is not found, else when it is fetched."""
        tokens = self._page_tokens
        hit = {tier: tokens * count for tier, count in hits.items()}
        missed = {reason: tokens * count for reason, count in misses.items()}
        self._cache.count(sum(hit.values()) + sum(missed.values()), hit, missed)

    def close(self) -> None:
        """End the thread, detach."""
        self._helper.shutdown(wait=True)
        self._cache.close()
