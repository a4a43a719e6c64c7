"""Which page of the pool belongs to whom, and which full pages can be used again (the HBM tier)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

from kvist.cachesvc.events.journal import Journal
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.kv_events import GPU


class Pages:
    """Reference counts of all pages, and the index of those whose KV is complete.

    A page is free (nobody holds it, it has no key), held (by requests, or by a thread that copies
    it), or idle (nobody holds it, but its key finds it). Only idle pages are evicted, the least
    recently used first and of one age the deepest first. Whoever holds a block of a prefix holds
    the blocks before it as well, so a page is never older than the pages that build on it, and
    this order alone takes leaves before their parents.

    Attributes:
        total: pages of the pool.
        journal: where pages that become complete or are evicted are told, see cachesvc.events;
            None tells nobody.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.journal: Journal | None = None
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._keys: list[BlockKey | None] = [None] * total
        self._parents = [NO_KEY] * total
        self._depths = [0] * total
        self._used_at = [0] * total
        self._by_key: dict[BlockKey, int] = {}
        self._idle = 0
        # (used_at, -depth, page); an entry whose page was used since is stale and skipped.
        self._oldest: list[tuple[int, int, int]] = []
        self._tick = 0

    @property
    def available(self) -> int:
        """Pages that allocate could give out now."""
        return len(self._free) + self._idle

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.total - self.available

    @property
    def filled(self) -> int:
        """Pages with something in them: held, or idle and to be found."""
        return self.total - len(self._free)

    @property
    def registered(self) -> int:
        """Pages that a key finds."""
        return len(self._by_key)

    def allocate(self, count: int) -> list[int]:
        """Give out pages, each held once by the caller and without a key; evict if need be.

        Args:
            count: pages, at most `available`.
        """
        assert count <= self.available, "the scheduler gave out more pages than there are"
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a request's pages; those with a key stay to be found until evicted.

        Args:
            pages: held by the caller, in the order of the prompt.
        """
        self._tick += 1
        for page in pages:
            if self._keys[page] is not None:
                self._used_at[page] = self._tick
            self._drop(page)

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that lookup found; nobody may write to them any more."""
        for page in pages:
            assert self._keys[page] is not None, "only complete pages can be shared"
            if self._holders[page] == 0:
                self._idle -= 1
            self._holders[page] += 1

    def pin(self, pages: Iterable[int]) -> None:
        """Hold pages for a thread that copies from or to them; their request holds them now."""
        for page in pages:
            assert self._holders[page] > 0, "a page is pinned while a request holds it"
            self._holders[page] += 1

    def unpin(self, pages: Iterable[int]) -> None:
        """The copy has ended. A copy is no use: the pages' age stays what it was."""
        for page in pages:
            self._drop(page)

    def register(self, page: int, key: BlockKey, parent: BlockKey, depth: int) -> int:
        """Say that a held page is complete and what it holds.

        Args:
            page: held by the caller; nobody writes to it from now on.
            key: names the page's block.
            parent: key of the block before, NO_KEY for the first; the caller holds its page.
            depth: blocks before this one.

        Returns:
            the page to use from now on, held by the caller. It is another one when the same block
            was completed elsewhere first; then the caller's page went back.
        """
        assert self._holders[page] > 0, "only a holder can register a page"
        assert self._keys[page] is None, "a page is registered once"
        there = self._by_key.get(key)
        if there is not None:
            self.hold((there,))
            self._drop(page)
            return there
        self._by_key[key] = page
        self._keys[page], self._parents[page], self._depths[page] = key, parent, depth
        return page

    def lookup(self, keys: Iterable[BlockKey]) -> list[int]:
        """Find the pages of the longest known prefix. They are not held yet.

        Args:
            keys: of a prompt's blocks, first block first.
        """
        pages = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def idle(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody holds: holding them takes that much from `available`."""
        return sum(self._holders[page] == 0 for page in pages)

    def freed(self, pages: Iterable[int], holds: Mapping[int, int]) -> int:
        """How many of these pages nobody would hold any more.

        Args:
            holds: page -> how many of its holders let go.
        """
        return sum(self._holders[page] == holds[page] for page in pages)

    def check(self, holders: Mapping[int, int]) -> None:
        """Compare the books with what the holders say; a difference is a leak.

        Args:
            holders: page -> how often it is held; pages that nobody holds may be left out.
        """
        for page in range(self.total):
            assert self._holders[page] == holders.get(page, 0), f"page {page} has other holders"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert all(self._holders[page] == 0 and self._keys[page] is None for page in self._free)
        keyed = {key: page for page, key in enumerate(self._keys) if key is not None}
        assert keyed == self._by_key, "the index and the pages disagree"
        idle = [page for page in keyed.values() if self._holders[page] == 0]
        assert len(idle) == self._idle, "idle pages are miscounted"
        held = sum(count > 0 for count in self._holders)
        assert len(self._free) + self._idle + held == self.total, "a page is lost"
        for page in idle:
            assert (self._used_at[page], -self._depths[page], page) in self._oldest
            assert self._parents[page] in {NO_KEY, *keyed}, "an idle page cannot be reached"

    def _drop(self, page: int) -> None:
        self._holders[page] -= 1
        assert self._holders[page] >= 0, "a page was released that nobody held"
        if self._holders[page] > 0:
            return
        if self._keys[page] is None:
            self._free.append(page)
        elif self._parents[page] != NO_KEY and self._parents[page] not in self._by_key:
            # Its parent was evicted while a copy held this one: no lookup reaches it any more.
            self._forget(page)
            self._free.append(page)
        else:
            self._idle += 1
            self._push(page)

    def _push(self, page: int) -> None:
        heapq.heappush(self._oldest, (self._used_at[page], -self._depths[page], page))
        if len(self._oldest) > 2 * self.total + 64:
            self._oldest = [
                (self._used_at[page], -self._depths[page], page)
                for page in self._by_key.values()
                if self._holders[page] == 0
            ]
            heapq.heapify(self._oldest)

    def _evict(self) -> int:
        while True:
            used_at, _, page = heapq.heappop(self._oldest)
            unheld = self._holders[page] == 0 and self._keys[page] is not None
            if unheld and self._used_at[page] == used_at:
                self._idle -= 1
                self._forget(page)
                return page

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None
        del self._by_key[key]
        if self.journal is not None:
            self.journal.removed(key, GPU)
        self._keys[page] = None
