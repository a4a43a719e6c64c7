"""Requests whose blocks rise from flash: others pass them, for a bounded time."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator

import numpy as np
import pytest
from sim.fake_cache import FakeCache

from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.cost import START_S, Choice
from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.connector import Connector
from kvist.engine.pages import Pages
from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.rising import PATIENCE, PATIENCE_BASE_S, Rising
from kvist.engine.scheduler import Scheduler
from kvist.engine.sequence import Limits, Sequence, State
from kvist.engine.step import Bounds
from kvist.engine.weighing import Weigher
from kvist.transfer.pages import HostPages

SIZE, PAGE_BYTES = 4, 64
DIGEST = bytes(range(32))
LIMITS = Limits(max_model_len=4096, block_tokens=SIZE)


def item_of(donor: Sequence, block: int) -> StoreItem:
    """A block as it was stored."""
    payload = np.zeros(PAGE_BYTES, np.uint8)
    tokens = donor.block_tokens_bytes(block)
    return StoreItem(donor.keys()[block], donor.parent(block), DIGEST, block, tokens, payload)


class Bench:
    """A scheduler and a connector over a fake cache, and a clock that stands still."""

    def __init__(self, cache: FakeCache) -> None:
        self.now_s = 100.0
        self.cache = cache
        self.pages = Pages(64)
        pool = np.zeros((64, PAGE_BYTES), np.uint8)
        pool_pages = HostPages(lambda page: pool[page])
        self.connector = Connector(
            cache, pool_pages, self.pages, Log(io.StringIO()), lambda: self.now_s
        )
        self.connector.weigher = Weigher(2, PAGE_BYTES, SIZE)
        self.scheduler = Scheduler(self.pages, self.connector, Bounds(64, 8, SIZE, 1e9))
        self._count = 0

    def add(self, tokens: list[int]) -> Sequence:
        """A request arrives."""
        self._count += 1
        request = NewRequest(str(self._count), tokens, SamplingParams())
        sequence = Sequence(request, self._count, LIMITS, DIGEST, self.now_s)
        self.connector.arrive(sequence)
        self.scheduler.add(sequence)
        return sequence

    def put(self, tokens: list[int], tier: str) -> None:
        """The cache has a prompt's blocks."""
        donor = Sequence(NewRequest("d", tokens, SamplingParams()), 0, LIMITS, DIGEST, 0.0)
        for block in range(donor.usable_blocks):
            item = item_of(donor, block)
            self.cache.blocks[item.key] = (item, bytes(PAGE_BYTES))
            if tier == "flash":
                self.cache.flash.add(item.key)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(FakeCache())
    yield made
    made.connector.close()


HIGH, OTHER = list(range(13)), list(range(100, 113))


def test_one_whose_blocks_rise_is_passed_by_one_that_came_later(bench: Bench) -> None:
    bench.put(HIGH, "flash")
    bench.cache.stuck = True
    rising, other = bench.add(HIGH), bench.add(OTHER)
    step = bench.scheduler.schedule(bench.now_s)
    assert [work.sequence for work in step.work] == [other]
    assert (rising.state, rising.pages, bench.connector.deferred) == (State.WAITING, [], 1)


def test_it_is_admitted_when_its_blocks_have_come_and_loads_beside_its_own_computation(
    bench: Bench,
) -> None:
    bench.put(HIGH, "flash")
    bench.cache.stuck = True
    rising = bench.add(HIGH)
    assert not bench.scheduler.schedule(bench.now_s).work
    bench.cache.flash.clear()
    step = bench.scheduler.schedule(bench.now_s)
    assert ([work.sequence for work in step.work], step.loads) == ([rising], [rising])
    assert rising.found == ("dram",) * 3
    assert rising.gate is not None
    bench.connector.load(rising)
    assert rising.gate.finish()
    (done,) = bench.connector.poll()
    bench.scheduler.loaded(done.sequence, done.blocks)
    assert bench.connector.deferred == 0
    # It was on flash when it was asked for, whoever brought it up meanwhile.
    assert bench.cache.counted == [(13, {"flash": 12}, {"tail": 1})]


@pytest.mark.parametrize(("step_s", "measured"), [(0.001, True), (0.5, False)])
def test_a_rise_is_timed_when_it_was_looked_at_often_enough(
    bench: Bench, step_s: float, measured: bool
) -> None:
    bench.put(HIGH, "flash")
    bench.cache.stuck = True
    weigher = bench.connector.weigher
    assert weigher is not None
    bench.add(HIGH)
    for _ in range(10):
        bench.now_s += 0.001
        bench.scheduler.schedule(bench.now_s)
    bench.cache.flash.clear()
    bench.now_s += step_s
    assert len(bench.scheduler.schedule(bench.now_s).loads) == 1
    rate = weigher.cost.rates["flash"]
    assert rate.measured == measured
    if measured:
        assert rate.bytes_per_s == pytest.approx(3 * PAGE_BYTES / (0.011 - START_S))


