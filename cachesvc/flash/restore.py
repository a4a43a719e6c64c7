"""The start: what an earlier life left on flash becomes stored blocks again.

Entries go in parents first. One without the block before it, an orphan, cannot be reached by any
lookup: it is dropped and its slot is free. A lost index is scanned anew on a thread of its own;
its entries then go in a few at a time, so that the service's thread is never away for long, and
so do those of a folder that could be opened only while the service runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Set
from functools import partial

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.catalog.index import Location
from kvist.cachesvc.core.host import Thread, Threads
from kvist.cachesvc.flash.flashio import Post
from kvist.cachesvc.placing.placement import Placement
from kvist.proto.errors import KvistError, TierFull, TierOffline
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.tiers.flash import FlashEntry, FlashTier

# 11 us an entry: 3 ms away.
_STEP_ENTRIES = 256


class Restore:
    """Puts flash entries into a placement.

    Args:
        placement: where to.
        flash: its flash tier.
        threads: starts the one that scans.
        post: runs a callable on this thread.
        done: called on this thread when a scan, or a load in the background, is over; with
            TierOffline if the device failed.

    Attributes:
        busy: one of these is under way.
    """

    def __init__(
        self,
        placement: Placement,
        flash: FlashTier,
        threads: Threads,
        post: Post,
        done: Callable[[KvistError | None], None],
    ) -> None:
        self._placement = placement
        self._flash = flash
        self._threads = threads
        self._post = post
        self._done = done
        self._stop = threading.Event()
        self._scanner: Thread | None = None
        self.busy = False
        self._expecting = False
        self._unwanted: Set[BlockKey] = frozenset()
        self._cleared: set[bytes] = set()
        self._all_cleared = False

    def load(self) -> None:
        """Put in what the flash index held at its opening."""
        for _ in self._insert(self._flash.entries()):
            pass

    def expect(self, unwanted: Set[BlockKey]) -> None:
        """What is on flash will be known later only.

        Args:
            unwanted: keys that may still be found there and are not to come back.
        """
        self._expecting = True
        self._unwanted = unwanted

    def load_late(self) -> None:
        """The same as load, in the background; done is called."""
        self.busy = True
        self._post(partial(self._step, self._insert(self._flash.entries())))

    def scan(self) -> None:
        """Find the blocks in the records themselves, in the background; done is called."""
        if self._scanner is not None:
            self._scanner.join()  # it has said so before it ended
        self.busy = self._expecting = True
        self._scanner = self._threads.start(self._scan, "kvist-flash-scan")

    def clear(self, namespace: bytes | None) -> None:
        """What is still to be found of a namespace, or at all, is not wanted."""
        if self._expecting:
            if namespace is None:
                self._all_cleared = True
            else:
                self._cleared.add(namespace)

    def close(self) -> None:
        """End a scan; the next life begins it anew."""
        self._stop.set()
        if self._scanner is not None:
            self._scanner.join()

    def _scan(self) -> None:
        try:
            entries = list(self._flash.scan(self._stop))
        except TierOffline as error:
            self._post(partial(self._finish, error))
        except Exception as error:  # our mistake; it must not leave the tier rebuilding for good
            self._post(partial(self._finish, TierOffline(f"scanning failed: {error!r}")))
        else:
            self._post(partial(self._step, self._insert(entries)))

    def _step(self, steps: Iterator[None]) -> None:
        if self._stop.is_set():
            return
        try:
            next(steps)
        except StopIteration:
            self._finish(None)
        else:
            self._post(partial(self._step, steps))

    def _finish(self, problem: KvistError | None) -> None:
        self.busy = False
        # After a problem there will be another scan, and a load may have shown that one is needed.
        self._expecting = problem is not None or self._flash.needs_rebuild
        if not self._expecting:
            self._cleared.clear()
            self._all_cleared = False
            self._unwanted = frozenset()
        self._done(problem)

    def _insert(self, entries: list[FlashEntry]) -> Iterator[None]:
        """Put entries in, pausing now and then."""
        placement = self._placement
        rows = []
        for count, entry in enumerate(sorted(entries, key=lambda entry: entry.depth), 1):
            row = self._insert_one(entry)
            if row is None:
                placement.counts.orphans_dropped += 1
                placement.unlisted.append(entry.key)
            else:
                rows.append(row)
            if not count % _STEP_ENTRIES:
                placement.uses.tell_restored()
                yield
        placement.uses.tell_restored()
        for count, row in enumerate(rows, 1):
            if not placement.index.is_free(row):
                placement.offer(row)
            if not count % _STEP_ENTRIES:
                yield

    def _insert_one(self, entry: FlashEntry) -> int | None:
        """Put an entry in; its row, or None when it is not wanted."""
        placement, blocks, index = self._placement, self._placement.blocks, self._placement.index
        if self._all_cleared or entry.namespace in self._cleared or entry.key in self._unwanted:
            return None
        parent = self._parent(entry)
        row = index.locate(entry.key)
        if parent is None:
            return None
        # A client may have stored a key anew on top of another block; flash must hang together.
        if row is not None and (blocks.reaches_flash(row) or blocks.parent[row] != parent):
            return None
        if not self._flash.take(entry):
            return None
        if row is not None:  # stored anew while the scan was under way
            blocks.begin_sink(row)
            blocks.finish_sink(row, entry.slot)
            return row
        try:
            location = Location(None, entry.slot)
            row = placement.insert(entry.key, parent, entry.namespace, location)
        except TierFull:
            self._flash.free(entry.slot)
            return None
        blocks.note_tokens(row, entry.block_tokens)
        placement.uses.restored(row)
        return row

    def _parent(self, entry: FlashEntry) -> int | None:
        """Row of the block before, NO_ROW for a first block, None for an orphan."""
        if entry.parent == NO_KEY:
            return NO_ROW if entry.depth == 0 else None
        blocks = self._placement.blocks
        row = self._placement.index.locate(entry.parent)
        if row is None or not blocks.reaches_flash(row) or blocks.depth[row] + 1 != entry.depth:
            return None
        return row if blocks.namespace(row) == entry.namespace else None
