"""Blocks that a number determines, so that whoever reads one can tell whether it is right."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.record import BlockHeader, Bytes, RecordShape, Wanted, checksum
from kvist.tiers.flash_index import FlashEntry

NAMESPACE = bytes(range(32))
SHAPE = RecordShape(payload_bytes=4800, block_tokens=4)
SLOT_BYTES = SHAPE.record_bytes


@dataclass(frozen=True, slots=True)
class Block:
    """A block as it goes into a tier and as it must come out."""

    header: BlockHeader
    payload: Bytes

    @property
    def wanted(self) -> Wanted:
        """What a reader of this block asks for."""
        header = self.header
        return Wanted(header.key, header.namespace, header.tokens, header.payload_bytes)

    def wanted_but(self, **changes: bytes) -> Wanted:
        """What somebody asks for who wants another block."""
        return replace(self.wanted, **changes)  # type: ignore[arg-type]

    def entry(self, slot: int) -> FlashEntry:
        """What the flash index says of it."""
        header = self.header
        return FlashEntry(
            slot, header.key, header.parent, header.namespace, header.depth,
            header.payload_bytes, header.shape.block_tokens,
        )  # fmt: skip


def key_of(number: int) -> BlockKey:
    """The key of a block; the number can be read from it."""
    return BlockKey(number.to_bytes(8, "little") + b"numbered")


def number_of(key: bytes) -> int:
    """The number of a key."""
    return int.from_bytes(key[:8], "little")


def make_block(number: int, shape: RecordShape = SHAPE) -> Block:
    """The block of a number: everything in it follows from it."""
    random = np.random.default_rng(number)
    payload = random.integers(0, 256, shape.payload_bytes, dtype=np.uint8)
    tokens = random.integers(0, 2**32, shape.block_tokens, dtype=np.uint32)
    header = BlockHeader(
        key=key_of(number),
        parent=key_of(number - 1) if number else NO_KEY,
        namespace=NAMESPACE,
        depth=number,
        tokens=tokens.astype("<u4").tobytes(),
        payload_bytes=shape.payload_bytes,
        checksum=checksum(payload),
        created_s=1_700_000_000 + number,
    )
    return Block(header, payload)


def empty(block: Block) -> Bytes:
    """Memory for the payload, with something in it that is not the payload."""
    return np.full(block.header.payload_bytes, 0xEE, np.uint8)
