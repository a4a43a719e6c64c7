"""The slot protocol: how one writer and any number of readers share a slot without a lock.

The first word of a slot is its generation (proto/record.py): odd while nobody may read it, even
when the record behind it is whole. An empty or freed slot is odd. A writer calls begin,
fill_slot, publish; a reader copies and then looks whether the generation is still the one it saw
before (a sequence lock). Nothing is held, so a reader that dies or stalls harms nobody.

A record that rises from flash may be followed while it comes. Its writer says with show how many of
its pages are there: that stands in the upper bits of the word, above the odd generation, and as
long as the generation stays these pages do not change. A reader (RisingReader) copies what is
shown, and in the end the generation must be the next one: the writer has found the whole record
sound and published it. A rise that fails ends in begin, as every use of a slot does, which never
gives a generation that was there before.

A view passed here is a contiguous memoryview of format "B" over the slot's bytes, aligned to 8
and a multiple of 8 long; a cast to "Q" then reads and writes a word with one instruction.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn, FormatRefused
from kvist.proto.record import (
    PAGE_BYTES,
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

GENERATION_BITS = 44
"""Of the first word; above them stand the pages that are shown, at most 2**20 of 4 KiB. A slot that
is written 10,000 times a second comes to the same generation again after 28 years."""

_GENERATION = (1 << GENERATION_BITS) - 1


def begin(slot: memoryview) -> None:
    """Make the slot unreadable: its generation goes to the next odd number, nothing is shown."""
    words = slot.cast("Q")
    words[0] = (words[0] + 1 | 1) & _GENERATION


def show(slot: memoryview, length: int) -> None:
    """Between begin and publish: the first length bytes of the record are there, to stay."""
    words = slot.cast("Q")
    words[0] = words[0] & _GENERATION | length // PAGE_BYTES << GENERATION_BITS


def publish(slot: memoryview) -> None:
    """Make the slot readable: its generation goes to the next even number."""
    words = slot.cast("Q")
    words[0] = ((words[0] | 1) + 1) & _GENERATION


def shown(slot: memoryview) -> int:
    """Bytes of a record that is rising that are there; the slot's length when it is published."""
    word: int = slot.cast("Q")[0]
    return (word >> GENERATION_BITS) * PAGE_BYTES if word & 1 else len(slot)


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

    __slots__ = ("_generation", "_start", "_sum", "_words", "payload")

    def __init__(self, slot: memoryview, wanted: Wanted) -> None:
        self._words = slot.cast("Q")
        self._generation = self._opened(self._words[0], header_length(len(wanted.tokens)))
        self._start = 0
        try:
            self._start, self._sum = match(slot, wanted) or _mismatch(slot, wanted)
            if self._start + wanted.payload_bytes > len(slot):
                raise BlockCorrupt(f"payload_bytes {wanted.payload_bytes} does not fit the slot")
        except (BlockCorrupt, FormatRefused) as error:
            self.has(0)
            raise BlockCorrupt(str(error)) from None
        self.payload: Bytes = np.frombuffer(slot, np.uint8, wanted.payload_bytes, self._start)

    def _opened(self, word: int, header_bytes: int) -> int:
        """The generation that is read. Raises: BlockMissing."""
        del header_bytes  # they are there
        if word & 1:
            raise BlockMissing("the slot holds no block")
        return word

    def has(self, count: int | None) -> bool:
        """Whether the payload's first count bytes are there; None: all of it, and published.

        Raises:
            BlockTorn: the slot changed since the beginning.
        """
        del count  # all of them
        if self._words[0] != self._generation:
            raise BlockTorn("the slot changed while it was read")
        return True

    def check(self, summed: int | None) -> None:
        """Called when the payload is copied.

        Args:
            summed: checksum of the copy; None compares none, see proto/verify.py.

        Raises:
            BlockMissing: it is not published yet.
            BlockTorn: the slot changed since the beginning; wins over BlockCorrupt.
            BlockCorrupt: the checksum differs.
        """
        if not self.has(None):
            raise BlockMissing("the block has not risen yet")
        if summed is not None and summed != self._sum:
            raise BlockCorrupt("payload checksum differs")


class RisingReader(SlotReader):
    """A record that is copied out while it rises: what was shown, part by part; see SlotReader.

    Raises:
        BlockMissing: its header has not been shown, or it is published already.
    """

    __slots__ = ()

    def _opened(self, word: int, header_bytes: int) -> int:
        if not word & 1 or (word >> GENERATION_BITS) * PAGE_BYTES < header_bytes:
            raise BlockMissing("nothing rises in the slot")
        return word & _GENERATION

    def has(self, count: int | None) -> bool:
        """See SlotReader."""
        word = self._words[0]
        if word == (self._generation + 1) & _GENERATION:
            return True
        if word & _GENERATION != self._generation:
            raise BlockTorn("the block did not rise to its end")
        return count is not None and (word >> GENERATION_BITS) * PAGE_BYTES >= self._start + count


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
