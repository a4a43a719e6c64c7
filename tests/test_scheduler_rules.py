"""Any order of arrivals, steps, loads and aborts, of any classes, with and without overlap."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sim.machine import SIZE, Machine, alone, prompt

from kvist.engine.sequence import Sequence, State
from kvist.engine.step import Step

AGING_S = 12.0


class Schedules(RuleBasedStateMachine):
    """Budget, pages and writers are checked by the machine in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine()
        self.wanted: dict[Sequence, list[int]] = {}

    @initialize(
        pages=st.integers(16, 24),
        max_tokens=st.integers(4, 40),
        max_seqs=st.integers(1, 4),
        flags=st.tuples(*[st.booleans()] * 3),
    )
    def begin(
        self, pages: int, max_tokens: int, max_seqs: int, flags: tuple[bool, bool, bool]
    ) -> None:
        overlap, late, gates = flags
        self.machine = Machine(
            pages, max_tokens, max_seqs, overlap=overlap, late=late, aging_s=AGING_S
        )
        self.machine.finder.gates = gates

    @rule(
        kind=st.integers(0, 2),
        length=st.integers(1, 40),
        count=st.integers(1, 20),
        priority=st.integers(0, 2),
        stops=st.booleans(),
        bypass=st.sampled_from([False, False, False, True]),
    )
    def arrive(
        self, kind: int, length: int, count: int, priority: int, stops: bool, bypass: bool
    ) -> None:
        tokens = prompt(length, kind)
        wanted = alone(tokens, count)
        stop = wanted[count // 2 : count // 2 + 1] if stops else []
        one = self.machine.add(tokens, count, not bypass, tuple(stop), priority)
        end = next((i + 1 for i, token in enumerate(wanted) if token in stop), count)
        self.wanted[one] = wanted[:end]

    @rule(kind=st.integers(0, 2), blocks=st.integers(1, 9))
    def another_engine_stores(self, kind: int, blocks: int) -> None:
        self.machine.finder.put(prompt(40, kind), blocks)

    @rule(end_loads=st.booleans(), steps=st.integers(1, 4))
    def step(self, end_loads: bool, steps: int) -> None:
        for _ in range(steps):
            before = list(self.machine.scheduler.running)
            step = self.machine.step(end_loads)
            prompts_in_order(self.machine, step)
            the_last_in_place_went(before)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.live()))
        self.machine.abort(one)
        del self.wanted[one]

    @precondition(lambda self: self.machine.scheduler.waiting)
    @rule(data=st.data())
    def another_engine_computes_it(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(list(self.machine.scheduler.waiting)))
        self.machine.finder.deferred = {one}

    @invariant()
    def ended_requests_got_what_they_would_get_alone(self) -> None:
        for one, wanted in self.wanted.items():
            if one.state is State.FINISHED:
                assert one.output == wanted

    def live(self) -> list[Sequence]:
        return [one for one in self.wanted if one.state is not State.FINISHED]

    def teardown(self) -> None:
        """Nobody starves: what is left is done in as many steps as it has tokens, three times
        over for what preemptions and bad blocks take away, after all have grown old."""
        self.machine.finder.deferred = set()
        left = sum(one.length + one.request.params.max_tokens for one in self.live())
        self.machine.run(3 * left + 2 * int(AGING_S) + 8)
        assert [one.output for one in self.wanted] == list(self.wanted.values())
        assert self.machine.books.used == 0


def prompts_in_order(machine: Machine, step: Step) -> None:
    """Prompts get their parts by place, whole but for the end of the budget; nobody is passed."""
    parts = [work for work in step.work if not (work.last and work.count == 1)]
    places = [work.sequence.place for work in parts]
    if machine.went:
        return  # who goes makes room for some that were passed before
    assert places == sorted(places)
    left = machine.max_tokens - step.tokens
    for work in reversed(parts):
        # What a cut at a page's end leaves over goes to those behind.
        assert work.last or left < SIZE, "a part was cut before the budget's end"
        left += work.count
    passed = [one.place for one in machine.passed]
    assert not parts or not passed or min(passed) > max(places)
    assert not passed or step.tokens > machine.max_tokens - SIZE, "budget is left"


def the_last_in_place_went(before: list[Sequence]) -> None:
    went = [one.place for one in before if one.state is State.WAITING]
    stayed = [one.place for one in before if one.state is State.RUNNING]
    assert not went or not stayed or min(went) > max(stayed)


Schedules.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_any_order_of_events_keeps_the_promises = Schedules.TestCase
