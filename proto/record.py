"""The record: one block as it lies in a DRAM slot, in a flash slot and on a stream.

A record is a header region and a payload region, each a multiple of 4096 bytes, so that a slot
of the arena goes to flash with one O_DIRECT write and comes back with one read. All numbers are
little-endian.

    offset  bytes  field
         0      8  generation      odd while the slot is written, even when stable; the upper 20
                                   bits are of one that is followed (proto/slot.py); not checksummed
         8      8  magic           "KVISTBLK"
        16      4  version         RECORD_VERSION
        20      4  header_bytes    offset of the payload
        24     16  key             block key
        40     16  parent          key of the block before, zeros for a first block
        56     32  namespace       digest
        88      4  depth           blocks before this one
        92      4  token_count     tokens in the block
        96      8  payload_bytes
       104      8  checksum        xxh3-64 of the payload; NOT_SUMMED in DRAM with dram_verify off
       112      8  created_s       unix time of the commit, whole seconds
       120      8  header_check    xxh3-64 of bytes [8, 120) and the tokens
       128    4*n  tokens          uint32 each
    header_bytes   payload_bytes   payload, then zeros or old bytes up to the slot's end

Why a reader may trust what it copied: the writer makes the generation odd before it touches
anything else and even after everything else; the reader reads an even generation, copies, and reads
the same generation again. On top of this the checksum covers the bytes and the tokens are compared.
What this needs of a processor is in docs/architecture.md and proto/verify.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from kvist.proto.errors import BlockCorrupt, FormatRefused
from kvist.proto.keys import BlockKey

PAGE_BYTES = 4096
MAGIC = b"KVISTBLK"
RECORD_VERSION = 1
TOKENS_OFFSET = 128
NOT_SUMMED = 0
"""In place of a checksum that nobody has made yet; only in DRAM, never on flash or a stream."""

_FIELDS = struct.Struct("<8sII16s16s32sIIQQQ")  # bytes [8, 120)
_CHECK = struct.Struct("<Q")
_HEAD = struct.Struct("<8sII16s16s32sIIQQQQ")  # bytes [8, 128), the check with them
_FIELDS_OFFSET = 8
_CHECK_OFFSET = 120

Bytes = npt.NDArray[np.uint8]


def round_up(count: int, unit: int) -> int:
    """The smallest multiple of unit that is at least count."""
    return -(-count // unit) * unit


def header_length(token_bytes: int) -> int:
    """Bytes before the payload of a record with so many bytes of tokens."""
    return -(-(TOKENS_OFFSET + token_bytes) // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class RecordShape:
    """Sizes of the records of one namespace.

    Attributes:
        payload_bytes: bytes of KV in a block.
        block_tokens: tokens in a block.
    """

    payload_bytes: int
    block_tokens: int

    @property
    def header_bytes(self) -> int:
        """Bytes before the payload, a multiple of PAGE_BYTES."""
        return header_length(4 * self.block_tokens)

    @property
    def record_bytes(self) -> int:
        """Bytes of a slot that holds such a record, a multiple of PAGE_BYTES."""
        return self.header_bytes + round_up(self.payload_bytes, PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a record says about its block; field by field as in the table above."""

    key: BlockKey
    parent: BlockKey
    namespace: bytes
    depth: int
    tokens: bytes
    payload_bytes: int
    checksum: int
    created_s: int

    @property
    def shape(self) -> RecordShape:
        """Sizes of this record."""
        return RecordShape(self.payload_bytes, len(self.tokens) // 4)


def checksum(payload: Bytes | memoryview | bytes) -> int:
    """xxh3-64, about 0.55 of a memcpy; releases the interpreter's lock.

    Args:
        payload: bytes; or an array of shape (rows, row_bytes) whose rows lie apart, for the same
            sum as if they stood behind one another.
    """
    if not isinstance(payload, np.ndarray):
        return xxhash.xxh3_64_intdigest(payload)
    if payload.flags.c_contiguous:
        return xxhash.xxh3_64_intdigest(payload.data)
    hasher = xxhash.xxh3_64()
    for row in payload:
        hasher.update(row.data)
    return hasher.intdigest()


def _fields_and_check(header: BlockHeader) -> bytes:
    fields = _FIELDS.pack(
        MAGIC,
        RECORD_VERSION,
        header_length(len(header.tokens)),
        header.key,
        header.parent,
        header.namespace,
        header.depth,
        len(header.tokens) // 4,
        header.payload_bytes,
        header.checksum,
        header.created_s,
    )
    return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields + header.tokens))


