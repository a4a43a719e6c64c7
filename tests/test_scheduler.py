"""The schedule: a budget that holds, pages that are never overdrawn, everybody finishes.

The model here is a hash of the whole prefix as the pages hold it, without torch: a page in the
wrong place, written by two or not filled gives a wrong token.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.engine.pages import Pages
from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.scheduler import Scheduler, Step
from kvist.engine.sequence import Limits, Sequence, State
from kvist.proto.keys import BlockKey

SIZE = 4
DIGEST = bytes(32)
LIMITS = Limits(max_model_len=64, block_tokens=SIZE)


def next_token(prefix: list[int]) -> int:
    return hashlib.sha256(bytes(prefix)).digest()[0]


def alone(prompt: list[int], count: int) -> list[int]:
    """What a request gets when nobody else is there."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeFinder:
    """Holds blocks as the cache would. A load brings all of them but for those in `broken`."""

    def __init__(self) -> None:
        self.blocks: dict[BlockKey, list[int]] = {}
        self.broken: set[BlockKey] = set()
        self.deferred: set[Sequence] = set()

    def defers(self, sequence: Sequence, blocks: int) -> bool:
        assert blocks <= sequence.usable_blocks
        return sequence in self.deferred

    def find(self, sequence: Sequence, blocks: int) -> None:
        tiers = []
        for key in sequence.keys()[blocks : sequence.usable_blocks]:
            if key not in self.blocks:
                break
            tiers.append("dram")
        sequence.found, sequence.found_end = tuple(tiers), "never_stored"


