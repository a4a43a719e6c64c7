"""Copies in parts: the same bytes as whole ones, the same faults found; and whose turn it is."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.record import BlockHeader, Bytes, Wanted, checksum
from kvist.proto.slot import SlotReader, fill_slot, publish
from kvist.transfer.pace import BURST_S, YIELD_MAX_S, Pace
from kvist.transfer.pipeline import RUN_BYTES, LayerStream, layer_cuts

LAYERS, LAYER_BYTES = 6, 96
PAYLOAD = LAYERS * LAYER_BYTES


class Slot:
    """A slot with one block in it."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.memory = np.zeros(8192, np.uint8)
        self.view = memoryview(self.memory).cast("B")
        self.payload: Bytes = draw.integers(0, 256, PAYLOAD).astype(np.uint8)
        tokens = draw.integers(0, 1000, 4).astype("<u4").tobytes()
        key = BlockKey(draw.bytes(16))
        header = BlockHeader(key, NO_KEY, bytes(32), 0, tokens, PAYLOAD, checksum(self.payload), 1)
        fill_slot(self.view, header, self.payload)
        publish(self.view)
        self.wanted = Wanted(key, bytes(32), tokens, PAYLOAD)

    def reader(self) -> SlotReader:
        return SlotReader(self.view, self.wanted)


def load(slots: list[Slot]) -> tuple[LayerStream, list[Bytes]]:
    outs: list[Bytes] = [np.zeros(PAYLOAD, np.uint8) for _ in slots]
    readers = [slot.reader() for slot in slots]
    return LayerStream(readers, outs, [True] * len(slots), _no_patience), outs


@settings(max_examples=100, deadline=None)
@given(layers=st.integers(1, 200), payload=st.integers(1, 1 << 26))
def test_groups_of_layers_cover_all_layers_once_and_the_first_is_one(
    layers: int, payload: int
) -> None:
    cuts = layer_cuts(layers, layers * payload)
    assert cuts[-1] == layers
    assert cuts[0] == 1
    assert list(cuts) == sorted(set(cuts))
    # But for the last, none is shorter than it needs to be or twice the one before, nor a layer
    # longer.
    groups = [last - first for first, last in itertools.pairwise((0, *cuts[:-1]))]
    for before, group in itertools.pairwise(groups):
        assert group * payload >= RUN_BYTES or group == 2 * before
        assert (group - 1) * payload < RUN_BYTES


def test_after_each_group_its_layers_of_all_blocks_are_there_and_in_the_end_all_is_sound() -> None:
    slots = [Slot(seed) for seed in range(3)]
    stream, outs = load(slots)
    asked: list[int] = []
    for layers in stream.copy((1, 4, 6), asked.append):
        stop = layers * LAYER_BYTES
        for slot, out in zip(slots, outs, strict=True):
            assert np.array_equal(out[:stop], slot.payload[:stop])
            assert not out[stop:].any()
    assert stream.verdict() == (3, None)
    assert sum(asked) == 3 * PAYLOAD
    assert len(asked) == 9, "one copy for each block and group"


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_flipped_bit_in_any_layer_is_found_in_the_end(layer: int) -> None:
    slots = [Slot(seed) for seed in range(3)]
    reader = slots[1].reader()
    reader.payload[layer * LAYER_BYTES + 5] ^= 1
    stream, _ = load(slots)
    list(stream.copy((2, 6), _free))
    blocks, error = stream.verdict()
    assert blocks == 1
    assert isinstance(error, BlockCorrupt)


def test_a_slot_that_changes_between_two_groups_is_torn_even_when_its_bytes_are_right() -> None:
    slots = [Slot(seed) for seed in range(3)]
    stream, _ = load(slots)
    for layers in stream.copy((2, 6), _free):
        if layers == 2:
            slots[2].view.cast("Q")[0] += 2
    blocks, error = stream.verdict()
    assert blocks == 2
    assert isinstance(error, BlockTorn)


def test_a_slot_that_holds_another_block_or_none_is_not_even_begun() -> None:
    slot, other = Slot(1), Slot(2)
    with pytest.raises(BlockCorrupt, match="key"):
        SlotReader(slot.view, other.wanted)
    slot.view.cast("Q")[0] += 1
    with pytest.raises(BlockMissing):
        slot.reader()


def _no_patience() -> bool:
    """What is not there does not come."""
    return False


def _free(_count: int) -> None:
    """Nobody has to wait."""


class Clock:
    """Time passes by sleeping."""

    def __init__(self) -> None:
        self.at_s = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.at_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.at_s += seconds


def test_a_cap_holds_over_time_and_each_direction_has_its_own() -> None:
    clock = Clock()
    pace = Pace(1_000_000, 0, clock.now, clock.sleep)
    for _ in range(100):
        pace.before_load(50_000)
        pace.before_store(1 << 40)
    assert 5.0 - BURST_S <= clock.at_s + 0.05 <= 5.1
    assert pace.throttled_s == {"load": pytest.approx(clock.at_s), "store": 0.0}


def test_without_a_cap_nobody_waits() -> None:
    clock = Clock()
    pace = Pace(0, 0, clock.now, clock.sleep)
    for _ in range(10):
        pace.before_load(1 << 40)
        pace.before_store(1 << 40)
    assert (clock.slept, pace.yields) == ([], 0)


def test_a_store_lets_a_load_go_first_and_goes_on_when_it_has_ended() -> None:
    pace = Pace()
    pace.begin_load()
    stored = threading.Event()

    def store() -> None:
        pace.before_store(1)
        stored.set()

    thread = threading.Thread(target=store)
    thread.start()
    pace.end_load()
    assert stored.wait(10)
    thread.join()
    pace.before_store(1)
    assert pace.yields <= 1, "no load is left to wait for"


def test_a_store_waits_once_for_a_load_without_end_and_again_for_a_new_one() -> None:
    pace = Pace()
    pace.begin_load()
    for _ in range(20):
        pace.before_store(1)
    assert pace.yields == 1
    pace.begin_load()
    pace.before_store(1)
    assert pace.yields == 2
    assert YIELD_MAX_S < 1
