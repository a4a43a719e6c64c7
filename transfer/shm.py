"""Shared memory: a worker's view of the sidecar's arena, for copies without a call."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event

import numpy as np
import xxhash

from kvist.proto.errors import BlockMissing, Detached, FormatRefused
from kvist.proto.memory import map_shared, populate
from kvist.proto.record import (
    BlockHeader,
    Bytes,
    Wanted,
    header_length,
    pack_header,
)
from kvist.proto.slot import RisingReader, SlotReader, fill_slot, read_slot, shown
from kvist.transfer.device import Pinner, Source, Target


class ArenaMap:
    """The arena of one life of the sidecar. Any thread may read; a slot has one writer.

    The map outlives the sidecar: after its death reads still verify what they copy, and a new
    sidecar makes a new file.
    """

    def __init__(self, path: Path, slot_bytes: int, slots: int) -> None:
        """Map the file.

        Args:
            path: the arena, as the sidecar named it.
            slot_bytes: bytes of a slot.
            slots: how many.

        Raises:
            Detached: the file is gone; the sidecar has ended or restarted.
            FormatRefused: the file is shorter than the sidecar said.
        """
        self.slot_bytes = slot_bytes
        self.slots = slots
        size = slot_bytes * slots
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise Detached(f"arena_path {path} cannot be opened: {error.strerror}") from error
        try:
            if os.fstat(fd).st_size < size:
                raise FormatRefused(f"arena_path {path} is shorter than {slots} slots")
            self._view = map_shared(fd, size)
        finally:
            os.close(fd)

    def _slot(self, slot: int) -> memoryview:
        try:
            return self._view[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]
        except ValueError:  # a released view
            raise Detached("the arena was let go of") from None

    def read(
        self, slot: int, wanted: Wanted, out: Bytes | Target, check_payload: bool = True
    ) -> None:
        """Copy a block out, if it is what was asked, whole and unchanged.

        Args:
            slot: from the index; a number out of range is a block that is not there.
            wanted: what the block must be.
            out: wanted.payload_bytes long; undefined after an error.
            check_payload: as proto.slot.read_slot says.

        Raises:
            BlockMissing, BlockTorn, BlockCorrupt: as proto.slot.read_slot says.
            Detached: another thread called close.
        """
        if not 0 <= slot < self.slots:
            raise BlockMissing(f"slot {slot} is not one of {self.slots}")
        if isinstance(out, np.ndarray):
            read_slot(self._slot(slot), wanted, out, check_payload)
        else:
            _read_beside(SlotReader(self._slot(slot), wanted), out, check_payload)

    def reader(self, slot: int, wanted: Wanted) -> SlotReader:
        """The same in parts; raises as read does."""
        if not 0 <= slot < self.slots:
            raise BlockMissing(f"slot {slot} is not one of {self.slots}")
        return SlotReader(self._slot(slot), wanted)

    def rising_reader(self, slot: int, wanted: Wanted) -> RisingReader:
        """The same of a block that rises into the slot; raises as proto.slot.RisingReader says."""
        if not 0 <= slot < self.slots:
            raise BlockMissing(f"slot {slot} is not one of {self.slots}")
        return RisingReader(self._slot(slot), wanted)

    def shown(self, slot: int) -> int:
        """See proto.slot.shown; 0 of a slot that there is not."""
        return shown(self._slot(slot)) if 0 <= slot < self.slots else 0

    def fill(self, slot: int, header: BlockHeader, payload: Bytes) -> None:
        """Write a record into a slot that is reserved for this worker.

        The slot stays unreadable until the sidecar has taken the commit.

        Args:
            slot: from a reservation.
            header: what to write; header.checksum is that of payload.
            payload: shape (header.payload_bytes,), uint8.

        Raises:
            Detached: another thread called close.
        """
        assert 0 <= slot < self.slots, f"slot {slot} is not one of {self.slots}"
        fill_slot(self._slot(slot), header, payload)

    def begin_fill(self, slot: int, token_bytes: int, payload: Source) -> Bytes:
        """Begin to fill a slot that is reserved for this worker from a device's page.

        Args:
            slot: from a reservation.
            token_bytes: of the record's tokens.
            payload: to be settled; then end_fill.

        Returns:
            The payload in its place, (payload.nbytes,), uint8.

        Raises:
            Detached: another thread called close.
        """
        assert 0 <= slot < self.slots, f"slot {slot} is not one of {self.slots}"
        view, start = self._slot(slot), header_length(token_bytes)
        assert start + payload.nbytes <= len(view), "the record is larger than the slot"
        place: Bytes = np.frombuffer(view, np.uint8, payload.nbytes, start)
        payload.give(place)
        return place

    def end_fill(self, slot: int, header: BlockHeader) -> None:
        """Write the header; the payload, header.payload_bytes long, is in its place already."""
        pack_header(header, self._slot(slot))

    def prefault(self, stop: Event, pinner: Pinner | None = None) -> None:
        """Map all pages, so that no copy waits for a fault: 20 ms of CPU for 256 MiB.

        Args:
            stop: set it, and join the thread, before close.
            pinner: told of the memory then; unpin before close.
        """
        populate(self._view, stop)
        if pinner is not None and not stop.is_set():
            pinner.pin(self._view, self.slot_bytes, stop)

    def unpin(self, pinner: Pinner) -> None:
        """Undo what the pinner of prefault did."""
        pinner.unpin(self._view)

    def close(self) -> None:
        """Let go of the memory, as soon as no thread reads from it."""
        self._view.release()


def _read_beside(reader: SlotReader, out: Target, check_payload: bool) -> None:
    """What proto.slot.read_slot does, to a device: the sum is taken while the device copies."""
    summed = xxhash.xxh3_64() if check_payload else None
    try:
        taken = out.take(reader.payload, 0, summed)
        if summed is not None and not taken:
            summed.update(reader.payload.data)
    finally:
        out.settle()
    # After the copy: until then the device read the slot.
    reader.check(None if summed is None else summed.intdigest())