def test_it_waits_no_longer_than_its_patience(bench: Bench) -> None:
    bench.put(HIGH, "flash")
    bench.cache.stuck = True
    rising = bench.add(HIGH)
    assert bench.scheduler.schedule(bench.now_s).loads == []
    bench.now_s += PATIENCE_BASE_S + PATIENCE * 1.0
    assert bench.scheduler.schedule(bench.now_s).loads == [rising]
    assert (rising.state, rising.gate) == (State.LOADING, None)


def test_what_is_in_dram_waits_for_nothing(bench: Bench) -> None:
    bench.put(HIGH, "dram")
    present = bench.add(HIGH)
    assert bench.scheduler.schedule(bench.now_s).loads == [present]
    assert bench.connector.deferred == 0


def test_an_aborted_request_is_forgotten(bench: Bench) -> None:
    bench.put(HIGH, "flash")
    bench.cache.stuck = True
    rising = bench.add(HIGH)
    bench.scheduler.schedule(bench.now_s)
    bench.scheduler.finish(rising)
    bench.connector.poll()
    assert bench.connector.deferred == 0


def test_blocks_that_are_cheaper_to_compute_do_not_rise_and_are_counted_as_such(
    bench: Bench,
) -> None:
    bench.put(HIGH, "flash")
    weigher = bench.connector.weigher
    assert weigher is not None
    weigher.cost.loaded(["flash"] * 3, 1e3)
    weigher.cost.prefill.observe(64, 64 * 32, 0.01)
    one = bench.add(HIGH)
    assert bench.cache.prefetched == []
    step = bench.scheduler.schedule(bench.now_s)
    assert ([work.sequence for work in step.work], step.loads) == ([one], [])
    assert bench.cache.counted == [(13, {}, {"cheaper": 12, "tail": 1})]
    assert bench.connector.load_stats().decisions == {"load": 0, "part": 0, "compute": 1}


@pytest.mark.parametrize(("beside", "by_layers"), [(0, True), (3, False)])
def test_a_load_longer_than_its_computation_runs_beside_it_when_nobody_else_computes(
    bench: Bench, beside: int, by_layers: bool
) -> None:
    prompt = list(range(241))
    bench.put(prompt, "dram")
    weigher = bench.connector.weigher
    assert weigher is not None
    # 60 ms to load all blocks, 25 to compute the rest, 100 to compute one block more.
    weigher.cost.loaded(["dram"] * 60, START_S + 0.060)
    weigher.cost.prefill.observe(64, 0.0, 64 * 0.025)
    bench.connector.beside(beside)
    asked = bench.add(prompt)
    assert bench.scheduler.schedule(bench.now_s).loads == [asked]
    assert asked.found == ("dram",) * 60
    assert (asked.gate is not None, asked.state is State.RUNNING) == (by_layers, by_layers)


def bench_of(load_s: float, compute_s: float) -> Bench:
    """One whose rise of three blocks takes so long, and so the computation of a block."""
    bench = Bench(FakeCache())
    bench.put(HIGH, "flash")
    bench.cache.stuck = True
    weigher = bench.connector.weigher
    assert weigher is not None
    weigher.cost.loaded(["flash"] * 3, START_S + load_s)
    weigher.cost.prefill.observe(64, 0.0, 64 * compute_s)
    weigher.cost.choose = functools.partial(_load_all, load_s, compute_s)  # type: ignore[method-assign]
    return bench


def _load_all(
    load_s: float, compute_s: float, _first: int, tiers: tuple[str, ...], *_: object
) -> Choice:
    return Choice(len(tiers), 0, load_s, compute_s)


# Seconds of the rise and of the computation, whether others compute, share that has risen.
LET_IN = [
    (0.05, 0.01, False, 0.1, True),  # alone: it waits at its gate for a moment
    (5.0, 0.01, False, 0.1, False),  # for too long: others may come
    (5.0, 0.01, False, 0.99, True),
    (0.05, 0.01, True, 0.1, False),  # others would wait with it
    (0.05, 0.01, True, 0.9, True),  # no longer than it computes
    (0.05, 0.1, True, 0.1, True),
    (0.05, 0.1, True, 0.0, False),  # its first layers have not come
    (0.05, 0.1, False, 0.0, True),  # alone: it waits for them at its gate
    (0.05, 0.1, False, None, False),  # nobody has begun to read it
]


@pytest.mark.parametrize(("load_s", "compute_s", "beside", "share", "let_in"), LET_IN)
def test_a_request_is_let_in_when_the_rest_of_the_rise_is_hidden_by_its_computation(
    load_s: float, compute_s: float, beside: bool, share: float | None, let_in: bool
) -> None:
    bench = bench_of(load_s, compute_s)
    bench.connector.beside(int(beside))
    asked = bench.add(HIGH)
    assert bench.cache.followed == asked.keys()[:3]
    bench.cache.shown = None if share is None else int(share * PAGE_BYTES)
    step = bench.scheduler.schedule(bench.now_s)
    assert step.loads == ([asked] if let_in else [])
    assert (asked.gate is not None, bench.connector.deferred) == (let_in, not let_in)
    bench.connector.close()


