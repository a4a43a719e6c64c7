"""The slot protocol: how one writer and any number of readers share a slot without a lock.

The first word of a slot is its generation (proto/record.py): odd while nobody may read it, even
when the record behind it is whole. An empty or freed slot is odd. A writer calls begin,
fill_slot, publish; a reader copies and then looks whether the generation is still the one it saw
before (a sequence lock). Nothing is held, so a reader that dies or stalls harms nobody.

A view passed here is a contiguous memoryview of format "B" over the slot's bytes, aligned to 8
and a multiple of 8 long; a cast to "Q" then reads and writes a word with one instruction.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn, FormatRefused
from kvist.proto.record import (
    BlockHeader,
    Bytes,
    Wanted,
    check_wanted,
    checksum,
    header_length,
    match,
    pack_header,
    unpack_header,
)

_WORD = 0xFFFFFFFFFFFFFFFF


def begin(slot: memoryview) -> None:
    """Make the slot unreadable: its generation goes to the next odd number, or stays if odd."""
    words = slot.cast("Q")
    words[0] |= 1


def publish(slot: memoryview) -> None:
    """Make the slot readable: its generation goes to the next even number."""
    words = slot.cast("Q")
    words[0] = ((words[0] | 1) + 1) & _WORD


def payload_of(slot: memoryview, header: BlockHeader) -> Bytes:
    """The payload that header describes, in place, shape (payload_bytes,), uint8.

    Raises:
        BlockCorrupt: it does not fit the slot.
    """
    start = header.shape.header_bytes
    if start + header.payload_bytes > len(slot):
        raise BlockCorrupt(f"payload_bytes {header.payload_bytes} does not fit the slot")
    return np.frombuffer(slot, np.uint8, header.payload_bytes, start)


def fill_slot(slot: memoryview, header: BlockHeader, payload: Bytes) -> None:
    """Write a record between begin and publish; the generation is not touched.

    Args:
        slot: writable, at least header.shape.record_bytes long.
        header: what to write; header.checksum is that of payload.
        payload: shape (header.payload_bytes,), uint8; or (rows, row_bytes), whose rows may lie
            apart and go into the slot behind one another.
    """
    assert payload.nbytes == header.payload_bytes, "the header is not that of the payload"
    start = header_length(len(header.tokens))
    assert start + payload.nbytes <= len(slot), "the record is larger than the slot"
    pack_header(header, slot)
    # Not a slice assignment of memoryviews: that would hold the interpreter's lock.
    into = np.frombuffer(slot, np.uint8, payload.nbytes, start)
    np.copyto(into.reshape(payload.shape), payload)


class SlotReader:
    """A record that is being copied out, in one part or in several.

    Args:
        slot: the slot's bytes; a writer may be at work in them.
        wanted: what the block must be.

    Attributes:
        payload: in place, (wanted.payload_bytes,), uint8; a copy counts once check has returned.

    Raises:
        BlockMissing: the slot is empty, freed or being written.
        BlockTorn: the slot was rewritten meanwhile; wins over BlockCorrupt.
        BlockCorrupt: the record is not what was asked, or its header is damaged.
    """

    __slots__ = ("_generation", "_sum", "_words", "payload")

    def __init__(self, slot: memoryview, wanted: Wanted) -> None:
        self._words = slot.cast("Q")
        self._generation = self._words[0]
        if self._generation & 1:
            raise BlockMissing("the slot holds no block")
        try:
            start, self._sum = match(slot, wanted) or _mismatch(slot, wanted)
            if start + wanted.payload_bytes > len(slot):
                raise BlockCorrupt(f"payload_bytes {wanted.payload_bytes} does not fit the slot")
        except (BlockCorrupt, FormatRefused) as error:
            self.check(None)
            raise BlockCorrupt(str(error)) from None
        self.payload: Bytes = np.frombuffer(slot, np.uint8, wanted.payload_bytes, start)

    def check(self, summed: int | None) -> None:
        """Called when the payload is copied.

        Args:
            summed: checksum of the copy; None compares none, see proto/verify.py.

        Raises:
            BlockTorn: the slot changed since the beginning; wins over BlockCorrupt.
            BlockCorrupt: the checksum differs.
        """
        if self._words[0] != self._generation:
            raise BlockTorn("the slot changed while it was read")
        if summed is not None and summed != self._sum:
            raise BlockCorrupt("payload checksum differs")


def read_slot(slot: memoryview, wanted: Wanted, out: Bytes, check_payload: bool = True) -> None:
    """Copy a block out, if it is what was asked, whole and unchanged.

    Args:
        slot: the slot's bytes; a writer may be at work in them.
        wanted: what the block must be.
        out: shape (wanted.payload_bytes,), uint8, writable; undefined after an error. Or
            (rows, row_bytes), whose rows may lie apart, as fill_slot takes it.
        check_payload: compare the payload's checksum too; see proto/verify.py.

    Raises:
        BlockMissing, BlockTorn, BlockCorrupt: as SlotReader says, of header and payload.
    """
    assert out.nbytes == wanted.payload_bytes, "out is not as long as the payload wanted"
    reader = SlotReader(slot, wanted)
    np.copyto(out, reader.payload.reshape(out.shape))
    reader.check(checksum(out) if check_payload else None)


def _mismatch(slot: memoryview, wanted: Wanted) -> NoReturn:
    """Say what is wrong. Raises: BlockCorrupt, FormatRefused."""
    check_wanted(unpack_header(slot), wanted)
    raise BlockCorrupt("the record's header is not as a writer of this version makes it")
