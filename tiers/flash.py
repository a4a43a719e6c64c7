"""The flash tier: records in preallocated slots of a directory's files, past the page cache.

What is on the disk is said in segment.py and flash_index.py, how it gets there in flash_io.py.
The order of writes keeps both honest after a crash: data first, then the index transaction; on
eviction the index first, then the slot's next data. Nothing is trusted on the way back: a
record's own header and checksum decide (proto/record.py), the index only says where to look.

A device that fails once turns the tier off (state "failed", every call TierOffline) until probe
finds that it takes writes again. A folder that cannot even be opened is a tier in that state.

A freed slot's record stays on the disk, without an index entry, until the slot is written again.
A rebuild may find it and bring the block back; it is still the block that its key names.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Literal, overload

import numpy as np

from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn, FormatRefused, TierFull
from kvist.proto.keys import BlockKey
from kvist.proto.record import PAGE_BYTES, BlockHeader, Bytes, Wanted, check_wanted, unpack_header
from kvist.proto.slot import fill_slot, payload_of
from kvist.proto.verify import Verifier, Verify
from kvist.tiers.flash_folder import FlashFolder, FlashPlan, open_folder, try_folder
from kvist.tiers.flash_index import FlashEntry
from kvist.tiers.flash_io import DEVICE_ERRORS, Device, Part, RecordIo
from kvist.tiers.segment import DiskIo
from kvist.tiers.slots import FreeSlots, Quarantine

__all__ = ["FlashEntry", "FlashState", "FlashTier"]

FlashState = Literal["ready", "rebuilding", "failed", "off"]

# One index transaction for so many entries of a scan: 128 k entries/s, 46 k/s one by one.
_SCAN_BATCH = 256


class FlashTier(Quarantine):
    """Slots on a disk; see base.Tier for the contract; the rest is said below.

    Attributes:
        path: the directory.
        slots: how many blocks fit.
        slot_bytes: bytes of a slot, a multiple of PAGE_BYTES.
    """

    name = "flash"

    def __init__(self, plan: FlashPlan, slot_bytes: int, folder: FlashFolder | None) -> None:
        """For open and closed, which make the parts."""
        self.path = plan.path
        self.slots = plan.slots(slot_bytes)
        self.slot_bytes = slot_bytes
        self._plan = plan
        self._io = RecordIo(slot_bytes)
        self._device = Device(f"flash_path {plan.path}")
        self._folder: FlashFolder | None = None
        self._mount: Path | None = None
        self._let_go = False
        self._closed = False
        if folder is not None:
            self._use(folder)
        self._forget()

    def _use(self, folder: FlashFolder) -> None:
        self._lock, self._index = folder.lock, folder.index
        self._io.segments = self._segments = folder.segments
        self._folder, self._mount = folder, folder.mount

    def _forget(self) -> None:
        """No slot is in use."""
        self._free = FreeSlots(self.slots)
        # As in a DRAM slot: odd is unreadable. Kept here, because a slot on disk has one owner.
        self._generations = array("Q", [1]) * self.slots
        self._pages = array("I", [0]) * self.slots

    @overload
    @classmethod
    def open(
        cls, path: Path, capacity_bytes: int, slot_bytes: int, disk: DiskIo | None = None
    ) -> FlashTier: ...

    @overload
    @classmethod
    def open(
        cls, path: Path, capacity_bytes: int, slot_bytes: None, disk: DiskIo | None = None
    ) -> FlashTier | None: ...

    @classmethod
    def open(
        cls, path: Path, capacity_bytes: int, slot_bytes: int | None, disk: DiskIo | None = None
    ) -> FlashTier | None:
        """Open a directory, format it if it is new, and read its index.

        A capacity other than last time's adds or removes slots at the end.

        Args:
            path: the directory, for this process alone.
            capacity_bytes: bytes of its slots; all of them are claimed now.
            slot_bytes: bytes of a slot; None takes what the directory was formatted with.
            disk: system calls, replaced by tests.

        Returns:
            None when slot_bytes is None and the directory is not formatted, but could be.

        Raises:
            ConfigInvalid: another process has it, or the sizes make no tier.
            FormatRefused: it was formatted otherwise; the message says how to clear it.
            TierOffline: it cannot be made or used now, or has no room; see closed.
        """
        plan = FlashPlan(path, capacity_bytes, disk or DiskIo())
        folder = open_folder(plan, slot_bytes)
        if folder is None:
            return None
        return cls(plan, folder.segments.slot_bytes, folder)

    @classmethod
    def closed(cls, plan: FlashPlan, slot_bytes: int, why: str) -> FlashTier:
        """A tier whose folder cannot be opened now: state "failed" until probe has opened it.

        Raises:
            ConfigInvalid: the sizes make no tier.
        """
        tier = cls(plan, slot_bytes, None)
        tier._device.failure = why
        return tier

    @property
    def state(self) -> FlashState:
        """What the tier can do.

        ready: everything. rebuilding: read what was taken, but not allocate, until a scan has
        gone through. failed: nothing, until probe succeeds. off: closed.
        """
        if self._closed:
            return "off"
        if self._device.failure:
            return "failed"
        return "rebuilding" if self.needs_rebuild else "ready"

    @property
    def failure(self) -> str:
        """Why the tier is in state "failed", in words; "" when it is not."""
        return self._device.failure

    @property
    def direct(self) -> bool:
        """Whether reads and writes bypass the page cache; False where that is refused."""
        return self._folder is not None and self._segments.direct

    @property
    def needs_rebuild(self) -> bool:
        """Whether the index was lost or damaged and no scan has gone through since."""
        return self._folder is None or not self._index.complete

    def probe(self) -> bool:
        """Try to come back from state "failed"; whether the tier works now.

        A small write tells. A folder that was let go, or was never open, is opened anew; entries
        says then what is in it.
        """
        if not self._device.failure:
            return True
        if self._folder is None or self._let_go:
            return self._open_again()
        try:
            self._lock.probe(self._plan.disk)
            self._index.probe()
        except DEVICE_ERRORS:
            return False
        self._device.failure = ""
        return True

    def _open_again(self) -> bool:
        if self._folder is not None:
            self._folder.close()
            self._folder = None
        folder, why = try_folder(self._plan, self.slot_bytes, self._mount)
        if folder is not None:
            self._use(folder)
            self._let_go = False
        self._device.failure = why
        return folder is not None

    def let_go(self) -> None:
        """In state "failed": forget what is in which slot. The next probe closes the folder, so
        that its file system can be repaired, and opens what it finds. No call may be under way.
        """
        assert self._device.failure
        self._let_go = True
        self._forget()

    @property
    def free_slots(self) -> int:
        """Slots that allocate could give out now."""
        return 0 if self.needs_rebuild else self._free.count

    def set_verify(self, mode: Verify) -> None:
        """What is checked of a payload that is read; "always" if this is not called."""
        self._io.verify = Verifier(mode)

    def allocate(self) -> int:
        """Take a free slot.

        Raises:
            TierFull: none is left, or a rebuild has yet to find out which are free.
            TierOffline: the device failed.
        """
        with self._device:
            if not self.free_slots:
                raise TierFull("all slots are in use, or the flash index is being rebuilt")
            return self._free.pop()

    def take(self, entry: FlashEntry) -> bool:
        """At the start: mark the slot of an entry as used and its block as readable.

        Returns:
            False when there is no such slot, it is in use, or the record is longer than it; the
            caller then forgets the entry.
        """
        if not (
            self._segments.fits(entry.slot, entry.record_bytes) and self._free.take(entry.slot)
        ):
            return False
        self._pages[entry.slot] = entry.record_bytes // PAGE_BYTES
        self._generations[entry.slot] += 1
        return True

    def free(self, slot: int) -> None:
        """Make the slot unreadable and give it back; works on a failed device too."""
        self._generations[slot] |= 1
        self._free.push(slot)

    def write(self, slot: int, header: BlockHeader, payload: Bytes) -> None:
        """Fill an allocated slot and make it readable; see base.Tier."""
        with self._io.buffer() as buffer:
            record = buffer[: header.shape.record_bytes]
            fill_slot(record, header, payload)
            self._write(slot, header, record)

    def write_record(self, slot: int, record: memoryview) -> None:
        """Write a whole record straight from memory, such as a DRAM slot; for any thread.

        Args:
            slot: from allocate, not yet written.
            record: page-aligned memory with a record in it; what follows the record is ignored.

        Raises:
            BlockCorrupt: it is not a whole record, or too long for a slot; nothing was written.
            FormatRefused: a record of another version; nothing was written.
            TierOffline: the device failed; the slot stays the caller's.
        """
        header = unpack_header(record)
        length = header.shape.record_bytes
        if length > min(len(record), self.slot_bytes):
            raise BlockCorrupt(f"a record of {length} bytes fits neither its memory nor a slot")
        self._write(slot, header, record[:length])

    def _write(self, slot: int, header: BlockHeader, record: memoryview) -> None:
        assert self._generations[slot] & 1, f"slot {slot} is written already"
        with self._device:
            self._io.write(slot, header, record)
        self._pages[slot] = len(record) // PAGE_BYTES
        self._generations[slot] += 1

    def read(self, slot: int, wanted: Wanted, out: Bytes) -> None:
        """Copy a block out; see base.Tier."""
        with self._io.buffer() as buffer:
            *_, whole = self._parts(slot, buffer, 0)
            check_wanted(whole.header, wanted)
            np.copyto(out, payload_of(buffer, whole.header))

    def read_record(self, slot: int, into: memoryview) -> BlockHeader:
        """Read a whole record at once; see read_parts."""
        *_, whole = self.read_parts(slot, into, 0)
        return whole.header

    def read_parts(self, slot: int, into: memoryview, part_bytes: int) -> Iterator[Part]:
        """Read a record straight into memory, such as a DRAM slot, part by part; any thread may.

        The generation word of into is left alone. What the record is must be compared with what
        was looked for; that it is whole is known with its last part.

        Args:
            slot: any slot number.
            into: page-aligned memory, as long as the record; undefined after an error.
            part_bytes: see flash_io.part_ends; 0 reads all at once.

        Raises: TierOffline: the device failed. BlockCorrupt: the record is damaged.
            BlockMissing: the slot holds no block, or was freed meanwhile.
        """
        try:
            yield from self._parts(slot, into, part_bytes)
        except BlockTorn as error:
            raise BlockMissing(str(error)) from None

    def _parts(self, slot: int, into: memoryview, part_bytes: int) -> Iterator[Part]:
        generation = self._generations[slot] if 0 <= slot < self.slots else 1
        if generation & 1:
            raise BlockMissing("the slot holds no block")
        parts = self._io.read(slot, into[: self._pages[slot] * PAGE_BYTES], part_bytes)
        is_last = False
        while not is_last:
            try:
                with self._device:
                    part = next(parts)
            except (BlockCorrupt, FormatRefused) as error:
                self._check_untouched(slot, generation)
                raise BlockCorrupt(str(error)) from None
            self._check_untouched(slot, generation)
            is_last = part.is_last
            yield part

    def header(self, slot: int) -> BlockHeader | None:
        """What a slot says that it holds, if that is sound; for any thread. Raises: TierOffline."""
        with self._io.buffer() as buffer, self._device:
            return self._io.header(slot, buffer)

    def _check_untouched(self, slot: int, generation: int) -> None:
        if self._generations[slot] != generation:
            raise BlockTorn("the slot was given to another block while it was read")

    def index_put(self, entries: Sequence[FlashEntry]) -> None:
        """Make written blocks findable after a restart; after the data, for any thread.

        Raises: TierOffline: the device failed or the directory vanished.
        """
        with self._device:
            self._lock.check()
            self._index.put(entries)

    def index_delete(self, keys: Sequence[BlockKey]) -> None:
        """Take blocks out of the index; before their slots get other data, for any thread.

        Raises: TierOffline: the device failed or the directory vanished.
        """
        with self._device:
            self._lock.check()
            self._index.delete(keys)

    def entries(self) -> list[FlashEntry]:
        """What the index held at open, checked, in order of its keys; no two share a slot.

        The tier forgets the list, which may be large: a second call returns an empty one.
        """
        if self._folder is None:
            return []
        found, self._index.found = self._index.found, []
        return found

    def scan(self, stop: Event) -> Iterator[FlashEntry]:
        """Find the blocks again from the records' headers and rebuild the index; for one thread.

        An entry is in the index when it is yielded; a payload is not looked at. At the end the
        state is "ready". A scan that stop ended is begun anew by the next one, here or in the
        next life.

        Raises: TierOffline: the device failed.
        """
        seen: set[BlockKey] = set()
        batch: list[FlashEntry] = []
        with self._io.buffer() as buffer:
            for slot in range(self.slots):
                if stop.is_set():
                    return
                with self._device:
                    entry = self._io.entry(slot, buffer)
                if entry is not None and entry.key not in seen:
                    seen.add(entry.key)
                    if self._generations[slot] & 1:  # not taken, as after an earlier scan
                        batch.append(entry)
                if batch and (len(batch) == _SCAN_BATCH or slot == self.slots - 1):
                    self.index_put(batch)
                    yield from batch
                    batch = []
        with self._device:
            self._index.finish()

    def clear(self) -> None:
        """Drop every block, from the disk too; end a need to rebuild. No call may be under way.

        Raises: TierOffline: the device failed.
        """
        with self._device:
            self._index.reset()
            self._segments.wipe()
        self._forget()

    def close(self) -> None:
        """Close the files and give the directory back."""
        self._closed = True
        if self._folder is not None:
            self._folder.close()