def test_one_that_follows_a_rise_wishes_it_once_and_takes_as_long_as_that() -> None:
    bench = bench_of(0.05, 0.1)
    asked = bench.add(HIGH)
    bench.now_s += 0.03
    bench.cache.shown = PAGE_BYTES // 2
    assert bench.scheduler.schedule(bench.now_s).loads == [asked]
    bench.connector.load(asked)
    assert len(bench.cache.prefetched) == 3, "it was wished once"
    assert asked.gate is not None
    assert asked.gate.finish()
    assert asked.follow_until_s == 0.0
    (done,) = bench.connector.poll()
    bench.scheduler.loaded(done.sequence, done.blocks)
    assert bench.cache.counted == [(13, {"flash": 12}, {"tail": 1})]
    assert asked.cost is not None
    assert asked.cost.load_s == pytest.approx(0.03)
    bench.connector.close()


def test_told_not_to_overlap_nothing_is_followed() -> None:
    bench = bench_of(0.05, 0.1)
    weigher = bench.connector.weigher
    assert weigher is not None
    weigher.by_layers = False
    bench.add(HIGH)
    bench.cache.shown = PAGE_BYTES
    assert bench.scheduler.schedule(bench.now_s).loads == []
    assert bench.cache.followed == []
    bench.connector.close()


def prompts(count: int) -> list[list[int]]:
    """Different ones of three whole blocks and a token."""
    return [[1000 * number + token for token in range(13)] for number in range(count)]


def busy_bench(block_s: float, token_s: float) -> Bench:
    """One where a block takes so long to rise and a token to compute, and somebody computes."""
    bench = Bench(FakeCache())
    bench.cache.stuck = True
    weigher = bench.connector.weigher
    assert weigher is not None
    weigher.cost.loaded(["flash"] * 3, START_S + 3 * block_s)
    weigher.cost.prefill.observe(64, 0.0, 64 * token_s)
    bench.connector.beside(1)
    return bench


def test_patience_counts_the_rises_that_go_before() -> None:
    bench = busy_bench(0.1, 10.0)
    asked = []
    for tokens in prompts(4):
        bench.put(tokens, "flash")
        asked.append(bench.add(tokens))
    assert not bench.scheduler.schedule(bench.now_s).loads
    for number, one in enumerate(asked, 1):
        bench.now_s = 100.0 + PATIENCE_BASE_S + PATIENCE * number * (0.3 + START_S) - 0.01
        assert not bench.scheduler.schedule(bench.now_s).loads
        bench.now_s += 0.02
        assert bench.scheduler.schedule(bench.now_s).loads == [one]
    bench.connector.close()


def test_what_would_rise_after_too_many_others_is_computed() -> None:
    bench = busy_bench(0.1, 0.06)
    wished = []
    for tokens in prompts(12):
        bench.put(tokens, "flash")
        before = len(bench.cache.prefetched)
        bench.add(tokens)
        wished.append(len(bench.cache.prefetched) - before)
    assert wished[0] == 3
    assert wished[-1] == 0
    assert wished == sorted(wished, reverse=True)
    bench.connector.close()


def test_a_rise_that_ends_tells_of_the_tier_and_of_those_behind_it() -> None:
    cache, now = FakeCache(), [100.0]
    rose: list[tuple[int, float, bool]] = []
    rising = Rising(cache, lambda: now[0], lambda *rise: rose.append(rise))
    asked = []
    for tokens in prompts(2):
        request = NewRequest(str(tokens[0]), tokens, SamplingParams())
        asked.append(Sequence(request, 0, LIMITS, DIGEST, now[0]))
        last = asked[-1].keys()[0]
        cache.blocks[last] = (item_of(asked[-1], 0), b"")
        cache.flash.add(last)
        keys = [*asked[-1].keys()[1:], last]
        rising.begin(asked[-1], keys, Choice(3, 0, rising.ahead_s() + 0.3, 1.0), 0)
    assert rising.ahead_s() == pytest.approx(0.6)
    now[0] += 0.2
    assert all(rising.waits(one, False) for one in asked)
    cache.flash.discard(asked[0].keys()[0])  # after 0.2 s where 0.3 were expected
    assert not rising.waits(asked[0], False)
    assert rose == [(3, pytest.approx(0.2), True)]
    assert rising.ahead_s() == pytest.approx(0.3)
    now[0] += 0.3
    assert rising.waits(asked[1], False)
    cache.flash.clear()
    assert not rising.waits(asked[1], False)
    assert len(rose) == 1, "how long it waited for its turn is no rate"
    assert asked[1].rise_s == pytest.approx(0.3)
    assert rising.ahead_s() == 0.0
