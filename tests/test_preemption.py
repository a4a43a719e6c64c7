"""What the connector keeps of a request that is about to lose its pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sim.fake_cache import FakeCache
from test_connector import Bench


@pytest.fixture
def cache() -> FakeCache:
    return FakeCache()


@pytest.fixture
def bench(cache: FakeCache) -> Iterator[Bench]:
    made = Bench(cache)
    yield made
    made.connector.close()


def test_what_a_preempted_request_lost_from_the_cache_is_stored_before_its_pages_go(
    cache: FakeCache, bench: Bench
) -> None:
    sequence = bench.sequence(4 * 10)
    bench.seat(sequence)
    bench.complete(sequence)
    bench.settled()
    for key in sequence.keys()[6:]:
        del cache.blocks[key]  # evicted meanwhile
    cache.store_gate.clear()
    bench.connector.keep(sequence)
    held = [sequence.pages[block] for block in range(6, 10)]
    bench.leave(sequence)
    assert bench.pages.used == 4, "they stay until they are copied"
    assert bench.pages.lookup(sequence.keys())[6:] == held
    cache.store_gate.set()
    bench.settled()
    assert set(sequence.keys()) == set(cache.blocks)
    assert bench.pages.used == 0


def test_what_a_full_queue_dropped_is_stored_when_its_request_is_preempted(
    cache: FakeCache,
) -> None:
    bench = Bench(cache, 40)
    cache.store_gate.clear()
    sequence = bench.sequence(4 * 20)
    bench.seat(sequence)
    bench.complete(sequence)
    assert bench.connector.store_drops["queue_full"] + bench.connector.store_drops["no_parent"]
    cache.store_gate.set()
    bench.settled()
    bench.connector.keep(sequence)
    bench.settled()
    assert set(sequence.keys()) == set(cache.blocks)
    bench.leave(sequence)
    bench.connector.close()


def test_what_is_on_its_way_is_not_stored_twice(cache: FakeCache, bench: Bench) -> None:
    cache.store_gate.clear()
    sequence = bench.sequence(4 * 10)
    bench.seat(sequence)
    bench.complete(sequence)
    copying = bench.connector.copying
    bench.connector.keep(sequence)
    assert bench.connector.copying == copying
    cache.store_gate.set()
    bench.settled()
    bench.leave(sequence)
