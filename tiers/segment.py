"""Where a flash slot lies: a directory with a superblock, an owner's lock, segment files of slots.

    superblock       4096 bytes, written once, little-endian
        offset  bytes  field
             0      8  magic              "KVISTFLS"
             8      4  version            FLASH_VERSION
            12      4  record_version     RECORD_VERSION of proto/record.py
            16      8  slot_bytes         bytes of a slot, a multiple of 4096
            24      8  slots_per_segment  slots of every segment file but the last
            32      8  check              xxh3-64 of bytes [0, 32)
    owner.lock       flock(LOCK_EX) of the process that uses the directory; its pid, for people
    segment-00000    slot i is record i % slots_per_segment of segment i // slots_per_segment
    index.*          which key is in which slot (flash_index.py)

Segments are preallocated and at most 1 GiB long, so that a slot never moves and a full disk shows
at the start. All of this belongs to one process at a time.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvist.proto.errors import ConfigInvalid, FolderInUse, FormatRefused
from kvist.proto.record import PAGE_BYTES, RECORD_VERSION, round_up
from kvist.tiers.durable import sync_directory
from kvist.tiers.flash_index import FlashEntry, FlashIndex

FLASH_MAGIC = b"KVISTFLS"
FLASH_VERSION = 1
SEGMENT_BYTES = 1024**3
# A slot's number has 4 bytes, and the shared index takes one for "none".
SLOTS_MAX = 2**32 - 2
CLEAR_COMMAND = "kvistd --clear-flash"

_SUPERBLOCK = struct.Struct("<8sIIQQ")
_CHECK = struct.Struct("<Q")
_HUGE_BYTES = 2 * 1024 * 1024


class DiskIo:
    """What a flash tier asks of the system for its files; a test hands in one that fails.

    Every method raises OSError; a transfer that ends early is one too (EIO).
    """

    def set_direct(self, fd: int) -> None:
        """Ask for O_DIRECT; EINVAL where the file system refuses."""
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read into buffers, one after the other; returns the bytes read, fewer at file's end."""
        return os.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all of buffers, one after the other."""
        if os.pwritev(fd, buffers, offset) != sum(map(len, buffers)):
            raise OSError(errno.EIO, "short write")

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        """Claim room; what is there already stays."""
        os.posix_fallocate(fd, offset, length)

    def sync(self, fd: int) -> None:
        """Wait until the device has what was written."""
        os.fsync(fd)

    def open_index(self, path: Path, slots: int, fits: Callable[[FlashEntry], bool]) -> FlashIndex:
        """Open the index, whose library makes its own system calls; see FlashIndex."""
        return FlashIndex(path, slots, fits)


def aligned_buffer(length: int) -> memoryview:
    """Memory for O_DIRECT, aligned to a page, a long one to a huge page where the kernel gives one.

    A huge page for a short one would be zeroed at its first use: 15 ms beside other work.
    Reads of 1 to 2 MiB run 2.0 to 2.4 times as fast into huge pages as into 4 KiB pages, because
    the device then gets few long segments instead of hundreds.
    """
    if length <= PAGE_BYTES:
        return memoryview(mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE))[:length]
    memory = mmap.mmap(-1, round_up(length, _HUGE_BYTES), flags=mmap.MAP_PRIVATE)
    with suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:length]


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a directory was formatted for.

    Attributes:
        slot_bytes: bytes of a slot, a multiple of PAGE_BYTES.
        slots_per_segment: slots of a segment file, >= 1.
    """

    slot_bytes: int
    slots_per_segment: int

    def pack(self) -> bytes:
        """PAGE_BYTES bytes, as in the table above."""
        fields = _SUPERBLOCK.pack(
            FLASH_MAGIC, FLASH_VERSION, RECORD_VERSION, self.slot_bytes, self.slots_per_segment
        )
        return (fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))).ljust(PAGE_BYTES, b"\0")


