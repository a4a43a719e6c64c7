"""Records to and from segments: aligned memory, the header page's detour, the checks of a read."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import lmdb
import xxhash

from kvist.proto.errors import BlockCorrupt, FormatRefused, TierOffline
from kvist.proto.record import MAGIC, PAGE_BYTES, BlockHeader, seal, unpack_header
from kvist.proto.slot import payload_of
from kvist.proto.verify import Verifier
from kvist.tiers.flash_index import FlashEntry
from kvist.tiers.segment import Segments, aligned_buffer

_GENERATION = slice(0, 8)
_REST_OF_PAGE = slice(8, PAGE_BYTES)
_NO_GENERATION = bytes(8)
_MAGIC = slice(8, 16)
_HEADER_BYTES = struct.Struct("<I")
_HEADER_BYTES_OFFSET = 20


DEVICE_ERRORS = (OSError, lmdb.Error)
"""What a failing device shows as."""


class Device:
    """A context around everything that touches the device: the first error closes the gate.

    Attributes:
        failure: why every entry is refused, in words; "" when it is not.
    """

    def __init__(self, name: str) -> None:
        """name: what the words begin with."""
        self._name = name
        self.failure = ""

    def __enter__(self) -> None:
        if self.failure:
            raise TierOffline(self.failure)

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, DEVICE_ERRORS):
            self.failure = f"{self._name}: {error}"
            raise TierOffline(self.failure) from error


@dataclass(frozen=True, slots=True)
class Part:
    """How far a record has been read.

    Attributes:
        end: its bytes up to here are there.
        is_last: that is all of it, and it is whole.
        header: what it says; nothing of the payload is proven before the last part.
    """

    end: int
    is_last: bool
    header: BlockHeader


class RecordIo:
    """Transfers of whole records, from any number of threads at once.

    Attributes:
        verify: says which payloads are checked when they are read.
        segments: to read from and to write to; set, and closed, by the owner.

    The first page of a record always goes by way of a page of our own, so that the generation
    word of a DRAM slot is neither written to the disk nor overwritten from it. The rest goes
    straight to and from DRAM slots. A detour through huge pages and a copy was as fast with 1.4 MiB
    records (1.1 to 1.2 GB/s read, 1.4 to 2.2 written either way) and cost 120 us more of CPU each.
    """

    segments: Segments

    def __init__(self, slot_bytes: int) -> None:
        """slot_bytes: of the segments."""
        self.verify = Verifier("always")
        self._slot_bytes = slot_bytes
        self._pages: list[memoryview] = []
        self._buffers: list[memoryview] = []

    @contextmanager
    def buffer(self) -> Iterator[memoryview]:
        """Aligned memory for one slot; there come to be as many as threads use at once."""
        with _lent(self._buffers, self._slot_bytes) as buffer:
            yield buffer

    def write(self, slot: int, header: BlockHeader, record: memoryview) -> None:
        """Write a record with generation 0, and with a checksum whether it has one or not.

        Args:
            slot: where.
            header: of the record.
            record: page-aligned memory, the record and no more.

        Raises:
            OSError: the device failed.
        """
        with _lent(self._pages, PAGE_BYTES) as page:
            page[_GENERATION] = _NO_GENERATION
            page[_REST_OF_PAGE] = record[_REST_OF_PAGE]
            seal(header, payload_of(record, header), page)
            self.segments.write(slot, [page, record[PAGE_BYTES:]])

    def read(self, slot: int, record: memoryview, part_bytes: int) -> Iterator[Part]:
        """Read a record part by part, leaving the generation word of record alone.

        Args:
            slot: where.
            record: page-aligned memory, as long as the record.
            part_bytes: see part_ends.

        Yields:
            what is there, after each part but one that ends amid the header; the last when the
            record was found to be whole.

        Raises:
            BlockCorrupt: a checksum differs, or the segment file was cut.
            FormatRefused: a record of another version.
            OSError: the device failed.
        """
        header, done, first = None, 0, 0
        summed = xxhash.xxh3_64() if self.verify.wanted() else None
        for end in part_ends(len(record), part_bytes):
            self._read_part(slot, record[first:end], first)
            first, is_last = end, end == len(record)
            header = header or _header_in(record, end)
            if header is None:
                continue
            if summed is not None:
                there = end - header.shape.header_bytes
                summed.update(payload_of(record, header)[done:there].data)
                done = there
                if is_last and summed.intdigest() != header.checksum:
                    raise BlockCorrupt("payload checksum differs")
            yield Part(end, is_last, header)

    def _read_part(self, slot: int, part: memoryview, first: int) -> None:
        """Raises: BlockCorrupt: the file is too short. OSError."""
        if first:
            count = self.segments.read(slot, [part], first)
        else:
            with _lent(self._pages, PAGE_BYTES) as page:
                count = self.segments.read(slot, [page, part[PAGE_BYTES:]])
                part[_REST_OF_PAGE] = page[_REST_OF_PAGE]
        if count < len(part):
            raise BlockCorrupt("the segment file ends inside the slot")

    def entry(self, slot: int, memory: memoryview) -> FlashEntry | None:
        """What the header in a slot says for the index; otherwise as header."""
        header = self.header(slot, memory)
        if header is None:
            return None
        entry = FlashEntry(
            slot, header.key, header.parent, header.namespace, header.depth,
            header.payload_bytes, header.shape.block_tokens,
        )  # fmt: skip
        return entry if self.segments.fits(slot, entry.record_bytes) else None

    def header(self, slot: int, memory: memoryview) -> BlockHeader | None:
        """What the header in a slot says, payload unread; None when none is there or it is damaged.

        Args:
            slot: where.
            memory: from buffer.

        Raises:
            OSError: the device failed.
        """
        self.segments.read(slot, [memory[:PAGE_BYTES]])
        (header_bytes,) = _HEADER_BYTES.unpack_from(memory, _HEADER_BYTES_OFFSET)
        is_long = PAGE_BYTES < header_bytes <= len(memory) and not header_bytes % PAGE_BYTES
        if memory[_MAGIC] == MAGIC and is_long:
            self.segments.read(slot, [memory[:header_bytes]])
        try:
            return unpack_header(memory)
        except (BlockCorrupt, FormatRefused):
            return None


def part_ends(length: int, part_bytes: int) -> list[int]:
    """Into which parts a record is cut: one of half of part_bytes, so that who follows can begin,
    then even ones of part_bytes or a little more.

    Args:
        length: of the record, whole pages.
        part_bytes: a record shorter than two of these is one part; 0 cuts none.

    Returns:
        the byte after each part, a page's first, ascending; the last is length.
    """
    if not part_bytes or length < 2 * part_bytes:
        return [length]
    first = max(1, part_bytes // 2 // PAGE_BYTES)
    pages = length // PAGE_BYTES - first
    parts = pages * PAGE_BYTES // part_bytes
    return [(first + pages * part // parts) * PAGE_BYTES for part in range(parts + 1)]


def _header_in(record: memoryview, end: int) -> BlockHeader | None:
    """The header of a record whose bytes up to end are there; None when it is longer than these.

    Raises: BlockCorrupt, FormatRefused: as proto.record.unpack_header says.
    """
    (header_bytes,) = _HEADER_BYTES.unpack_from(record, _HEADER_BYTES_OFFSET)
    return unpack_header(record) if header_bytes <= end or end == len(record) else None


@contextmanager
def _lent(idle: list[memoryview], length: int) -> Iterator[memoryview]:
    # Taking from a list and giving back are single steps under the interpreter's lock.
    try:
        memory = idle.pop()
    except IndexError:
        memory = aligned_buffer(length)
    try:
        yield memory
    finally:
        idle.append(memory)
