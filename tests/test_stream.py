"""Records as chunks: what was cut comes together, and nothing else does."""

from __future__ import annotations

import mmap

import pytest
from sim.blocks import SLOT_BYTES, Block, make_block

from kvist.proto.cache_pb2 import Chunk
from kvist.proto.errors import BlockCorrupt, FormatRefused
from kvist.proto.record import RecordShape
from kvist.proto.slot import fill_slot
from kvist.transfer.stream import CHUNK_BYTES, Joiner, split

LONG = RecordShape(payload_bytes=5 * CHUNK_BYTES // 2, block_tokens=4)


def record_of(block: Block, generation: int = 8) -> memoryview:
    memory = memoryview(mmap.mmap(-1, block.header.shape.record_bytes))
    memory.cast("Q")[0] = generation
    fill_slot(memory, block.header, block.payload)
    return memory


def chunks_of(number: int = 1, shape: RecordShape = LONG) -> list[Chunk]:
    block = make_block(number, shape)
    return list(split(block.header.key, record_of(block)))


def test_a_record_comes_together_from_its_chunks_with_generation_zero() -> None:
    block = make_block(1, LONG)
    joiner = Joiner(LONG.record_bytes)
    chunks = list(split(block.header.key, record_of(block)))
    assert [len(chunk.data) for chunk in chunks] == [
        CHUNK_BYTES, CHUNK_BYTES, LONG.record_bytes - 2 * CHUNK_BYTES,
    ]  # fmt: skip
    assert [joiner.feed(chunk) for chunk in chunks[:-1]] == [None, None]
    assert joiner.pending_bytes == 2 * CHUNK_BYTES
    assert joiner.feed(chunks[-1]) == bytes(record_of(block, generation=0))
    assert joiner.pending_bytes == 0


def test_records_follow_one_another_in_a_stream() -> None:
    joiner = Joiner(LONG.record_bytes)
    chunks = [*chunks_of(1), *chunks_of(2, RecordShape(100, 4)), *chunks_of(3)]
    whole = [record for chunk in chunks if (record := joiner.feed(chunk))]
    assert [len(record) for record in whole] == [LONG.record_bytes, 8192, LONG.record_bytes]


def refused(joiner: Joiner, chunk: Chunk, reason: str) -> None:
    with pytest.raises(BlockCorrupt, match=reason):
        joiner.feed(chunk)
    assert joiner.pending_bytes == 0


def changed(chunk: Chunk, **fields: object) -> Chunk:
    copy = Chunk()
    copy.CopyFrom(chunk)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"key": b"short"}, "key"),
        ({"key": b"another key 1234"}, "key"),
        ({"offset": 4096}, "offset"),
        ({"data": b""}, "data"),
        ({"data": bytes(CHUNK_BYTES + 1)}, "data"),
        ({"data": bytes(4095)}, "header"),
        ({"data": bytes(CHUNK_BYTES)}, "record"),
        ({"record_bytes": LONG.record_bytes + 4096}, "record_bytes"),
        ({"record_bytes": LONG.record_bytes - 4096}, "record_bytes"),
        ({"record_bytes": 2**60}, "record_bytes"),
    ],
)
def test_a_first_chunk_that_is_not_the_begin_of_the_record_it_names_is_refused(
    fields: dict[str, object], reason: str
) -> None:
    joiner = Joiner(2 * LONG.record_bytes)
    refused(joiner, changed(chunks_of()[0], **fields), reason)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"key": b"another key 1234"}, "key"),
        ({"offset": 0}, "offset"),
        ({"offset": 2 * CHUNK_BYTES}, "offset"),
        ({"record_bytes": LONG.record_bytes + 4096}, "record_bytes"),
    ],
)
def test_a_later_chunk_that_does_not_continue_the_record_is_refused(
    fields: dict[str, object], reason: str
) -> None:
    joiner = Joiner(LONG.record_bytes)
    first, second, _ = chunks_of()
    joiner.feed(first)
    refused(joiner, changed(second, **fields), reason)


def test_more_data_than_announced_is_refused() -> None:
    joiner = Joiner(LONG.record_bytes)
    first, second, third = chunks_of()
    joiner.feed(first)
    joiner.feed(second)
    refused(joiner, changed(third, data=third.data + b"\0"), "past")


def test_a_record_beyond_the_limit_is_refused_before_anything_is_kept() -> None:
    refused(Joiner(SLOT_BYTES), chunks_of()[0], "allowed")


def test_a_flipped_byte_on_the_way_is_noticed_wherever_it_is() -> None:
    for index, position in ((0, 30), (0, 130), (0, 5000), (1, 0), (2, 17)):
        joiner = Joiner(LONG.record_bytes)
        chunks = chunks_of()
        data = bytearray(chunks[index].data)
        data[position] ^= 1
        chunks[index].data = bytes(data)
        with pytest.raises(BlockCorrupt):
            assert [joiner.feed(chunk) for chunk in chunks] == []


def test_a_record_of_another_version_is_refused_as_such() -> None:
    chunk = chunks_of()[0]
    with pytest.raises(FormatRefused, match="version"):
        Joiner(LONG.record_bytes).feed(
            changed(chunk, data=chunk.data[:16] + b"\x09" + chunk.data[17:])
        )


def test_after_a_refusal_the_next_record_is_taken() -> None:
    joiner = Joiner(LONG.record_bytes)
    chunks = chunks_of()
    refused(joiner, chunks[1], "offset")
    assert [joiner.feed(chunk) is None for chunk in chunks] == [True, True, False]
