"""A disk that fails as told.

Fault budget: any system call of a flash tier on its segments and on its lock may fail with any
errno, a write may reach the disk only in part, O_DIRECT may be refused. A block that was written
without an error is not lost by this; real damage to files is done by the tests themselves.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from kvist.tiers.segment import DiskIo


class FaultyDisk(DiskIo):
    """Works until told otherwise.

    Attributes:
        broken: operation -> errno with which it fails; "direct", "pread", "pwrite", "fallocate"
            or "sync".
        broken_after: operation -> how many go well first, and the errno.
        tear_at: when set, the next write stops after so many bytes and fails with EIO.
        calls: operations asked for so far.
    """

    def __init__(self) -> None:
        self.broken: dict[str, int] = {}
        self.broken_after: dict[str, tuple[int, int]] = {}
        self.tear_at: int | None = None
        self.calls: list[str] = []

    def _enter(self, operation: str) -> None:
        self.calls.append(operation)
        spared, later = self.broken_after.get(operation, (0, 0))
        code = self.broken.get(operation)
        if later and self.calls.count(operation) > spared:
            code = later
        if code is not None:
            raise OSError(code, os.strerror(code))

    def set_direct(self, fd: int) -> None:
        """O_DIRECT, or not."""
        self._enter("direct")
        super().set_direct(fd)

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, or not."""
        self._enter("pread")
        return super().pread(fd, buffers, offset)

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all, some, or nothing."""
        self._enter("pwrite")
        if self.tear_at is None:
            return super().pwrite(fd, buffers, offset)
        left, self.tear_at = self.tear_at, None
        for buffer in buffers:
            part = buffer[: max(left, 0)]
            if len(part):
                super().pwrite(fd, [part], offset)
            offset += len(part)
            left -= len(part)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        """Claim room, or not."""
        self._enter("fallocate")
        super().fallocate(fd, offset, length)

    def sync(self, fd: int) -> None:
        """Wait for the device, or not."""
        self._enter("sync")
        super().sync(fd)