@dataclass
class Machine:
    """Scheduler, pool and model; one step at a time."""

    pages: int = 16
    max_tokens: int = 16
    max_seqs: int = 4
    finder: FakeFinder = field(default_factory=FakeFinder)

    def __post_init__(self) -> None:
        self.books = Pages(self.pages)
        self.pool: list[list[int | None]] = [[None] * SIZE for _ in range(self.pages)]
        self.scheduler = Scheduler(self.books, self.finder, SIZE, self.max_tokens, self.max_seqs)
        self.live: list[Sequence] = []
        self.computed = 0
        self.loads: list[Sequence] = []

    def add(
        self, prompt: list[int], count: int, reuse: bool = True, stop: tuple[int, ...] = ()
    ) -> Sequence:
        params = SamplingParams(max_tokens=count, stop_token_ids=stop)
        number = len(self.live)
        request = NewRequest(str(number), prompt, params)
        sequence = Sequence(request, number, LIMITS, DIGEST if reuse else None, 0.0)
        self.live.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self, end_loads: bool = True) -> Step:
        if end_loads:
            self.finish_loads()
        step = self.scheduler.schedule()
        self.loads += step.loads
        assert step.tokens <= self.max_tokens
        self.check_writers(step)
        for work in step.work:
            self.write(work.sequence, work.start, work.count)
        for work in step.work:
            sequence = work.sequence
            prefix = self.read(sequence, work.start + work.count)
            last = work.last
            self.scheduler.advance(work)
            if last:
                sequence.append(next_token(prefix))
                if sequence.finish_reason:
                    self.scheduler.finish(sequence)
        self.check()
        return step

    def finish_loads(self) -> None:
        for sequence in self.loads:
            if sequence.state is State.LOADING:
                self.scheduler.loaded(sequence, self.copy_in(sequence))
        self.loads = []

    def copy_in(self, sequence: Sequence) -> int:
        for i in range(len(sequence.found)):
            block = sequence.registered + i
            key = sequence.keys()[block]
            if key in self.finder.broken:
                return i
            self.pool[sequence.pages[block]] = list(self.finder.blocks[key])
        return len(sequence.found)

    def write(self, sequence: Sequence, start: int, count: int) -> None:
        self.computed += count
        for position in range(start, start + count):
            page = sequence.pages[position // SIZE]
            self.pool[page][position % SIZE] = sequence.tokens[position]

    def read(self, sequence: Sequence, end: int) -> list[int]:
        prefix = [self.pool[sequence.pages[p // SIZE]][p % SIZE] for p in range(end)]
        assert prefix == sequence.tokens[:end], "the pages hold another prefix"
        return [token for token in prefix if token is not None]

    def check_writers(self, step: Step) -> None:
        written = [
            work.sequence.pages[block]
            for work in step.work
            for block in range(work.start // SIZE, -(-(work.start + work.count) // SIZE))
        ]
        held = Counter(page for one in self.live for page in one.pages)
        assert len(set(written)) == len(written), "a page has two writers"
        assert all(held[page] == 1 for page in written), "a page is written that others read"

    def check(self) -> None:
        self.books.check(Counter(page for one in self.live for page in one.pages))
        scheduler = self.scheduler
        assert len(scheduler.running) + len(scheduler.loading) <= self.max_seqs
        assert [one.number for one in scheduler.running] == sorted(
            one.number for one in scheduler.running
        )

    def run(self, steps: int = 2000) -> None:
        for _ in range(steps):
            if all(one.state is State.FINISHED for one in self.live):
                return
            self.step()
        raise AssertionError("somebody never finishes")


def prompt(length: int, start: int = 1) -> list[int]:
    return [(start + 7 * i) % 251 for i in range(length)]


def test_decodes_come_first_and_prompts_fill_the_rest_of_the_step() -> None:
    machine = Machine(max_tokens=16)
    first = machine.add(prompt(6), 8)
    machine.step()
    second = machine.add(prompt(30, 2), 2)
    step = machine.step()
    assert [(work.sequence, work.count) for work in step.work] == [(first, 1), (second, 12)]


def test_a_prompt_is_cut_at_a_pages_end_unless_that_would_be_nothing() -> None:
    machine = Machine(max_tokens=6, max_seqs=4)
    machine.add(prompt(15), 1)
    assert [machine.step().work[0].count for _ in range(4)] == [4, 4, 4, 3]
    small = Machine(max_tokens=3, max_seqs=3)
    small.add(prompt(7), 1)
    assert [small.step().work[0].count for _ in range(3)] == [3, 1, 3]


def test_a_prompt_seen_before_costs_its_last_token_only() -> None:
    machine = Machine()
    machine.add(prompt(13), 1)
    machine.run()
    before = machine.computed
    machine.add(prompt(13), 1)
    machine.run()
    assert machine.computed - before == 1


def test_a_prompt_of_whole_pages_computes_its_last_page_again() -> None:
    machine = Machine()
    for _ in range(2):
        machine.add(prompt(12), 1)
        machine.run()
    assert machine.computed == 12 + SIZE


def test_a_prompt_waits_for_one_that_is_computing_the_same_prefix() -> None:
    machine = Machine(max_tokens=8)
    first, second = machine.add(prompt(22), 2), machine.add(prompt(21), 2)
    other = machine.add(prompt(4, 99), 2)
    machine.step()
    machine.run()
    assert machine.computed == (22 + 1) + (1 + 1) + (4 + 1)
    assert second.output == alone(prompt(21), 2)
    assert first.output == alone(prompt(22), 2)
    assert other.output == alone(prompt(4, 99), 2)


def test_one_that_waits_for_a_prefix_lets_others_pass() -> None:
    machine = Machine(max_tokens=16)
    cached = prompt(12)
    put_in_cache(machine.finder, cached, 1)
    machine.add(cached, 1)
    machine.step()
    follower, stranger = machine.add(cached, 1), machine.add(prompt(5, 200), 1)
    step = machine.step(end_loads=False)
    assert [work.sequence for work in step.work] == [stranger]
    assert follower.state is State.WAITING
    machine.run()
    assert follower.output == alone(cached, 1)


def test_the_youngest_is_preempted_and_resumes_without_losing_or_repeating_a_token() -> None:
    machine = Machine(pages=8, max_tokens=64, max_seqs=4)
    both = [machine.add(prompt(12, 1), 14), machine.add(prompt(12, 2), 14)]
    machine.run()
    assert machine.scheduler.preemptions > 0
    assert [one.output for one in both] == [alone(prompt(12, 1), 14), alone(prompt(12, 2), 14)]


def test_an_old_request_is_never_preempted_for_a_young_one() -> None:
    machine = Machine(pages=8, max_tokens=64, max_seqs=4)
    old = machine.add(prompt(12, 1), 14)
    machine.add(prompt(12, 2), 14)
    seen = []
    while old.state is not State.FINISHED:
        machine.step()
        seen.append(old.state)
    assert State.WAITING not in seen


def test_a_request_is_admitted_only_when_all_its_pages_can_be_had() -> None:
    machine = Machine(pages=6)
    machine.add(prompt(15), 2)
    big, small = machine.add(prompt(15, 2), 1), machine.add(prompt(3, 3), 1)
    machine.step()
    machine.step()
    assert (big.state, small.state) == (State.WAITING, State.WAITING), "first come, first served"
    machine.run()
    assert big.output == alone(prompt(15, 2), 1)


def test_loading_requests_wait_while_others_run() -> None:
    machine = Machine()
    donor = machine.add(prompt(13), 1)
    put_in_cache(machine.finder, prompt(13), 3)
    other = machine.add(prompt(5, 9), 3)
    step = machine.step()
    assert step.loads == [donor]
    assert [work.sequence for work in step.work] == [other]
    machine.step(end_loads=False)
    assert donor.state is State.LOADING
    machine.run()
    assert donor.output == alone(prompt(13), 1)


def test_what_comes_after_a_failed_block_is_computed() -> None:
    machine = Machine()
    donor = machine.add(prompt(13), 1)
    put_in_cache(machine.finder, prompt(13), 3)
    machine.finder.broken = {donor.keys()[1]}
    machine.run()
    assert machine.computed == 13 - SIZE
    assert donor.output == alone(prompt(13), 1)


def test_an_abort_gives_pages_back_at_once_in_every_state() -> None:
    machine = Machine(pages=8, max_seqs=2)
    running, waiting = machine.add(prompt(9), 9), machine.add(prompt(30, 2), 9)
    machine.step()
    machine.scheduler.finish(running)
    machine.check()
    assert machine.books.used == 0
    machine.scheduler.finish(waiting)
    assert machine.step().work == []


def test_a_bypass_neither_finds_nor_leaves_anything() -> None:
    machine = Machine()
    machine.add(prompt(13), 1, reuse=False)
    machine.run()
    assert machine.books.registered == 0
    machine.add(prompt(13), 1)
    machine.run()
    machine.add(prompt(13), 1, reuse=False)
    machine.run()
    assert machine.computed == 39


def test_a_stop_token_ends_the_output_and_is_part_of_it() -> None:
    expected = alone(prompt(5), 9)
    machine = Machine()
    one = machine.add(prompt(5), 9, stop=(expected[3],))
    machine.run()
    assert one.finish_reason == "stop"
    assert one.output == expected[: expected.index(expected[3]) + 1]


def test_the_context_ends_an_output() -> None:
    machine = Machine()
    one = machine.add(prompt(60), 100)
    machine.run()
    assert (one.finish_reason, len(one.tokens)) == ("length", LIMITS.max_model_len)


ASKED = st.tuples(
    st.integers(0, 2),  # which of few prompts, so that prefixes are shared
    st.integers(1, 40),
    st.integers(1, 20),
    st.booleans(),
    st.integers(0, 6),  # steps before it comes
    st.integers(0, 12),  # steps before it is aborted; 0 is never
)


@settings(max_examples=150, deadline=None)
@given(
    asked=st.lists(ASKED, min_size=1, max_size=10),
    pages=st.integers(16, 24),
    max_tokens=st.integers(4, 40),
    max_seqs=st.integers(1, 4),
    cached=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=3),
    slow_loads=st.booleans(),
)
def test_everybody_gets_what_they_would_get_alone(
    asked: list[tuple[int, int, int, bool, int, int]],
    pages: int,
    max_tokens: int,
    max_seqs: int,
    cached: list[tuple[int, int]],
    slow_loads: bool,
) -> None:
    machine = Machine(pages, max_tokens, max_seqs)
    for kind, blocks in cached:
        put_in_cache(machine.finder, prompt(40, kind), blocks)
    expected: list[tuple[Sequence, list[int]]] = []
    for kind, length, count, bypass, delay, abort_after in asked:
        for _ in range(delay):
            machine.step(end_loads=not slow_loads)
        sequence = machine.add(prompt(length, kind), count, not bypass)
        if abort_after:
            for _ in range(abort_after):
                machine.step(end_loads=not slow_loads)
            if sequence.state is not State.FINISHED:
                machine.scheduler.finish(sequence)
                machine.check()
                continue
        expected.append((sequence, alone(prompt(length, kind), count)))
    machine.run()
    assert [one.output for one, _ in expected] == [output for _, output in expected]
    assert machine.books.used == 0


def put_in_cache(finder: FakeFinder, tokens: list[int], blocks: int) -> None:
    keys = Sequence(NewRequest("", tokens, SamplingParams()), 0, LIMITS, DIGEST, 0.0).keys()
    for i in range(blocks):
        finder.blocks[keys[i]] = tokens[i * SIZE : (i + 1) * SIZE]
        if i == 5:
            finder.broken.add(keys[i])