def make_superblock(slot_bytes: int) -> Superblock:
    """The superblock of a new directory.

    Raises:
        ConfigInvalid: no slot can be that long.
    """
    if slot_bytes % PAGE_BYTES or not 2 * PAGE_BYTES <= slot_bytes <= SEGMENT_BYTES:
        raise ConfigInvalid(
            f"slot_bytes {slot_bytes} must be a multiple of {PAGE_BYTES},"
            f" between {2 * PAGE_BYTES} and {SEGMENT_BYTES}"
        )
    return Superblock(slot_bytes, SEGMENT_BYTES // slot_bytes)


def slots_that_fit(
    path: Path, superblock: Superblock, capacity_bytes: int, slot_bytes: int | None
) -> int:
    """How many slots a directory of a capacity has.

    Raises:
        FormatRefused: slot_bytes is set, and not what the directory was formatted with.
        ConfigInvalid: not one slot fits, or more than can be numbered.
    """
    if slot_bytes not in (None, superblock.slot_bytes):
        raise FormatRefused(
            f"flash_path {path} is formatted with slot_bytes {superblock.slot_bytes}, not"
            f" {slot_bytes}; set that, or clear it with: {CLEAR_COMMAND}"
        )
    slots = capacity_bytes // superblock.slot_bytes
    if slots < 1:
        raise ConfigInvalid(
            f"flash_bytes {capacity_bytes} holds no slot of {superblock.slot_bytes} bytes;"
            " make it larger"
        )
    if slots > SLOTS_MAX:
        raise ConfigInvalid(f"flash_bytes {capacity_bytes} is more than any disk; lower it")
    return slots


def read_superblock(path: Path) -> Superblock | None:
    """What a directory was formatted for; None when it was not.

    Raises:
        FormatRefused: the superblock is damaged or of a version this program does not know; the
            message names the directory and the command that clears it.
        OSError: the device failed.
    """
    try:
        data = (path / "superblock").read_bytes()
    except FileNotFoundError:
        return None
    cure = f"flash_path {path} {{}}; clear it with: {CLEAR_COMMAND}"
    if len(data) != PAGE_BYTES or not data.startswith(FLASH_MAGIC):
        raise FormatRefused(cure.format("has a superblock that is not Kvist's"))
    _, version, record_version, slot_bytes, slots = _SUPERBLOCK.unpack_from(data)
    if (version, record_version) != (FLASH_VERSION, RECORD_VERSION):
        raise FormatRefused(
            cure.format(
                f"has format version {version} with records of version {record_version}, this"
                f" program reads {FLASH_VERSION} with {RECORD_VERSION}"
            )
        )
    superblock = Superblock(slot_bytes, slots)
    if superblock.pack() != data:
        raise FormatRefused(cure.format("has a damaged superblock"))
    return superblock


def write_superblock(path: Path, superblock: Superblock) -> None:
    """Format a directory: all or nothing, and on the device when this returns."""
    draft = path / "superblock.new"
    with draft.open("wb") as file:
        file.write(superblock.pack())
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path / "superblock")
    sync_directory(path)


class OwnerLock:
    """The right to use a directory; the kernel gives it back when the process ends."""

    def __init__(self, path: Path, cure: str = "give every kvistd a directory of its own") -> None:
        """Take it.

        Args:
            cure: what to do when another process has it.

        Raises:
            FolderInUse: another process has it.
            OSError: the device failed.
        """
        self._path = path / "owner.lock"
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._pid = str(os.getpid()).encode().ljust(PAGE_BYTES, b"\n")
            os.pwrite(self._fd, self._pid, 0)
        except BlockingIOError as error:
            pid = os.pread(self._fd, 32, 0).split(b"\n")[0].decode("ascii", "replace")
            os.close(self._fd)
            raise FolderInUse(
                f"flash_path {path} is in use by process {pid or '?'}; {cure}", pid or "?"
            ) from error
        except OSError:
            os.close(self._fd)
            raise

    def check(self) -> None:
        """Look whether the directory is still the one that was locked.

        Raises:
            OSError: it vanished, or another one is in its place.
        """
        if os.stat(self._path).st_ino != os.fstat(self._fd).st_ino:
            raise FileNotFoundError(errno.ENOENT, "another directory took its place")

    def probe(self, disk: DiskIo) -> None:
        """A small write that goes all the way to the device; OSError when it fails."""
        self.check()
        disk.pwrite(self._fd, [memoryview(self._pid)], 0)
        disk.sync(self._fd)

    def close(self) -> None:
        """Give it back."""
        os.close(self._fd)


