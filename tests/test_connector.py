"""The connector: what is found, loaded, stored and counted, and which pages are held meanwhile."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
from sim.fake_cache import FakeCache

from kvist.cachesvc.log import Log
from kvist.engine.connector import Connector, Loaded
from kvist.engine.pages import Pages
from kvist.engine.request import CACHE_BYPASS, CACHE_ON, NewRequest, SamplingParams
from kvist.engine.sequence import Limits, Sequence, State
from kvist.proto.hints import Hint
from kvist.transfer.pages import HostPages

SIZE = 4
PAGE_BYTES = 32
PAGES = 400
DIGEST = bytes(range(32))
LIMITS = Limits(max_model_len=4096, block_tokens=SIZE)


class Bench:
    """A connector between a fake cache and a pool of bytes."""

    def __init__(self, cache: FakeCache | None, pages: int = PAGES) -> None:
        self.pages = Pages(pages)
        self.pool = np.zeros((pages, PAGE_BYTES), dtype=np.uint8)
        log = Log(io.StringIO())
        self.connector = Connector(cache, HostPages(self.page), self.pages, log, time.monotonic)

    def page(self, page: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return self.pool[page]

    def sequence(self, tokens: int, cache: str = CACHE_ON, salt: bytes = DIGEST) -> Sequence:
        request = NewRequest("r", list(range(tokens)), SamplingParams(), cache=cache)
        digest = None if cache == CACHE_BYPASS else salt
        return Sequence(request, 1, LIMITS, digest, 0.0)

    def seat(self, sequence: Sequence) -> None:
        """What the scheduler does at an admission."""
        pages = self.pages.lookup(sequence.keys()[: sequence.usable_blocks])
        self.pages.hold(pages)
        sequence.registered = len(pages)
        sequence.pages = pages + self.pages.allocate(sequence.pages_needed - len(pages))
        self.connector.find(sequence, len(pages))
        sequence.state = State.LOADING if sequence.found else State.RUNNING

    def complete(self, sequence: Sequence) -> None:
        """Compute all full blocks and store them."""
        first, full = sequence.registered, len(sequence.keys())
        for block in range(first, full):
            page = sequence.pages[block]
            self.pool[page] = block + 1
            sequence.pages[block] = self.pages.register(
                page, sequence.keys()[block], sequence.parent(block), block
            )
        sequence.registered = full
        self.connector.store(sequence, range(first, full))

    def leave(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.state = [], State.FINISHED

    def settle(self, until: Callable[[], bool]) -> list[Loaded]:
        """Poll until something holds."""
        loads: list[Loaded] = []
        deadline = time.monotonic() + 20
        while not until():
            assert time.monotonic() < deadline, "the threads do not come to an end"
            self.connector.wait(0.05)
            loads += self.connector.poll()
        return loads

    def idle(self) -> bool:
        return self.connector.copying == 0

    def settled(self) -> list[Loaded]:
        return self.settle(self.idle)


@pytest.fixture
def cache() -> FakeCache:
    return FakeCache()


@pytest.fixture
def bench(cache: FakeCache) -> Iterator[Bench]:
    made = Bench(cache)
    yield made
    made.connector.close()


def stored(cache: FakeCache, tokens: int) -> Sequence:
    """Fill the cache with a prompt, by an engine that is gone now."""
    donor = Bench(cache)
    sequence = donor.sequence(tokens)
    donor.seat(sequence)
    donor.complete(sequence)
    donor.settled()
    donor.connector.close()
    cache.counted.clear()
    cache.touched.clear()
    cache.batches.clear()
    return sequence


def test_what_one_engine_stores_another_loads_byte_for_byte(cache: FakeCache, bench: Bench) -> None:
    stored(cache, 13)
    sequence = bench.sequence(13)
    bench.seat(sequence)
    assert sequence.found == ("dram",) * 3
    bench.connector.load(sequence)
    (done,) = bench.settled()
    assert (done.blocks, done.reason) == (3, "")
    assert [bench.pool[page][0] for page in sequence.pages[:3]] == [1, 2, 3]
    assert cache.counted == [(13, {"dram": 12}, {"tail": 1})]
    assert (sequence.cached.dram, sequence.cached.total) == (12, 12)
    assert cache.touched == sequence.keys()[:3]


def test_hint_of_a_request_goes_with_its_touch_whatever_was_found(
    cache: FakeCache, bench: Bench
) -> None:
    stored(cache, 13)
    told = Hint(tool_pause_s=3, priority=1)
    for tokens in (13, 3):
        sequence = bench.sequence(tokens)
        sequence.request = msgspec.structs.replace(sequence.request, hint=told)
        cache.hints.clear()
        bench.seat(sequence)
        if sequence.found:
            bench.connector.load(sequence)
            bench.settled()
        assert cache.hints == [told]


def test_the_last_block_of_a_prompt_of_whole_blocks_is_tail(cache: FakeCache, bench: Bench) -> None:
    stored(cache, 12)
    sequence = bench.sequence(12)
    bench.seat(sequence)
    bench.connector.load(sequence)
    bench.settled()
    assert cache.counted == [(12, {"dram": 8}, {"tail": 4})]


def test_after_a_corrupt_block_everything_is_a_miss(cache: FakeCache, bench: Bench) -> None:
    keys = stored(cache, 20).keys()
    cache.corrupt = {keys[1]}
    sequence = bench.sequence(30)
    bench.seat(sequence)
    bench.connector.load(sequence)
    (done,) = bench.settled()
    assert (done.blocks, done.reason) == (1, "corrupt")
    # 5 of 7 usable blocks were found, the last two never stored.
    assert cache.counted == [(30, {"dram": 4}, {"corrupt": 16, "never_stored": 8, "tail": 2})]


def test_flash_blocks_rise_from_the_moment_the_request_arrives(
    cache: FakeCache, bench: Bench
) -> None:
    keys = stored(cache, 13).keys()
    cache.flash = set(keys[1:])
    sequence = bench.sequence(13)
    bench.connector.arrive(sequence)
    assert cache.prefetched == keys[:3]
    assert not cache.flash


def test_a_hit_counts_for_the_tier_it_was_in_when_looked_up(cache: FakeCache, bench: Bench) -> None:
    keys = stored(cache, 13).keys()
    cache.flash = set(keys[1:])
    sequence = bench.sequence(13)
    bench.seat(sequence)
    bench.connector.load(sequence)
    bench.settled()
    assert cache.counted == [(13, {"dram": 4, "flash": 8}, {"tail": 1})]


def test_a_block_that_does_not_rise_is_late(cache: FakeCache, bench: Bench) -> None:
    keys = stored(cache, 13).keys()
    cache.flash, cache.stuck = {keys[2]}, True
    sequence = bench.sequence(13)
    bench.seat(sequence)
    bench.connector.load(sequence)
    bench.settled()
    assert cache.counted == [(13, {"dram": 8}, {"flash_late": 4, "tail": 1})]


def test_pages_under_a_load_stay_held_when_the_request_is_aborted(
    cache: FakeCache, bench: Bench
) -> None:
    stored(cache, 13)
    cache.gate.clear()
    sequence = bench.sequence(13)
    bench.seat(sequence)
    bench.connector.load(sequence)
    loading = sequence.pages[:3]
    bench.leave(sequence)
    bench.pages.check(Counter(loading))
    cache.gate.set()
    assert bench.settled() == []
    bench.pages.check({})
    assert cache.counted == [], "nothing was served, so nothing is counted"


def test_pages_under_a_store_stay_held_when_the_request_ends(
    cache: FakeCache, bench: Bench
) -> None:
    cache.store_gate.clear()
    sequence = bench.sequence(13)
    bench.seat(sequence)
    bench.complete(sequence)
    pages = sequence.pages[:3]
    bench.leave(sequence)
    bench.pages.check(Counter(pages))
    cache.store_gate.set()
    bench.settled()
    bench.pages.check({})
    assert bench.connector.stored_blocks == 3
    assert len(cache.blocks) == 3


def test_a_store_call_takes_what_is_queued_up_to_a_batch(
    cache: FakeCache, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.engine.copying.STORE_BATCH", 32)
    cache.store_gate.clear()
    sequence = bench.sequence(4 * 81)
    bench.seat(sequence)
    bench.complete(sequence)
    cache.store_gate.set()
    bench.settled()
    assert sum(cache.batches) == 81
    assert max(cache.batches) == 32


def test_a_full_queue_drops_a_block_and_those_that_would_have_no_parent(
    cache: FakeCache, bench: Bench
) -> None:
    cache.store_gate.clear()
    sequence = bench.sequence(4 * 105)
    bench.seat(sequence)
    bench.complete(sequence)
    room = PAGES // 4
    assert bench.connector.store_drops == {"queue_full": 1, "no_parent": 105 - room - 1}
    cache.store_gate.set()
    bench.settled()
    assert len(cache.blocks) == room


def test_a_prefix_that_the_cache_lost_is_stored_again_when_the_pool_serves_it(
    cache: FakeCache, bench: Bench
) -> None:
    first = bench.sequence(13)
    bench.seat(first)
    bench.complete(first)
    bench.settled()
    for key in first.keys()[1:]:
        del cache.blocks[key]
    second = bench.sequence(13)
    bench.seat(second)
    bench.settled()
    assert set(cache.blocks) == set(first.keys())
    assert cache.counted[-1] == (13, {"hbm": 12}, {"tail": 1})


def test_the_pool_and_the_cache_serve_one_prompt_together(cache: FakeCache, bench: Bench) -> None:
    stored(cache, 21)
    short = bench.sequence(9)
    bench.seat(short)
    bench.connector.load(short)
    bench.settled()
    bench.complete(short)
    sequence = bench.sequence(21)
    bench.seat(sequence)
    assert (sequence.registered, sequence.found) == (2, ("dram",) * 3)
    bench.connector.load(sequence)
    bench.settled()
    assert cache.counted[-1] == (21, {"hbm": 8, "dram": 12}, {"tail": 1})


def test_without_a_sidecar_everything_is_a_miss_and_nothing_is_stored(
    cache: FakeCache, bench: Bench
) -> None:
    cache.state = "detached"
    sequence = bench.sequence(13)
    bench.seat(sequence)
    bench.complete(sequence)
    assert cache.counted == [(13, {}, {"detached": 12, "tail": 1})]
    assert bench.connector.store_drops == {"detached": 1, "no_parent": 2}
    assert (bench.connector.copying, bench.connector.state) == (0, "detached")


def test_without_a_cache_the_sums_still_agree() -> None:
    bench = Bench(None)
    sequence = bench.sequence(13)
    bench.seat(sequence)
    bench.complete(sequence)
    connector = bench.connector
    assert (connector.state, connector.tally.queries_tokens) == ("off", 13)
    assert connector.tally.misses_tokens == {"no_cache": 12, "tail": 1}
    connector.close()


def test_a_bypass_is_neither_looked_up_nor_counted(cache: FakeCache, bench: Bench) -> None:
    stored(cache, 13)
    sequence = bench.sequence(13, cache=CACHE_BYPASS)
    bench.connector.arrive(sequence)
    bench.seat(sequence)
    assert (sequence.found, cache.counted, bench.connector.tally.queries_tokens) == ((), [], 0)


def test_another_tenant_finds_nothing(cache: FakeCache, bench: Bench) -> None:
    stored(cache, 13)
    sequence = bench.sequence(13, salt=bytes(32))
    bench.seat(sequence)
    assert sequence.found == ()


def test_a_second_admission_is_not_counted_again(cache: FakeCache, bench: Bench) -> None:
    sequence = bench.sequence(13)
    bench.seat(sequence)
    bench.complete(sequence)
    bench.settled()
    bench.leave(sequence)
    sequence.state = State.WAITING
    bench.seat(sequence)
    assert len(cache.counted) == 1


def test_a_fault_in_a_thread_is_a_miss_and_the_thread_goes_on(
    cache: FakeCache, bench: Bench
) -> None:
    stored(cache, 13)
    broken, healthy = bench.sequence(13), bench.sequence(13)
    cache.load = _raise  # type: ignore[assignment,method-assign]
    bench.seat(broken)
    bench.connector.load(broken)
    (done,) = bench.settled()
    assert (done.blocks, done.reason) == (0, "detached")
    del cache.load
    bench.seat(healthy)
    bench.connector.load(healthy)
    (done,) = bench.settled()
    assert done.blocks == 3


def _raise(*_arguments: object) -> None:
    raise OSError("the sim was asked to fail")


def test_close_stores_what_is_queued_and_closes_the_cache(cache: FakeCache) -> None:
    bench = Bench(cache)
    sequence = bench.sequence(13)
    bench.seat(sequence)
    bench.complete(sequence)
    bench.connector.close()
    assert (len(cache.blocks), cache.closed) == (3, True)


def test_a_block_lost_to_damage_is_stored_anew_from_the_pool(
    cache: FakeCache, bench: Bench
) -> None:
    first = bench.sequence(12)
    bench.seat(first)
    bench.complete(first)
    bench.settled()
    lost = first.keys()[1:]
    for key in lost:
        del cache.blocks[key]
    cache.condemned = set(lost)
    bench.seat(bench.sequence(13))
    bench.settled()
    assert set(lost) <= set(cache.blocks), "no child of it could be stored"
