"""Pages of a pool as ends of copies: the host's, which are memory, and a device's.

A device reaches pinned memory by itself; whatever else is copied through a few pinned parts, by the
host. The arena is pinned in the background, so the first loads go that way, and all of them where
it cannot be pinned.
"""

from __future__ import annotations

import platform
import threading
from bisect import bisect_right
from collections.abc import Callable
from threading import Event

import numpy as np

from kvist.proto.record import Bytes
from kvist.proto.verify import keeps_order
from kvist.transfer.device import Copies, Mark, Summer
from kvist.transfer.pipeline import RUN_BYTES

# The host copies a part in 0.4 ms, while the device has the one before it.
STAGING_BYTES = 4 << 20
STAGING_PARTS = 3
# Pinned at once: in between, the locks that the driver takes are free for launches.
PIN_BYTES = 128 << 20
# Bytes of a run of layers of one block on their way to a device. Asking for a copy costs the host
# about 10 us, in which a link of 25 GB/s moves 256 KiB; not yet measured on a GPU.
DEVICE_RUN_BYTES = 2 << 20


class Pins:
    """Which memory is pinned. One thread changes it, any may ask."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def add(self, start: int, count: int) -> None:
        """From now on these bytes are."""
        self._ranges = sorted([*self._ranges, (start, start + count)])

    def remove(self, start: int, count: int) -> list[int]:
        """From now on none of these bytes are; where ranges began among them."""
        gone = [one for one in self._ranges if start <= one[0] < start + count]
        self._ranges = [one for one in self._ranges if one not in gone]
        return [first for first, _ in gone]

    def covers(self, memory: Bytes) -> bool:
        """Whether all of it lies in one range: a device takes no copy across two."""
        ranges, address = self._ranges, memory.ctypes.data
        at = bisect_right(ranges, (address, 1 << 64)) - 1
        return at >= 0 and address + memory.nbytes <= ranges[at][1]


class Line:
    """One thread's lane, and the pinned parts that it copies through."""

    def __init__(self, copies: Copies) -> None:
        self.lane = copies.lane()
        self._copies = copies
        self._busy = False
        self._parts: list[tuple[Bytes, Mark | None]] = []
        self._next = 0

    def load(self, source: Bytes, page: int, first: int) -> None:
        """See Lane."""
        self._busy = True
        self.lane.load(source, page, first)

    def store(self, page: int, out: Bytes) -> None:
        """See Lane; the whole page."""
        self._busy = True
        self.lane.store(page, 0, out)

    def settle(self) -> None:
        """Wait for what was asked for."""
        if self._busy:
            self.lane.mark().wait()
            self._busy = False

    def load_staged(self, source: Bytes, page: int, first: int, summed: Summer | None) -> None:
        """The same as load, and source may change afterwards; summed takes what is copied."""
        for at in range(0, len(source), STAGING_BYTES):
            part = source[at : at + STAGING_BYTES]
            staged = self._part()[: len(part)]
            np.copyto(staged, part)
            if summed is not None:
                summed.update(staged.data)
            self.load(staged, page, first + at)
            self._parts[self._next] = self._parts[self._next][0], self.lane.mark()
            self._next = (self._next + 1) % STAGING_PARTS

    def store_staged(self, page: int, out: Bytes) -> None:
        """The same as store, and settle."""
        for at in range(0, len(out), STAGING_BYTES):
            part = out[at : at + STAGING_BYTES]
            staged = self._part()[: len(part)]
            self.lane.store(page, at, staged)
            self.lane.mark().wait()
            np.copyto(part, staged)

    def _part(self) -> Bytes:
        """The next pinned part, once nothing is copied from it."""
        if not self._parts:
            staging = [self._copies.staging(STAGING_BYTES) for _ in range(STAGING_PARTS)]
            self._parts = [(memory, None) for memory in staging]
        memory, mark = self._parts[self._next]
        if mark is not None:
            mark.wait()
        return memory


