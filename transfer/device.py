"""Pages of a device as ends of copies: what a device offers, and what moving blocks needs of it.

A device copies by itself, behind the host's back: what was asked for happens later, in the order of
its lane. So a source must not change, and a target must not be read, until a mark behind the copy
was passed. Whoever computes on the device is held up by a mark without the host waiting; the host
waits only where it must know: before a slot's generation is looked at for the last time, and before
a slot that was filled is committed.
"""

from __future__ import annotations

from threading import Event
from typing import Protocol

from kvist.proto.record import Bytes


class Mark(Protocol):
    """A place in a lane."""

    def wait(self) -> None:
        """The host waits until all copies before it are done."""
        ...

    def hold(self) -> None:
        """The computation waits: what is launched after this call. The host does not."""
        ...


class Lane(Protocol):
    """Copies one after the other, beside the computation. Used by one thread."""

    def load(self, source: Bytes, page: int, first: int) -> None:
        """Begin to copy source to the bytes of a page from first on."""
        ...

    def store(self, page: int, first: int, out: Bytes) -> None:
        """Begin to fill out with the bytes of a page from first on."""
        ...

    def mark(self) -> Mark:
        """Behind the copies asked for so far."""
        ...


class Copies(Protocol):
    """What a device offers; transfer.cuda.CudaCopies, transfer.delayed.DelayedCopies."""

    def lane(self) -> Lane:
        """A new one."""
        ...

    def staging(self, count: int) -> Bytes:
        """New pinned memory, (count,), uint8."""
        ...

    def register(self, address: int, count: int) -> None:
        """Pin memory of this process, which takes long; raises OSError when it cannot be."""
        ...

    def unregister(self, address: int) -> None:
        """Undo one register; nothing is being copied from or to it."""
        ...


class Summer(Protocol):
    """A checksum under way."""

    def update(self, data: memoryview, /) -> None:
        """Take more bytes."""
        ...


class Target(Protocol):
    """Where a block goes that is not the host's memory. Used by one thread.

    Attributes:
        nbytes: of the block.
    """

    nbytes: int

    def take(self, source: Bytes, first: int, summed: Summer | None) -> bool:
        """Begin to copy a part of the block; source stays as it is until settle.

        Args:
            source: the bytes from first on.
            first: parts come in their order.
            summed: may take the bytes that are copied.

        Returns:
            Whether it has. If not, the caller sums the source, while the copy is under way: what
            is copied is the same as long as nobody writes to the source. A block's parts all get
            the same answer.
        """
        ...

    def settle(self) -> None:
        """Wait until all that was taken is there."""
        ...


class Source(Protocol):
    """Where a block comes from that is not the host's memory. Used by one thread.

    Attributes:
        nbytes: of the block.
    """

    nbytes: int

    def give(self, out: Bytes) -> None:
        """Begin to fill out, (nbytes,); it is not read until settle."""
        ...

    def settle(self) -> None:
        """Wait until out is filled."""
        ...


class PageCopies(Protocol):
    """A pool's pages as ends of copies. Any thread.

    Attributes:
        run_bytes: see pipeline.layer_cuts.
    """

    run_bytes: int

    def target(self, page: int) -> Bytes | Target:
        """A page that is loaded."""
        ...

    def source(self, page: int) -> Bytes | Source:
        """A page that is stored."""
        ...

    def mark(self) -> Mark | None:
        """Behind what this thread's targets have taken; None when it is there already."""
        ...


class Pinner(Protocol):
    """Whoever wants to know memory that blocks come from and go to."""

    def pin(self, memory: memoryview, unit: int, stop: Event) -> None:
        """Make it ready; takes its time. No copy goes over a multiple of unit."""
        ...

    def unpin(self, memory: memoryview) -> None:
        """It will be unmapped; pin has returned and nothing is being copied."""
        ...
