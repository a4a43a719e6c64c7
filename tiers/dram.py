"""The DRAM tier: a file in shared memory, cut into slots, that workers map and read themselves.

    slot i    bytes [i * slot_bytes, (i + 1) * slot_bytes) of the file, a record (proto/record.py)

The file is made anew in every life of the sidecar. Workers that still map the old one keep old
memory, never somebody else's. A slot's memory is claimed from the file system before the slot is
given out: touching a page of a full /dev/shm would kill the toucher with SIGBUS, a failing
fallocate is only a TierFull.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

import numpy as np

from kvist.proto import slot as protocol
from kvist.proto.errors import BlockMissing, ConfigInvalid, TierFull
from kvist.proto.memory import HUGE_BYTES, collapse, map_shared, populate
from kvist.proto.numa import place, placement
from kvist.proto.record import MAGIC, PAGE_BYTES, BlockHeader, Bytes, Wanted, unpack_header
from kvist.proto.sizes import format_bytes
from kvist.tiers.slots import FreeSlots, Quarantine

GENERATION_BYTES = 8
_MAGIC_BYTES = slice(8, 16)
_NO_MAGIC = bytes(len(MAGIC))
_EMPTY_GENERATION = (1).to_bytes(8, "little")


class DramTier(Quarantine):
    """A shared arena of slots; see base.Tier for the contract.

    Attributes:
        path: the file, for workers to map.
        slots: how many blocks fit.
        slot_bytes: bytes of a slot, a multiple of PAGE_BYTES.
        huge_bytes: how much of the arena lies in huge pages, as far as prefault has come.
        unplaced: why it does not lie on the nodes that were asked for, in words; "" if it does.
        node_bytes: how much of it lies on which NUMA node, once prefault is over; {} before, and
            where the kernel does not tell.
    """

    name = "dram"

    def __init__(self, path: Path, slots: int, slot_bytes: int, nodes: Sequence[int] = ()) -> None:
        """Make the file, replacing one that is there.

        Args:
            path: where; its directory exists, best on a tmpfs such as /dev/shm.
            slots: how many, >= 1.
            slot_bytes: bytes of a slot, a multiple of PAGE_BYTES.
            nodes: NUMA nodes whose memory it is to be made of, see numa.place; none: any.

        Raises:
            ConfigInvalid: the sizes make no arena, or the file system cannot hold one.
        """
        if slots < 1 or slot_bytes < 2 * PAGE_BYTES or slot_bytes % PAGE_BYTES:
            raise ConfigInvalid(
                f"dram_bytes and slot_bytes make {slots} slots of {slot_bytes} bytes; needed are"
                f" at least one, of a multiple of {PAGE_BYTES} bytes and two such pages"
            )
        self.path = path
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.huge_bytes = 0
        self.unplaced = ""
        self.node_bytes: Mapping[int, int] = {}
        self._free = FreeSlots(slots)
        self._backed = bytearray(slots)
        path.unlink(missing_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._claim(slots * slot_bytes)
            self._view = map_shared(self._fd, slots * slot_bytes)
            self._place(nodes)
            self._lay_out()
        except BaseException:
            os.close(self._fd)
            path.unlink(missing_ok=True)
            raise

    def _claim(self, size: int) -> None:
        room = os.fstatvfs(self._fd)
        try:
            if size > room.f_blocks * room.f_frsize:
                raise OSError("the file system is smaller")
            os.truncate(self._fd, size)
        except OSError as error:
            raise self._too_large(error) from error

    def _too_large(self, error: OSError) -> ConfigInvalid:
        size = format_bytes(self.slots * self.slot_bytes)
        return ConfigInvalid(
            f"dram_bytes: {self.path.parent} cannot hold an arena of {size}"
            f" ({error}); lower dram_bytes or give it more room (docker run --shm-size)"
        )

    def _place(self, nodes: Sequence[int]) -> None:
        """Before the first page is there."""
        try:
            if nodes:
                place(self._view, nodes)
        except OSError as error:  # no privilege, no such call, no memory on that node
            self.unplaced = error.strerror or str(error)

    def _lay_out(self) -> None:
        try:
            for slot in range(self.slots):
                os.pwrite(self._fd, _EMPTY_GENERATION, slot * self.slot_bytes)
        except OSError as error:
            raise self._too_large(error) from error

    @property
    def pages(self) -> str:
        """What the arena lies in: "huge", "plain", or "mixed" where not all could be had huge."""
        if not self.huge_bytes:
            return "plain"
        whole = len(self._view) // HUGE_BYTES * HUGE_BYTES
        return "huge" if self.huge_bytes == whole else "mixed"

    @property
    def free_slots(self) -> int:
        """Slots that allocate could give out now, memory permitting."""
        return self._free.count

    def allocate(self) -> int:
        """Take a free slot; TierFull when none is left or the file system is out of memory."""
        slot = self._free.pop()
        if not self._back(slot):
            self._free.push(slot)
            raise TierFull(f"no memory left in {self.path.parent} for another slot")
        return slot

    def _back(self, slot: int) -> bool:
        """Claim the slot's memory; releases the interpreter's lock; False when there is none."""
        if not self._backed[slot]:
            try:
                os.posix_fallocate(self._fd, slot * self.slot_bytes, self.slot_bytes)
            except OSError:
                return False
            self._backed[slot] = 1
        return True

    def slot_view(self, slot: int) -> memoryview:
        """The slot's bytes, writable, in place."""
        assert 0 <= slot < self.slots, f"slot {slot} is not one of {self.slots}"
        return self._view[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def write(self, slot: int, header: BlockHeader, payload: Bytes) -> None:
        """Fill an allocated slot and make it readable; see base.Tier."""
        view = self.slot_view(slot)
        protocol.begin(view)
        protocol.fill_slot(view, header, payload)
        protocol.publish(view)

    def publish(self, slot: int) -> None:
        """Make a slot readable that a worker has filled; checks nothing, header does."""
        protocol.publish(self.slot_view(slot))

    def header(self, slot: int) -> BlockHeader:
        """What an allocated slot says it holds, published or not.

        Raises:
            BlockMissing: nobody has written a record since the slot was given out.
            BlockCorrupt: the record's header is damaged.
            FormatRefused: a record of another version.
        """
        view = self.slot_view(slot)
        if view[_MAGIC_BYTES] == _NO_MAGIC:
            raise BlockMissing("the slot has not been filled")
        return unpack_header(view)

    def read(self, slot: int, wanted: Wanted, out: Bytes) -> None:
        """Copy a block out; see base.Tier."""
        protocol.read_slot(self.slot_view(slot), wanted, out)

    def free(self, slot: int) -> None:
        """Make the slot unreadable and give it back."""
        self._free.push(slot)
        view = self.slot_view(slot)
        protocol.begin(view)
        # So that header cannot mistake what was here for what the next owner writes.
        view[_MAGIC_BYTES] = _NO_MAGIC

    def wipe(self, slot: int) -> None:
        """Overwrite a free slot with zeros, all but its generation. 0.1 ms for 1 MiB."""
        np.frombuffer(self.slot_view(slot), np.uint8)[GENERATION_BYTES:] = 0

    def prefault(self, stop: Event) -> bool:
        """Claim and map all memory, so that no later copy waits for it; for a background thread.

        Args:
            stop: set it, and join the thread, before close.

        Returns:
            Whether all memory is there now. False after stop, or when the file system ran out;
            the tier then works with what there is.
        """
        self._collapse(stop)
        for slot in range(self.slots):
            if stop.is_set() or not self._back(slot):
                return False
            populate(self.slot_view(slot), stop)
        self.node_bytes = placement(self._view)
        return True

    def _collapse(self, stop: Event) -> None:
        """Put the arena into huge pages as far as the kernel does it; see proto/memory.py."""
        for start in range(0, len(self._view) - HUGE_BYTES + 1, HUGE_BYTES):
            if stop.is_set():
                return
            if collapse(self._view[start : start + HUGE_BYTES]):
                self.huge_bytes += HUGE_BYTES
            elif not start:  # a kernel that cannot says so at once
                return

    def close(self) -> None:
        """Remove the file and let go of the memory, as soon as nobody reads from it."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == os.fstat(self._fd).st_ino:
                self.path.unlink()
        os.close(self._fd)
        self._view.release()
