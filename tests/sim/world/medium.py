"""The disk of the world: segments and flash index as a device keeps them, and loses them.

Fault budget. While a sidecar runs, a call may fail with an errno, a write may stop half way and
fail, or be lost though it was acknowledged, a bit may flip. When the sidecar is killed, what was
written stays. When the power goes, of all sectors written since the last sync any may be there
and any may not, in any order; of the index each change since its last sync may be there or not,
or the whole file may be damaged. What no disk does is to invent a record whose checksum fits.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import lmdb
import xxhash

from kvist.proto.errors import BlockCorrupt, FormatRefused
from kvist.proto.keys import BlockKey
from kvist.proto.record import unpack_header
from kvist.proto.slot import payload_of
from kvist.tiers.flash_index import FlashEntry, FlashIndex
from kvist.tiers.segment import DiskIo
from sim.world.scheduler import Killed, Scheduler

SECTOR_BYTES = 512
_SYNC_ENTRIES = 6
_ERRNOS = (errno.EIO, errno.ENOSPC, errno.EROFS)

Fits = Callable[[FlashEntry], bool]


class Medium:
    """What lies on the device, through all lives.

    Attributes:
        data: of the one segment, as a read sees it.
        rows: of the flash index, as a read sees it.
        complete: whether the index has its name, index.mdb.
        damaged: slots whose record may not be whole, by a fault that nobody was told of.
        hurt: some record was not whole, at some time.
        broken: operations that fail now.
        lose, tear: the next write is lost, or stops half way.
        die_in: operations of the service's thread until the process dies; None is never.
    """

    def __init__(self, slots: int, slot_bytes: int, random: Random) -> None:
        self.data = bytearray(slots * slot_bytes)
        self.rows: dict[BlockKey, FlashEntry] = {}
        self.complete = False
        self.damaged: set[int] = set()
        self.hurt = False
        self.broken: set[str] = set()
        self.lose = self.tear = False
        self.die_in: int | None = None
        self.index_damaged = False
        self.slot_bytes = slot_bytes
        self._random = random
        self._base = bytes(self.data)
        self._unsynced: list[tuple[int, bytes]] = []
        self._synced_rows: dict[BlockKey, FlashEntry] = {}
        self.unsynced_rows = 0

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes; not on the device before sync."""
        self.data[offset : offset + len(data)] = data
        self._unsynced.append((offset, data))

    def sync(self) -> None:
        """All written bytes are on the device."""
        self._base = bytes(self.data)
        self._unsynced.clear()

    def sync_rows(self) -> None:
        """All index changes are on the device."""
        self._synced_rows = dict(self.rows)
        self.unsynced_rows = 0

    def flip(self, slot: int, offset: int) -> None:
        """A bit changes on the device."""
        at = slot * self.slot_bytes + offset
        self.data[at] ^= 1 << self._random.randrange(8)
        self._base = bytes(self.data)
        self.damaged.add(slot)
        self.hurt = True

    def record_at(self, slot: int) -> BlockKey | None:
        """Key of the whole record in a slot, or None."""
        view = memoryview(self.data)[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]
        try:
            header = unpack_header(view)
            fits = xxhash.xxh3_64_intdigest(payload_of(view, header).data) == header.checksum
        except (BlockCorrupt, FormatRefused):
            return None
        return header.key if fits else None

    def whole_records(self) -> set[BlockKey]:
        """Keys of all of them."""
        slots = range(len(self.data) // self.slot_bytes)
        return {key for slot in slots if (key := self.record_at(slot)) is not None}

    def lose_power(self) -> None:
        """What was not synced is there or not, piece by piece, in any order."""
        data, random = bytearray(self._base), self._random
        writes = [
            (offset + start, piece[start : start + SECTOR_BYTES])
            for offset, piece in self._unsynced
            for start in range(0, len(piece), SECTOR_BYTES)
        ]
        random.shuffle(writes)
        share = random.choice((0.0, 0.5, 0.9, 1.0))
        for offset, piece in writes:
            if random.random() < share:
                data[offset : offset + len(piece)] = piece
        self.damaged |= {offset // self.slot_bytes for offset, _ in self._unsynced}
        self.hurt = True
        self.data = data
        self.sync()
        rows = dict(self._synced_rows)
        for key in sorted(self.rows.keys() | rows.keys()):
            if random.random() < share:
                if key in self.rows:
                    rows[key] = self.rows[key]
                else:
                    rows.pop(key)
        self.rows = rows
        self.sync_rows()


class _Life:
    """What every object of one life has: it has no effect any more when the process is dead."""

    def __init__(self, medium: Medium, scheduler: Scheduler) -> None:
        self.medium = medium
        self.scheduler = scheduler
        self.dead = False

    def enter(self, operation: str) -> None:
        """A system call begins. Raises: Killed, OSError."""
        self.scheduler.pause()
        medium = self.medium
        if self.scheduler.current is None and medium.die_in is not None:
            medium.die_in -= 1
            if medium.die_in < 0:
                medium.die_in = None
                self.dead = True
                raise Killed
        if operation in medium.broken:
            code = self.scheduler.random.choice(_ERRNOS)
            raise OSError(code, os.strerror(code))


class SimDisk(DiskIo):
    """System calls of one life. The segment's file is real but empty; its bytes are the medium's.

    Attributes:
        life: set life.dead when the process dies.
    """

    def __init__(self, medium: Medium, scheduler: Scheduler) -> None:
        self.life = _Life(medium, scheduler)
        self._medium = medium
        self._segment = -1

    def set_direct(self, fd: int) -> None:
        """Always granted."""

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        """The first that is asked for is the segment."""
        assert (offset, length) == (0, len(self._medium.data)), "the world has one segment"
        self.life.enter("fallocate")
        self._segment = fd

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read piece by piece; others may write between them."""
        assert fd == self._segment
        done = 0
        for buffer in buffers:
            self.life.enter("pread")
            at = offset + done
            buffer[:] = self._medium.data[at : at + len(buffer)]
            done += len(buffer)
        return done

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Write piece by piece."""
        medium = self._medium
        self.life.enter("pwrite")
        if fd != self._segment or self.life.dead:
            return
        slot = offset // medium.slot_bytes
        lost, torn = medium.lose, medium.tear
        medium.lose = medium.tear = False
        medium.hurt = medium.hurt or lost or torn
        if lost:
            medium.damaged.add(slot)
            return
        medium.damaged.discard(slot)
        done = 0
        for buffer in buffers:
            piece = bytes(buffer)
            medium.write(offset + done, piece[: len(piece) // 2] if torn else piece)
            if torn:
                raise OSError(errno.EIO, "torn")
            done += len(piece)
            self.life.scheduler.pause()

    def sync(self, fd: int) -> None:
        """Everything is on the device after it."""
        assert fd >= 0
        self.life.enter("sync")
        if not self.life.dead:
            self._medium.sync()

    def open_index(self, path: Path, slots: int, fits: Fits) -> FlashIndex:
        """The index of the medium."""
        assert path.is_dir()
        assert slots
        return SimIndex(self.life, fits)


class SimIndex(FlashIndex):
    """FlashIndex without LMDB: the same promises, kept and broken by the medium."""

    def __init__(self, life: _Life, fits: Fits) -> None:
        self._life = life
        self._medium = medium = life.medium
        life.enter("index")
        entries = [entry for entry in medium.rows.values() if fits(entry)]
        entries.sort(key=lambda entry: entry.key)
        is_good = len({entry.slot for entry in entries}) == len(entries)
        self.complete = medium.complete and is_good and not medium.index_damaged
        self.found = entries if self.complete else []
        medium.index_damaged = False
        if self.complete:
            self.finish()
            medium.rows = {entry.key: entry for entry in entries}
        else:  # the old file is put aside, a draft is begun
            medium.complete = False
            medium.rows = {}

    def finish(self) -> None:
        """See FlashIndex."""
        self._enter()
        if not self._life.dead:
            self._medium.sync_rows()
            self.complete = self._medium.complete = True

    def put(self, entries: Sequence[FlashEntry]) -> None:
        """See FlashIndex."""
        self._enter()
        if not self._life.dead:
            self._medium.rows.update({entry.key: entry for entry in entries})
            self._count(len(entries))
        self._life.scheduler.pause()

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See FlashIndex."""
        self._enter()
        if not self._life.dead:
            for key in keys:
                self._medium.rows.pop(key, None)
            self._count(len(keys))
        self._life.scheduler.pause()

    def _enter(self) -> None:
        try:
            self._life.enter("index")
        except OSError as error:
            raise lmdb.DiskError(str(error)) from error

    def _count(self, entries: int) -> None:
        self._medium.unsynced_rows += entries
        if self._medium.unsynced_rows >= _SYNC_ENTRIES:
            self._medium.sync_rows()

    def probe(self) -> None:
        """See FlashIndex."""
        self._enter()

    def reset(self) -> None:
        """See FlashIndex; the store never calls it."""
        raise AssertionError

    def close(self) -> None:
        """See FlashIndex."""
        if not self._life.dead and "index" not in self._medium.broken:
            self._medium.sync_rows()
