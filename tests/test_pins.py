"""Pins: a priority that decays, ends and is bounded, and never wedges a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.blocks import SLOT_BYTES
from sim.sidecar import Prompt, Sidecar
from sim.stores import Bench, chain, check, keys_of, worker_of

from kvist.cachesvc.placing.pins import Pins
from kvist.proto import cache_pb2
from kvist.proto.cache_pb2_grpc import CacheStub

SLOTS = 12


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, SLOTS)
    yield made
    made.close()


def turn(bench: Bench, first: int, blocks: int = SLOTS // 2) -> None:
    """Other blocks want room; each turn takes half of the tier."""
    for number in range(first, first + 100 * blocks, 100):
        assert bench._workers[0].put(chain(number, 1)) == ["stored"]


def test_pinned_blocks_are_passed_over_as_often_as_their_strength_says(bench: Bench) -> None:
    worker = worker_of(bench)
    pinned, plain = chain(0, 2), chain(100, 2)
    worker.put(pinned)
    worker.put(plain)
    assert bench.store.pin(keys_of(pinned), 600, 2) == 2
    turn(bench, 10_000, SLOTS)
    assert bench.tiers(plain) == []
    assert bench.tiers(pinned) == ["dram"] * 2
    turn(bench, 20_000, 4 * SLOTS)
    assert bench.tiers(pinned) == [], "it has decayed"
    assert bench.store.stats().pinned_blocks == 0
    # The leaf is passed over twice; its parent is no leaf until it has gone.
    assert bench.store.stats().spared_blocks >= 3


def test_a_pin_ends_with_its_time_and_with_unpin(bench: Bench) -> None:
    worker = worker_of(bench)
    for first, end in ((0, "time"), (100, "unpin")):
        worker.put(chain(first, 2))
        keys = keys_of(chain(first, 2))
        assert bench.store.pin(keys, 60, 50) == 2
        if end == "time":
            bench.clock_s += 62
        else:
            assert bench.store.unpin(keys) == 2
        turn(bench, 10_000 + 10_000 * first, SLOTS)
        assert bench.tiers(chain(first, 2)) == []
    check(bench)


def test_the_budget_bounds_what_is_pinned_and_comes_back(bench: Bench) -> None:
    bench.open(pin_bytes=3 * SLOT_BYTES)
    worker = bench.worker()
    blocks = chain(0, 5)
    worker.put(blocks)
    assert bench.store.pin(keys_of(blocks), 60, 1) == 3, "from the first on"
    assert bench.store.pin(keys_of(blocks)[3:], 60, 1) == 0
    assert bench.store.pin(keys_of(blocks)[:2], 60, 1) == 2, "anew costs nothing"
    bench.store.clear(None)
    assert bench.store.stats().pinned_blocks == 0
    worker.put(blocks)
    assert bench.store.pin(keys_of(blocks), 60, 1) == 3
    bench.clock_s += 62
    assert bench.store.pin(keys_of(blocks)[3:], 60, 1) == 2, "the others' time is over"


def test_a_cache_that_is_full_of_pinned_blocks_still_takes_new_ones(bench: Bench) -> None:
    bench.open(pin_bytes=SLOTS * SLOT_BYTES)
    worker = bench.worker()
    for first in range(0, 100 * SLOTS, 100):
        worker.put(chain(first, 1))
        assert bench.store.pin(keys_of(chain(first, 1)), 3600, 100) == 1
    assert bench.store.stats().pinned_blocks == SLOTS
    turn(bench, 50_000, 3 * SLOTS)
    assert bench.parts.dram.free_slots == 0
    assert bench.store.stats().pinned_blocks < SLOTS


def test_what_is_not_cached_is_not_pinned(bench: Bench) -> None:
    assert bench.open().pin(keys_of(chain(0, 2)), 60, 1) == 0
    worker = bench.worker()
    worker.put(chain(0, 1))
    assert bench.store.pin(keys_of(chain(0, 3)), 60, 1) == 1
    assert bench.store.unpin(keys_of(chain(500, 3))) == 0


def test_pin_and_unpin_over_grpc(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path)
    sidecar.start()
    try:
        prompt = Prompt(1, 4)
        sidecar.client().store(prompt.items)
        with sidecar.channel() as channel:
            stub = CacheStub(channel)
            assert stub.Pin(cache_pb2.PinRequest(keys=prompt.keys)).pinned == 4
            assert "kvist_pinned_blocks 4.0" in sidecar.get("metrics")
            assert stub.Unpin(cache_pb2.UnpinRequest(keys=prompt.keys[1:])).unpinned == 3
            with pytest.raises(grpc.RpcError, match="strength: 101"):
                stub.Pin(cache_pb2.PinRequest(keys=prompt.keys, strength=101))
    finally:
        sidecar.close()


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["pin", "unpin", "forget", "wait", "spare"]), st.integers(0, 9)),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(actions=ACTIONS, budget=st.integers(0, 6))
def test_pins_agree_with_a_dict_and_never_go_over_the_budget(
    actions: list[tuple[str, int]], budget: int
) -> None:
    clock = [100.0]
    pins = Pins(10, budget, lambda: clock[0])
    model: dict[int, list[float]] = {}  # row -> [until, lives]
    for what, row in actions:
        if what == "pin":
            for each in [each for each, (until, _) in model.items() if until <= clock[0]]:
                del model[each]
            fits = row in model or len(model) < budget
            assert pins.pin([row], 5, 2) == fits
            if fits:
                model[row] = [clock[0] + 6, 2]
        elif what == "unpin":
            assert pins.unpin([row]) == (row in model)
            model.pop(row, None)
        elif what == "forget":
            pins.forget(row)
            model.pop(row, None)
        elif what == "wait":
            clock[0] += row
        else:
            if row in model and model[row][0] <= clock[0]:
                del model[row]
            spared = row in model and model[row][1] > 0
            assert pins.spares("dram", row) == spared
            if spared:
                model[row][1] -= 1
        assert pins.count == len(model) <= budget