class Segments:
    """The open segment files of a directory.

    Attributes:
        slots: how many slots they hold.
        slot_bytes: bytes of a slot.
        direct: whether reads and writes bypass the page cache.
    """

    def __init__(self, path: Path, superblock: Superblock, slots: int, disk: DiskIo) -> None:
        """Open the files, make or cut them to size, and remove those that are not needed.

        Raises:
            OSError: no room, or the device failed.
        """
        self.slots = slots
        self.slot_bytes = superblock.slot_bytes
        self.direct = True
        self._shape = superblock
        self._disk = disk
        self._fds: list[int] = []
        self._grown: list[tuple[int, int]] = []
        files = -(-slots // superblock.slots_per_segment)
        try:
            for number in range(files):
                self._open(path / f"segment-{number:05}", self._length(number))
            self._probe_direct()
        except BaseException:
            self._shrink()
            self.close()
            raise
        for spare in path.glob("segment-*"):
            name = spare.name[8:]
            if len(name) >= 5 and name.isdecimal() and int(name) >= files:
                spare.unlink()

    def _length(self, number: int) -> int:
        """Bytes of a segment file; the last one may be shorter."""
        left = self.slots - number * self._shape.slots_per_segment
        return min(left, self._shape.slots_per_segment) * self.slot_bytes

    def _open(self, file: Path, length: int) -> None:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._fds.append(fd)
        was = os.fstat(fd).st_size
        if was > length:
            os.ftruncate(fd, length)
        else:
            self._grown.append((fd, was))
        # Not with O_DIRECT: where the file system has no fallocate, libc writes single bytes.
        self._disk.fallocate(fd, 0, length)

    def _shrink(self) -> None:
        """Give back what was claimed: a disk without room for all is not to be left full."""
        for fd, was in self._grown:
            with suppress(OSError):
                os.ftruncate(fd, was)

    def _probe_direct(self) -> None:
        """Some file systems refuse the flag, others take it and refuse the first transfer."""
        page = aligned_buffer(PAGE_BYTES)
        try:
            for fd in self._fds:
                self._disk.set_direct(fd)
                self._disk.pread(fd, [page], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = False
            for fd in self._fds:
                _set_buffered(fd)

    def fits(self, slot: int, record_bytes: int) -> bool:
        """Whether there is such a slot and a record is no longer than it."""
        return 0 <= slot < self.slots and record_bytes <= self.slot_bytes

    def _place(self, slot: int) -> tuple[int, int]:
        number, index = divmod(slot, self._shape.slots_per_segment)
        return self._fds[number], index * self._shape.slot_bytes

    def read(self, slot: int, buffers: Sequence[memoryview], first: int = 0) -> int:
        """Read from a byte of a slot on, a whole page's first; aligned buffers of whole pages.

        Returns:
            The bytes read; fewer than asked when somebody cut the file.

        Raises:
            OSError: the device failed.
        """
        fd, offset = self._place(slot)
        return self._disk.pread(fd, buffers, offset + first)

    def write(self, slot: int, buffers: Sequence[memoryview]) -> None:
        """Write from a slot's first byte on; aligned buffers of whole pages.

        Raises:
            OSError: the device failed; the slot holds any mix of old and new.
        """
        fd, offset = self._place(slot)
        self._disk.pwrite(fd, buffers, offset)

    def wipe(self) -> None:
        """Turn every slot to zeros.

        Raises:
            OSError: the device failed.
        """
        for number, fd in enumerate(self._fds):
            os.ftruncate(fd, 0)
            _set_buffered(fd)
            self._disk.fallocate(fd, 0, self._length(number))
            if self.direct:
                self._disk.set_direct(fd)

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())


def _set_buffered(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
