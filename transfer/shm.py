"""Shared memory: a worker's view of the sidecar's arena, for copies without a call."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event

from kvist.proto.errors import BlockMissing, Detached, FormatRefused
from kvist.proto.memory import map_shared, populate
from kvist.proto.record import BlockHeader, Bytes, Wanted
from kvist.proto.slot import SlotReader, fill_slot, read_slot


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

    def read(self, slot: int, wanted: Wanted, out: Bytes, check_payload: bool = True) -> None:
        """Copy a block out, if it is what was asked, whole and unchanged.

        Args:
            slot: from the index; a number out of range is a block that is not there.
            wanted: what the block must be.
            out: shape (wanted.payload_bytes,), uint8, writable; undefined after an error.
            check_payload: as proto.slot.read_slot says.

        Raises:
            BlockMissing, BlockTorn, BlockCorrupt: as proto.slot.read_slot says.
            Detached: another thread called close.
        """
        if not 0 <= slot < self.slots:
            raise BlockMissing(f"slot {slot} is not one of {self.slots}")
        read_slot(self._slot(slot), wanted, out, check_payload)

    def reader(self, slot: int, wanted: Wanted) -> SlotReader:
        """The same in parts; raises as read does."""
        if not 0 <= slot < self.slots:
            raise BlockMissing(f"slot {slot} is not one of {self.slots}")
        return SlotReader(self._slot(slot), wanted)

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

    def prefault(self, stop: Event) -> None:
        """Map all pages, so that no copy waits for a fault: 20 ms of CPU for 256 MiB.

        Args:
            stop: set it, and join the thread, before close.
        """
        populate(self._view, stop)

    def close(self) -> None:
        """Let go of the memory, as soon as no thread reads from it."""
        self._view.release()
