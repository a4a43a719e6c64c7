"""Record headers: random pages, and good records with a few bytes, or signed fields, changed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import xxhash
from hypothesis import strategies as st
from sim.blocks import SLOT_BYTES, make_block

from fuzz.target import Check, Target
from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn, FormatRefused
from kvist.proto.record import PAGE_BYTES, Wanted, unpack_header
from kvist.proto.slot import fill_slot, payload_of, publish, read_slot

_FIELDS, _CHECK_OFFSET, _TOKENS_OFFSET = slice(8, 120), 120, 128
# name -> offset, format: those that say how long something is, or whose it is.
_NUMBERS = {
    "version": (16, "<I"),
    "header_bytes": (20, "<I"),
    "depth": (88, "<I"),
    "token_count": (92, "<I"),
    "payload_bytes": (96, "<Q"),
    "checksum": (104, "<Q"),
    "created_s": (112, "<Q"),
}
BLOCKS = [make_block(number) for number in range(4)]
EDGES = [0, 1, 31, 992, 993, 4095, 4096, 4097, 8192, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def good_record(number: int) -> bytearray:
    """A published slot with the record of a block."""
    block = BLOCKS[number]
    slot = bytearray(SLOT_BYTES)
    fill_slot(memoryview(slot), block.header, block.payload)
    publish(memoryview(slot))
    return slot


@dataclass(frozen=True, slots=True)
class Damage:
    """What happens to a good record.

    Attributes:
        number: of the block.
        fields: (name, value) written into the header.
        signed: whether the header's checksum is made to fit again: what a writer with a fault
            would leave, where chance alone does not get past the checksum.
        bytes_at: (offset, byte) written after that.
        length: bytes that are left of the slot, at least a page.
    """

    number: int
    fields: tuple[tuple[str, int], ...]
    signed: bool
    bytes_at: tuple[tuple[int, int], ...]
    length: int

    def slot(self) -> bytearray:
        """The damaged slot."""
        slot = good_record(self.number)
        for name, value in self.fields:
            offset, form = _NUMBERS[name]
            struct.pack_into(form, slot, offset, value % (1 << 8 * struct.calcsize(form)))
        if self.signed:
            sign(slot)
        for offset, value in self.bytes_at:
            slot[offset % len(slot)] = value
        return slot[: self.length]


def sign(slot: bytearray) -> None:
    """Make the header's checksum fit what the header says now."""
    (tokens,) = struct.unpack_from("<I", slot, _NUMBERS["token_count"][0])
    signed = bytes(slot[_FIELDS]) + bytes(slot[_TOKENS_OFFSET : _TOKENS_OFFSET + 4 * tokens])
    struct.pack_into("<Q", slot, _CHECK_OFFSET, xxhash.xxh3_64_intdigest(signed))


_NAMES = st.sampled_from(sorted(_NUMBERS))
_VALUES = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
_PLACES = st.integers(0, 159) | st.integers(0, SLOT_BYTES - 1)

DAMAGES = st.builds(
    Damage,
    number=st.integers(0, 3),
    fields=st.lists(st.tuples(_NAMES, _VALUES), max_size=3).map(tuple),
    signed=st.booleans(),
    bytes_at=st.lists(st.tuples(_PLACES, st.integers(0, 255)), max_size=3).map(tuple),
    length=st.sampled_from([PAGE_BYTES, 2 * PAGE_BYTES, SLOT_BYTES]),
)
PAGES = st.binary(max_size=200).map(lambda data: bytearray(data.ljust(PAGE_BYTES, b"\0")))


@contextmanager
def _opened() -> Iterator[Check]:
    yield check_slot


def check_slot(data: object) -> None:
    """Whoever unpacks or reads a slot gets what is in it, or an error of the tree."""
    slot = data.slot() if isinstance(data, Damage) else data
    assert isinstance(slot, bytearray)
    view = memoryview(slot)
    try:
        header = unpack_header(view)
    except (BlockCorrupt, FormatRefused):
        header = None
    if header is not None:
        assert len(header.tokens) <= len(slot)
        try:
            payload = payload_of(view, header)
            assert payload.nbytes == header.payload_bytes <= len(slot)
        except BlockCorrupt:
            pass
    for block in BLOCKS[:2]:
        read = read_like(view, block.wanted)
        assert read is None or np.array_equal(read, block.payload), "wrong bytes were served"


def read_like(view: memoryview, wanted: Wanted) -> np.ndarray | None:
    """What a reader gets; None when it gets an error of the tree."""
    out = np.full(wanted.payload_bytes, 0xEE, np.uint8)
    try:
        read_slot(view, wanted, out)
    except (BlockCorrupt, BlockMissing, BlockTorn):
        return None
    return out


TARGET = Target("record header", DAMAGES | PAGES, _opened)
