"""The line of rises as an engine keeps it: what goes before, whatever becomes of those in it."""

from __future__ import annotations

from collections.abc import Sequence as Blocks

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.fake_cache import FakeCache
from test_rising import DIGEST, LIMITS, SIZE, Bench, busy_bench, item_of, prompts

from kvist.cachesvc.worker.cost import START_S, TRY_AGAIN, Choice, CostModel
from kvist.engine.copying import LOAD_BASE_S, Loaded
from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.rising import PATIENCE, PATIENCE_BASE_S, Rising
from kvist.engine.sequence import Sequence, State
from kvist.engine.weighing import Weigher

BLOCK_S = 0.1


class Line:
    """Requests whose blocks each take BLOCK_S to rise, as estimated, and a clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.cache = FakeCache()
        self.rose: list[tuple[int, float, bool]] = []
        self.rising = Rising(self.cache, lambda: self.now_s, lambda *rise: self.rose.append(rise))
        self.asked: list[Sequence] = []

    def add(self, tokens: list[int], compute_s: float = 0.0) -> Sequence:
        """A request whose blocks are all on flash asks for them."""
        number = len(self.asked)
        one = Sequence(
            NewRequest(str(number), tokens, SamplingParams()), number, LIMITS, DIGEST, self.now_s
        )
        keys = one.keys()[: one.usable_blocks]
        for block, key in enumerate(keys):
            self.cache.blocks[key] = (item_of(one, block), b"")
            self.cache.flash.add(key)
        load_s = self.rising.ahead_s(keys, BLOCK_S) + BLOCK_S * len(keys)
        self.rising.begin(one, keys, Choice(len(keys), 0, load_s, compute_s), 64)
        self.asked.append(one)
        return one

    def rises(self, one: Sequence) -> None:
        """Its blocks have come."""
        self.cache.flash -= set(one.keys())


def test_one_that_rises_out_of_turn_takes_no_time_from_those_before_it() -> None:
    line = Line()
    first, second, third = (line.add(tokens) for tokens in prompts(3))
    assert line.rising.ahead_s() == pytest.approx(0.9)
    line.now_s += 0.05
    line.rises(second)
    assert not line.rising.waits(second, False)
    assert line.rising.ahead_s() == pytest.approx(0.55)
    line.now_s += 0.2
    assert line.rising.waits(first, False)
    line.now_s += 0.05
    line.rises(first)
    assert not line.rising.waits(first, False)
    assert first.rise_s == pytest.approx(0.3)
    line.now_s += 0.3
    line.rises(third)
    assert not line.rising.waits(third, False)
    assert third.rise_s == pytest.approx(0.3)


def test_blocks_that_several_ask_for_rise_once() -> None:
    line = Line()
    (shared,) = prompts(1)
    line.add(shared)
    for _ in range(20):
        line.add(shared)
    assert line.rising.ahead_s() == pytest.approx(0.3)
    line.add([*range(7000, 7013)])
    assert line.rising.ahead_s() == pytest.approx(0.6)
    line.add([*shared[:8], *range(8000, 8009)])  # two of its four blocks are known
    line.add(shared)
    assert line.rising.ahead_s() == pytest.approx(0.8)
    assert line.rising.ahead_s(line.asked[0].keys(), BLOCK_S) == 0.0


def test_blocks_that_come_sooner_are_sooner_once_for_those_behind_them() -> None:
    line = Line()
    shared, other = prompts(2)
    several = [line.add(shared) for _ in range(3)]
    last = line.add(other)
    line.now_s += 0.1
    line.rises(several[0])
    assert not any(line.rising.waits(one, False) for one in several)
    assert [one.rise_s for one in several] == [pytest.approx(0.1)] * 3
    assert line.rising.ahead_s() == pytest.approx(0.3)
    assert line.rising.waits(last, False)
    assert line.rose == [], "nobody looked before"


def test_one_that_was_asked_for_when_another_was_late_is_no_later_than_from_its_end() -> None:
    line = Line()
    late, after = prompts(2)
    first = line.add(late)
    line.now_s += 0.5
    line.add(after)
    line.now_s += 0.04
    assert line.rising.waits(first, False)
    line.now_s += 0.01
    line.rises(first)
    assert not line.rising.waits(first, False)
    assert line.rose == [(3, pytest.approx(0.55), True)]
    assert line.rising.ahead_s() == pytest.approx(0.3)


def test_one_that_follows_its_rise_tells_those_behind_it_when_that_will_have_ended() -> None:
    line = Line()
    followed, other = (line.add(tokens, compute_s=0.2) for tokens in prompts(2))
    line.now_s += 0.05
    line.cache.shown = 48  # of 64 bytes: sooner than was estimated
    assert not line.rising.waits(followed, False)
    assert line.rising.ahead_s() == pytest.approx(0.3 / 4 + 0.3)
    line.now_s += 0.3 / 4
    line.cache.shown = 0
    assert line.rising.waits(other, False)
    assert not line.rising.waits(followed, False)
    assert line.rising.ahead_s() == pytest.approx(0.3)


@pytest.mark.parametrize("gone", ["detached", "dropped"])
def test_what_goes_away_while_it_rises_tells_nothing_of_the_tier(gone: str) -> None:
    line = Line()
    one, other = (line.add(tokens) for tokens in prompts(2))
    line.now_s += 0.001
    assert line.rising.waits(one, False)
    if gone == "detached":
        line.cache.state = gone
    else:
        del line.cache.blocks[one.keys()[2]]
    line.now_s += 0.0001
    assert not line.rising.waits(one, False)
    assert line.rose == []
    assert line.rising.ahead_s() == pytest.approx(0.3)
    assert line.rising.waits(other, False) == (gone == "dropped")


def test_one_that_had_no_seat_when_its_blocks_came_did_not_wait_so_long_for_them() -> None:
    line = Line()
    (tokens,) = prompts(1)
    one = line.add(tokens)
    line.rises(one)
    line.now_s += 60.0
    assert not line.rising.waits(one, False)
    assert one.rise_s == pytest.approx(0.3)


@pytest.mark.parametrize(("rose", "seconds"), [({4, 5}, 0.5), ({0, 1, 2, 3}, 0.2)])
def test_a_load_takes_the_time_that_its_own_blocks_rose_before(
    rose: set[int], seconds: float
) -> None:
    weigher = Weigher(2, 1 << 20, SIZE)
    one = Sequence(NewRequest("r", list(range(30)), SamplingParams()), 1, LIMITS, DIGEST, 0.0)
    one.found, one.choice = ("dram",) * 4 + ("flash",) * 2, Choice(6, 0, 0.1, 0.1)
    one.rose, one.rise_s = frozenset(rose), 0.3
    weigher.loaded(Loaded(one, 6, "", 0.2, list(range(6)), None, 0.2))
    rate = weigher.cost.rates["flash"].bytes_per_s
    assert rate == pytest.approx((2 << 20) / (seconds - START_S))


OPERATION = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 5), st.integers(1, 6)),
    st.tuples(st.just("rise"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("look"), st.integers(0, 3000), st.booleans()),
    st.tuples(st.just("sidecar"), st.booleans(), st.just(0)),
    st.tuples(st.just("shown"), st.sampled_from([None, 0, 1, 63, 64]), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(operations=st.lists(OPERATION, max_size=60))
def test_whatever_happens_the_line_is_no_longer_than_what_was_asked_and_all_are_let_in(
    operations: list[tuple[str, int, int]],
) -> None:
    line = Line()
    asked_s: list[float] = []
    for what, which, more in operations:
        _do(line, what, which, more, asked_s)
        assert 0.0 <= line.rising.ahead_s() <= sum(asked_s) + 1e-9
        for one in line.asked:
            assert 0.0 <= one.rise_s <= line.now_s - 100.0 + 1e-9
    longest_s = PATIENCE_BASE_S + PATIENCE * sum(asked_s) + 1e-6
    line.now_s += longest_s
    assert not any(line.rising.waits(one, False) for one in line.asked)
    assert (line.rising.waiting, line.rising.ahead_s()) == (0, 0.0)
    assert not line.rising._asked, "blocks that nobody waits for"


def _do(line: Line, what: str, which: int, more: int, asked_s: list[float]) -> None:
    live = [one for one in line.asked if one.state is State.WAITING]
    if what == "ask" and line.cache.state == "attached":
        before_s = line.rising.ahead_s()
        line.add([1000 * which + token for token in range(4 * more + 1)], compute_s=0.05 * which)
        asked_s.append(line.rising.ahead_s() - before_s)
    elif what == "look":
        line.now_s += which / 1000
        for one in live:
            line.rising.waits(one, bool(more))
    elif what == "sidecar":
        line.cache.state = "attached" if which else "detached"
    elif what == "shown":
        line.cache.shown = which
    elif live:
        _end(line, what, live[which % len(live)])


def _end(line: Line, what: str, one: Sequence) -> None:
    if what == "rise":
        line.rises(one)
    elif what == "drop":
        keys = one.keys()
        for key in keys:
            line.cache.blocks.pop(key, None)
    else:
        one.state = State.FINISHED
        line.rising.prune()


def wishes(block_s: float, token_s: float, tries: int, among: Blocks[list[int]]) -> list[int]:
    """How many blocks each of some prompts asks to rise, when all come at once."""
    bench = busy_bench(block_s, token_s)
    assert bench.connector.weigher is not None
    bench.connector.weigher.cost._avoided = tries
    wished = []
    for tokens in among:
        bench.put(tokens, "flash")
        before = len(bench.cache.prefetched)
        bench.add(tokens)
        wished.append(len(bench.cache.prefetched) - before)
    bench.connector.close()
    return wished


def test_a_slow_tier_is_tried_again_by_one_request_and_not_by_all_that_have_come() -> None:
    assert wishes(0.1, 0.001, TRY_AGAIN, prompts(6)) == [3, 0, 0, 0, 0, 0]


def test_a_trial_of_a_slow_tier_that_is_followed_is_loaded() -> None:
    bench = busy_bench(0.1, 0.001)
    assert bench.connector.weigher is not None
    bench.connector.weigher.cost._avoided = TRY_AGAIN
    (tokens,) = prompts(1)
    bench.put(tokens, "flash")
    one = bench.add(tokens)
    bench.cache.shown = 64
    assert bench.scheduler.schedule(bench.now_s).loads == [one]
    assert one.gate is not None
    assert one.found == ("flash",) * 3
    bench.connector.close()


def test_what_many_share_rises_for_all_of_them() -> None:
    assert wishes(0.1, 0.06, 0, prompts(1) * 6) == [3] * 6


def test_what_rises_too_late_is_computed_when_its_turn_has_come() -> None:
    bench = busy_bench(0.1, 0.06)
    asked = []
    for tokens in prompts(7):
        bench.put(tokens, "flash")
        asked.append(bench.add(tokens))
    last = asked[-1]
    assert last.rose == frozenset()
    step = bench.scheduler.schedule(bench.now_s)
    assert step.loads == []
    assert [work.sequence for work in step.work][-1] is last
    assert bench.cache.counted[-1] == (13, {}, {"cheaper": 12, "tail": 1})
    bench.connector.close()


def test_what_has_its_turn_does_not_wait_for_those_behind_it() -> None:
    bench = busy_bench(0.1, 0.06)
    asked = []
    for tokens in prompts(5):
        bench.put(tokens, "flash")
        asked.append(bench.add(tokens))
    wished = [len(one.rose) for one in asked]
    assert wished == [3, 2, 1, 1, 1]
    bench.cache.shown = 64  # whole blocks, all that is left is to sum them
    assert bench.scheduler.schedule(bench.now_s).loads == asked
    assert [len(one.found) for one in asked] == wished, "no less, and nothing that does not rise"
    bench.connector.close()


def test_of_two_that_come_at_once_only_the_first_is_alone() -> None:
    bench = busy_bench(0.01, 0.1)
    bench.connector.beside(0)
    asked = []
    for tokens in prompts(2):
        bench.put(tokens, "flash")
        asked.append(bench.add(tokens))
    bench.cache.shown = 0  # all are on their way
    assert bench.scheduler.schedule(bench.now_s).loads == asked[:1]
    bench.connector.close()


@pytest.mark.parametrize("measured", [False, True])
def test_a_flash_tier_from_which_nothing_comes_is_soon_left_alone(measured: bool) -> None:
    bench = busy_bench(0.1, 0.1)
    assert bench.connector.weigher is not None
    cost = bench.connector.weigher.cost = CostModel(1 << 20, SIZE)
    cost.prefill.observe(64, 0.0, 64 * 0.1)
    if measured:
        cost.loaded(["flash"] * 3, 0.01)
    waited = []
    for tokens in prompts(12):
        bench.put(tokens, "flash")
        one, began_s = bench.add(tokens), bench.now_s
        while one.state is State.WAITING:
            for load in bench.scheduler.schedule(bench.now_s).loads:
                load_in_vain(bench, load)
            bench.now_s += 0.001
        waited.append(bench.now_s - began_s > 1.0)
        bench.scheduler.finish(one)
    assert waited[0]
    assert not any(waited[6:])
    bench.connector.close()


def load_in_vain(bench: Bench, one: Sequence) -> None:
    """Its blocks do not come as long as a load waits for them."""

    def late(*_: object) -> str:
        bench.now_s += LOAD_BASE_S
        return "flash_late"

    bench.cache.load = late  # type: ignore[method-assign]
    bench.connector.load(one)
    while bench.connector.copying:
        bench.connector.wait(1.0)
        for loaded in bench.connector.poll():
            bench.scheduler.loaded(loaded.sequence, loaded.blocks)


def test_a_load_that_was_late_is_measured_from_when_its_blocks_were_asked_for() -> None:
    bench = busy_bench(0.1, 10.0)
    (tokens,) = prompts(1)
    bench.put(tokens, "flash")
    one = bench.add(tokens)
    bench.now_s += 2 * PATIENCE_BASE_S + PATIENCE * (0.3 + START_S)
    bench.cache.shown = 64  # the fake loads what is shown
    assert bench.scheduler.schedule(bench.now_s).loads == [one]
    bench.connector.load(one)
    while bench.connector.copying:
        bench.connector.wait(1.0)
        bench.connector.poll()
    assert one.cost is not None
    assert one.cost.load_s == pytest.approx(2 * PATIENCE_BASE_S + PATIENCE * (0.3 + START_S))
    bench.connector.close()
