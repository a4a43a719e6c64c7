"""Bytes that other processes, disks and hosts rely on, frozen. A change here is a new version."""

from __future__ import annotations

import mmap

import numpy as np

from kvist.proto.cache_pb2 import AttachReply, Chunk
from kvist.proto.keys import NO_KEY, BlockKey, Namespace, block_keys
from kvist.proto.layout import BlockFormat
from kvist.proto.record import BlockHeader, checksum, pack_header, unpack_header
from kvist.proto.slot import begin, fill_slot, publish
from kvist.tiers.flash_index import FlashEntry, pack_value, unpack_value
from kvist.tiers.segment import Superblock

NAMESPACE = Namespace(
    model="sha256:0123",
    format=BlockFormat(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16", block_tokens=4),
    rope="theta=100000",
    compute="bfloat16/onednn",
    adapter="",
    salt="tenant",
)
PROMPT = np.array([1, 2, 3, 2**32 - 1, 5, 6, 7, 8, 9], np.uint32)
PAYLOAD = np.arange(256, dtype=np.uint8)

DIGEST = "60f1377d09d9475155aa67d0f6625ae62bdf4669edb19acf2026bfe174551501"
KEYS = ["879c58eaab9417d78011c703e47952fd", "5ad9393d9be756046408010e406f559f"]
HEADER = (
    "00000000000000004b56495354424c4b01000000001000005ad9393d9be75604"
    "6408010e406f559f879c58eaab9417d78011c703e47952fd60f1377d09d94751"
    "55aa67d0f6625ae62bdf4669edb19acf2026bfe1745515010100000004000000"
    "0001000000000000712d953b43a4089400f1536500000000ec72cfcb0502fe68"
    "05000000060000000700000008000000"
)
PAYLOAD_CHECKSUM = 0x9408A4433B952D71
CHUNK = "0a10303132333435363738396162636465661080201a020102208040"
ATTACH_REPLY = (
    "0a01731210000102030405060708090a0b0c0d0e0f1a022f6922022f612a022f7232022f6238804040034802"
)
INDEX_VALUE = (
    "0700000001000000000100000000000004000000000000000000000000000000"
    "0000000060f1377d09d9475155aa67d0f6625ae62bdf4669edb19acf2026bfe1"
    "745515013258314b291e016e"
)
SUPERBLOCK = "4b56495354464c5301000000010000000020000000000000000002000000000062f7bfec0f2bb89f"


def header() -> BlockHeader:
    return BlockHeader(
        key=BlockKey(bytes.fromhex(KEYS[1])),
        parent=BlockKey(bytes.fromhex(KEYS[0])),
        namespace=bytes.fromhex(DIGEST),
        depth=1,
        tokens=PROMPT[4:8].tobytes(),
        payload_bytes=256,
        checksum=PAYLOAD_CHECKSUM,
        created_s=1_700_000_000,
    )


def entry() -> FlashEntry:
    return FlashEntry(
        slot=7,
        key=header().key,
        parent=NO_KEY,
        namespace=bytes.fromhex(DIGEST),
        depth=1,
        payload_bytes=256,
        block_tokens=4,
    )


def test_the_digest_of_a_namespace_is_frozen() -> None:
    assert NAMESPACE.digest().hex() == DIGEST


def test_block_keys_are_frozen() -> None:
    assert [key.hex() for key in block_keys(bytes.fromhex(DIGEST), PROMPT, 4)] == KEYS


def test_the_payload_checksum_is_frozen() -> None:
    assert checksum(PAYLOAD) == PAYLOAD_CHECKSUM


def test_the_header_of_a_record_is_frozen() -> None:
    slot = memoryview(bytearray(4096))
    pack_header(header(), slot)
    assert bytes(slot[:144]).hex() == HEADER
    assert bytes(slot[144:]) == bytes(4096 - 144)
    assert unpack_header(memoryview(bytes.fromhex(HEADER))) == header()


def test_a_slot_is_generation_then_header_then_payload_at_4096() -> None:
    slot = memoryview(mmap.mmap(-1, 8192))
    begin(slot)
    fill_slot(slot, header(), PAYLOAD)
    assert bytes(slot[:8]).hex() == "0100000000000000"
    publish(slot)
    assert bytes(slot[:8]).hex() == "0200000000000000"
    assert bytes(slot[8:144]).hex() == HEADER[16:]
    assert bytes(slot[4096:4352]) == bytes(range(256))


def test_messages_are_frozen() -> None:
    chunk = Chunk(key=b"0123456789abcdef", offset=4096, data=b"\x01\x02", record_bytes=8192)
    assert chunk.SerializeToString(deterministic=True).hex() == CHUNK
    reply = AttachReply(
        session="s",
        boot_epoch=bytes(range(16)),
        index_path="/i",
        arena_path="/a",
        ring_path="/r",
        bell_path="/b",
        slot_bytes=8192,
        dram_slots=3,
        reservation_limit=2,
    )
    assert reply.SerializeToString(deterministic=True).hex() == ATTACH_REPLY


def test_a_value_of_the_flash_index_is_frozen() -> None:
    assert pack_value(entry()).hex() == INDEX_VALUE
    assert unpack_value(entry().key, bytes.fromhex(INDEX_VALUE)) == entry()


def test_the_superblock_is_frozen() -> None:
    data = Superblock(slot_bytes=8192, slots_per_segment=131072).pack()
    assert data[:40].hex() == SUPERBLOCK
    assert data[40:] == bytes(4096 - 40)