def seal(header: BlockHeader, payload: Bytes, page: memoryview) -> None:
    """Give a record its checksum if it has none; for what leaves DRAM.

    Args:
        header: of the record. payload: its payload.
        page: the record's first bytes, TOKENS_OFFSET or more, writable; its generation is kept.
    """
    if header.checksum == NOT_SUMMED:
        summed = replace(header, checksum=checksum(payload))
        page[_FIELDS_OFFSET:TOKENS_OFFSET] = _fields_and_check(summed)


def pack_header(header: BlockHeader, slot: memoryview) -> None:
    """Write a header into a slot, leaving the generation word alone.

    Args:
        header: what to write.
        slot: the slot's bytes, writable, at least header_bytes long.
    """
    slot[_FIELDS_OFFSET:TOKENS_OFFSET] = _fields_and_check(header)
    slot[TOKENS_OFFSET : TOKENS_OFFSET + len(header.tokens)] = header.tokens


def unpack_header(slot: memoryview) -> BlockHeader:
    """Read and check a header.

    Args:
        slot: the slot's bytes, at least PAGE_BYTES of them.

    Raises:
        FormatRefused: a record of another version.
        BlockCorrupt: not a record, or its header's checksum is wrong.
    """
    fields = bytes(slot[_FIELDS_OFFSET:_CHECK_OFFSET])
    (magic, version, header_bytes, key, parent, namespace, depth, token_count, payload_bytes,
     payload_check, created_s) = _FIELDS.unpack(fields)  # fmt: skip
    if magic != MAGIC:
        raise BlockCorrupt("the slot does not begin with a record")
    if version != RECORD_VERSION:
        raise FormatRefused(f"record version {version}, this program reads {RECORD_VERSION}")
    stop = TOKENS_OFFSET + 4 * token_count
    if stop > min(header_bytes, len(slot)):
        raise BlockCorrupt(f"token_count {token_count} does not fit the header")
    tokens = bytes(slot[TOKENS_OFFSET:stop])
    (check,) = _CHECK.unpack(slot[_CHECK_OFFSET:TOKENS_OFFSET])
    if check != xxhash.xxh3_64_intdigest(fields + tokens):
        raise BlockCorrupt("header checksum differs")
    return BlockHeader(
        BlockKey(key), BlockKey(parent), namespace, depth, tokens, payload_bytes, payload_check,
        created_s,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a reader asked for; a record that differs in any of it is not served.

    Attributes:
        key: block key.
        namespace: digest, 32 bytes.
        tokens: the block's own token ids as little-endian uint32 bytes.
        payload_bytes: length of the payload.
    """

    key: BlockKey
    namespace: bytes
    tokens: bytes
    payload_bytes: int


def match(slot: memoryview, wanted: Wanted) -> tuple[int, int] | None:
    """unpack_header and check_wanted in one, without an object: 4 us where those take 12.

    Returns:
        offset of the payload and its checksum; None when anything at all is not as it should be,
        for those two to say what.
    """
    head = bytes(slot[_FIELDS_OFFSET : TOKENS_OFFSET + len(wanted.tokens)])
    (magic, version, header_bytes, key, _, namespace, _, token_count, payload_bytes,
     payload_check, _, check) = _HEAD.unpack_from(head)  # fmt: skip
    tokens = head[_HEAD.size :]
    is_it = (
        key == wanted.key
        and tokens == wanted.tokens
        and namespace == wanted.namespace
        and payload_bytes == wanted.payload_bytes
        and 4 * token_count == len(tokens)
        and (magic, version) == (MAGIC, RECORD_VERSION)
        and header_bytes == header_length(len(tokens))
        and check == xxhash.xxh3_64_intdigest(head[: _FIELDS.size] + tokens)
    )
    return (header_bytes, payload_check) if is_it else None


def check_wanted(header: BlockHeader, wanted: Wanted) -> None:
    """Compare a record's header with what was asked.

    Raises:
        BlockCorrupt: the message names the first field that differs.
    """
    for field in ("key", "namespace", "tokens", "payload_bytes"):
        if getattr(header, field) != getattr(wanted, field):
            raise BlockCorrupt(f"the record's {field} is not what was asked")