class DeviceTarget:
    """See Target."""

    def __init__(self, pages: DevicePages, page: int) -> None:
        self.nbytes = pages.page_bytes
        self._pages = pages
        self._page = page
        self._line: Line | None = None
        self._reached = False

    def take(self, source: Bytes, first: int, summed: Summer | None) -> bool:
        """See Target."""
        if self._line is None:
            self._line, self._reached = self._pages.line(), self._pages.reads(source)
        if self._reached:
            self._line.load(source, self._page, first)
        else:
            self._line.load_staged(source, self._page, first, summed)
        return not self._reached

    def settle(self) -> None:
        """See Target."""
        if self._line is not None:
            self._line.settle()


class DeviceSource:
    """See Source."""

    def __init__(self, pages: DevicePages, page: int) -> None:
        self.nbytes = pages.page_bytes
        self._pages = pages
        self._page = page
        self._line: Line | None = None

    def give(self, out: Bytes) -> None:
        """See Source."""
        self._line = self._pages.line()
        if self._pages.pins.covers(out):
            self._line.store(self._page, out)
        else:
            self._line.store_staged(self._page, out)

    def settle(self) -> None:
        """See Source."""
        if self._line is not None:
            self._line.settle()


class DevicePages:
    """See PageCopies, and Pinner.

    Args:
        copies: what the device offers.
        page_bytes: of a page.
        told: how many bytes of how many are pinned, now and then; and why no more are, or "".
        machine: as platform.machine says it.

    Attributes:
        page_bytes: as given.
        pins: what is pinned.
    """

    run_bytes = DEVICE_RUN_BYTES

    def __init__(
        self,
        copies: Copies,
        page_bytes: int,
        told: Callable[[int, int, str], None],
        machine: str = platform.machine(),
    ) -> None:
        self.page_bytes = page_bytes
        self.pins = Pins()
        self._copies = copies
        self._told = told
        # Elsewhere only a sum over the copied bytes shows a slot that changed meanwhile.
        self._in_order = keeps_order(machine)
        self._lines = threading.local()

    def target(self, page: int) -> DeviceTarget:
        """See PageCopies."""
        return DeviceTarget(self, page)

    def source(self, page: int) -> DeviceSource:
        """See PageCopies."""
        return DeviceSource(self, page)

    def mark(self) -> Mark:
        """See PageCopies."""
        return self.line().lane.mark()

    def line(self) -> Line:
        """The calling thread's."""
        line: Line | None = getattr(self._lines, "line", None)
        if line is None:
            line = self._lines.line = Line(self._copies)
        return line

    def reads(self, source: Bytes) -> bool:
        """Whether the device may read it by itself while the host sums it."""
        return self._in_order and self.pins.covers(source)

    def pin(self, memory: memoryview, unit: int, stop: Event) -> None:
        """See Pinner."""
        whole, start = len(memory), np.frombuffer(memory, np.uint8).ctypes.data
        step = max(unit, PIN_BYTES // unit * unit)
        for first in range(0, whole, step):
            if stop.is_set():
                return
            count = min(step, whole - first)
            try:
                self._copies.register(start + first, count)
            except OSError as error:
                self._told(first, whole, str(error))
                return
            self.pins.add(start + first, count)
            self._told(first + count, whole, "")

    def unpin(self, memory: memoryview) -> None:
        """See Pinner."""
        start = np.frombuffer(memory, np.uint8).ctypes.data
        for first in self.pins.remove(start, len(memory)):
            self._copies.unregister(first)


class HostPages:
    """PageCopies of a pool in the host's memory.

    Args:
        page_bytes: a page as writable bytes that share the pool's memory.
    """

    run_bytes = RUN_BYTES

    def __init__(self, page_bytes: Callable[[int], Bytes]) -> None:
        self.target = self.source = page_bytes

    def mark(self) -> None:
        """See PageCopies."""
