"""One load: blocks taken one by one by several threads, in order, up to the first miss."""

from __future__ import annotations

import threading

from kvist.engine.sequence import Sequence


class LoadJob:
    """Blocks on their way into a sequence's pages. Every method may be called from any thread.

    The copy of a block is bound by one core (about 6 GB/s with its checksum), so that two threads
    bring a prefix in almost half the time; a thread that finds nothing left turns to the next
    job, and a block that waits for flash holds up one thread only.

    Args:
        sequence: whose.
        first: number of the first block in it.
        pages: where the blocks go, in order; at least one.
        started_s: when it was asked for.
    """

    def __init__(self, sequence: Sequence, first: int, pages: list[int], started_s: float) -> None:
        self.sequence = sequence
        self.first = first
        self.pages = pages
        self.started_s = started_s
        self.reason = ""
        self._lock = threading.Lock()
        self._next = 0
        self._under_way = 0
        self._end = len(pages)
        self._deadline: float | None = None

    @property
    def blocks(self) -> int:
        """Leading blocks that have come, once the job has ended."""
        return self._end

    def take(self, now: float, patience_s: float) -> tuple[int, float] | None:
        """The next block to copy, and until when it may be waited for; None when none is left.

        Args:
            now: the clock.
            patience_s: how long the whole job may take from the first block taken.
        """
        with self._lock:
            if self._next >= self._end:
                return None
            if self._deadline is None:
                self._deadline = now + patience_s
            self._next += 1
            self._under_way += 1
            return self._next - 1, self._deadline

    def give(self, block: int, reason: str | None) -> bool:
        """Say how a taken block ended; True for exactly one caller, when the job has ended.

        Args:
            block: as taken.
            reason: None when it came, else the miss reason: no block from it on counts.
        """
        with self._lock:
            self._under_way -= 1
            if reason is not None and block < self._end:
                self._end, self.reason = block, reason
            return not self._under_way and self._next >= self._end
