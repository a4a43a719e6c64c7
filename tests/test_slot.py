"""The slot protocol: what a reader gets while a writer is at work."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sim.blocks import SHAPE, SLOT_BYTES, Block, empty, make_block

from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn
from kvist.proto.record import BlockHeader, Bytes, RecordShape, checksum
from kvist.proto.slot import begin, fill_slot, publish, read_slot

BIG = RecordShape(payload_bytes=512 * 1024, block_tokens=4)


def generation(slot: memoryview) -> int:
    return slot.cast("Q")[0]


@pytest.fixture
def slot() -> memoryview:
    return memoryview(mmap.mmap(-1, SLOT_BYTES))


@pytest.fixture
def stored(slot: memoryview) -> Block:
    block = make_block(1)
    begin(slot)
    fill_slot(slot, block.header, block.payload)
    publish(slot)
    return block


def test_a_published_block_is_read_back(slot: memoryview, stored: Block) -> None:
    out = empty(stored)
    read_slot(slot, stored.wanted, out)
    assert np.array_equal(out, stored.payload)


def test_begin_makes_the_generation_odd_publish_even_and_both_make_it_new(
    slot: memoryview,
) -> None:
    seen = [generation(slot)]
    for step in (begin, begin, publish, publish, begin, publish):
        step(slot)
        seen.append(generation(slot))
    assert seen == [0, 1, 3, 4, 6, 7, 8]


def test_the_generation_wraps_instead_of_failing(slot: memoryview) -> None:
    slot.cast("Q")[0] = 2**64 - 1
    publish(slot)
    assert generation(slot) == 0


def test_a_block_being_written_is_missing(slot: memoryview, stored: Block) -> None:
    begin(slot)
    with pytest.raises(BlockMissing):
        read_slot(slot, stored.wanted, empty(stored))


@pytest.mark.parametrize(
    "change", [{"key": b"k" * 16}, {"namespace": b"n" * 32}, {"tokens": bytes(16)}]
)
def test_a_block_that_differs_from_what_was_asked_is_not_served(
    slot: memoryview, stored: Block, change: dict[str, bytes]
) -> None:
    with pytest.raises(BlockCorrupt, match=next(iter(change))):
        read_slot(slot, stored.wanted_but(**change), empty(stored))


@pytest.mark.parametrize("offset", [8, 16, 20, 24, 56, 92, 96, 104, 120, 128, 143, 4096, 8895])
def test_any_flipped_bit_of_a_record_is_noticed(
    slot: memoryview, stored: Block, offset: int
) -> None:
    slot[offset] ^= 0x10
    with pytest.raises(BlockCorrupt):
        read_slot(slot, stored.wanted, empty(stored))


def test_a_payload_that_runs_past_the_slot_is_corrupt(slot: memoryview) -> None:
    block = make_block(1)
    begin(slot)
    fill_slot(slot, block.header, block.payload)
    publish(slot)
    with pytest.raises(BlockCorrupt, match="fit"):
        read_slot(slot[: SLOT_BYTES - 4096], block.wanted, empty(block))


class Interrupted(np.ndarray):
    """An output array; as soon as the copy into it is done, something happens to the slot."""

    happens: Callable[[], None]

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        done = super().__array_function__(func, types, args, kwargs)
        self.happens()
        return done


def test_a_slot_that_is_republished_between_copy_and_second_look_is_torn(
    slot: memoryview, stored: Block
) -> None:
    out = empty(stored).view(Interrupted)
    out.happens = lambda: publish(slot)
    with pytest.raises(BlockTorn):
        read_slot(slot, stored.wanted, out)


def test_torn_wins_over_corrupt(slot: memoryview, stored: Block) -> None:
    out = empty(stored).view(Interrupted)

    def rewrite() -> None:
        begin(slot)
        out[0] ^= 1

    out.happens = rewrite
    with pytest.raises(BlockTorn):
        read_slot(slot, stored.wanted, out)


def copies(shared: memoryview) -> Iterator[Bytes | None]:
    """Attempts to read the block; a copy that was accepted, or None for one that was not."""
    base = versions_of(0)[0]
    out = empty(base)
    while True:
        # Any version will do: they differ in payload and checksum only.
        try:
            read_slot(shared, base.wanted, out)
        except BlockTorn:
            yield None
        except BlockMissing:
            continue
        else:
            yield out


def versions_of(first: int) -> list[Block]:
    """One block in eight versions; every byte of a version is the same."""
    base = make_block(first, BIG)
    blocks = []
    for value in range(8):
        payload = np.full(BIG.payload_bytes, value, np.uint8)
        header: BlockHeader = replace(base.header, checksum=checksum(payload))
        blocks.append(Block(header, payload))
    return blocks


def rewrite_forever(shared: memoryview) -> None:
    while True:
        for block in versions_of(0):
            begin(shared)
            fill_slot(shared, block.header, block.payload)
            publish(shared)


def test_no_torn_copy_is_accepted_while_another_process_rewrites_the_slot() -> None:
    shared = memoryview(mmap.mmap(-1, BIG.record_bytes))
    begin(shared)
    writer = multiprocessing.get_context("fork").Process(target=rewrite_forever, args=(shared,))
    writer.start()
    accepted = torn = 0
    try:
        for copy in copies(shared):
            if copy is None:
                torn += 1
            else:
                accepted += 1
                assert copy.min() == copy.max(), "bytes of two versions"
            if (accepted >= 200 and torn >= 5) or accepted + torn >= 20_000:
                break
    finally:
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    assert accepted >= 200
    assert torn >= 5, "the writer never got between; the test has shown nothing"


def test_a_writer_that_dies_half_way_leaves_a_slot_that_reads_as_missing() -> None:
    shared = memoryview(mmap.mmap(-1, SLOT_BYTES))
    block = make_block(3)

    def die_inside() -> None:
        begin(shared)
        fill_slot(shared, block.header, block.payload)
        os.kill(os.getpid(), signal.SIGKILL)

    writer = multiprocessing.get_context("fork").Process(target=die_inside)
    writer.start()
    writer.join()
    with pytest.raises(BlockMissing):
        read_slot(shared, block.wanted, empty(block))


def test_a_record_of_another_shape_in_the_slot_is_corrupt_and_not_misread(
    slot: memoryview, stored: Block
) -> None:
    shorter = replace(stored.wanted, payload_bytes=SHAPE.payload_bytes - 1)
    with pytest.raises(BlockCorrupt, match="payload_bytes"):
        read_slot(slot, shorter, np.empty(shorter.payload_bytes, np.uint8))
