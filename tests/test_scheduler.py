"""The schedule: a budget that holds, pages that are never overdrawn, everybody finishes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from sim.machine import LIMITS, SIZE, Machine, alone, prompt

from kvist.engine.sequence import Sequence, State


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
    machine.finder.put(cached, 1)
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
    assert machine.scheduler.preemptions["decode"] > 0
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
    machine.finder.put(prompt(13), 3)
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
    machine.finder.put(prompt(13), 3)
    machine.finder.broken = {donor.keys()[1]}
    machine.run()
    assert machine.computed == 13 - SIZE
    assert donor.output == alone(prompt(13), 1)


def test_an_abort_gives_pages_back_at_once_in_every_state() -> None:
    machine = Machine(pages=8, max_seqs=2)
    running, waiting = machine.add(prompt(9), 9), machine.add(prompt(30, 2), 9)
    machine.step()
    machine.abort(running)
    assert machine.books.used == 0
    machine.abort(waiting)
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
    flags=st.tuples(*[st.booleans()] * 4),
)
def test_everybody_gets_what_they_would_get_alone(
    asked: list[tuple[int, int, int, bool, int, int]],
    pages: int,
    max_tokens: int,
    max_seqs: int,
    cached: list[tuple[int, int]],
    flags: tuple[bool, bool, bool, bool],
) -> None:
    slow_loads, overlap, late, gates = flags
    machine = Machine(pages, max_tokens, max_seqs, overlap=overlap, late=late)
    machine.finder.gates = gates
    for kind, blocks in cached:
        machine.finder.put(prompt(40, kind), blocks)
    expected: list[tuple[Sequence, list[int]]] = []
    for kind, length, count, bypass, delay, abort_after in asked:
        for _ in range(delay):
            machine.step(end_loads=not slow_loads)
        sequence = machine.add(prompt(length, kind), count, not bypass)
        if abort_after:
            for _ in range(abort_after):
                machine.step(end_loads=not slow_loads)
            if sequence.state is not State.FINISHED:
                machine.abort(sequence)
                continue
        expected.append((sequence, alone(prompt(length, kind), count)))
    machine.run()
    assert [one.output for one, _ in expected] == [output for _, output in expected]
    assert machine.books.used == 0


def test_a_page_that_a_step_under_way_reads_is_given_to_nobody() -> None:
    machine = Machine(pages=64, max_tokens=64, max_seqs=8, overlap=True, late=True)
    # Twins complete the same blocks in the same steps: one of the two pages goes back each time,
    # while the next step, which reads it, is on its way, and a load takes the free page at once.
    twins = [machine.add(prompt(3), 24) for _ in range(2)]
    for i in range(12):
        machine.finder.put(prompt(9, 20 + i), 2)
        machine.step()
        machine.add(prompt(9, 20 + i), 1)
    machine.run()
    assert [one.output for one in twins] == [alone(prompt(3), 24)] * 2


def test_a_request_that_ends_by_itself_wastes_one_token_of_a_step_ahead_at_most() -> None:
    machine = Machine(overlap=True)
    wanted = alone(prompt(5), 20)
    machine.add(prompt(5), 20, stop=(wanted[9],))
    machine.run()
    assert machine.wasted == 1
    machine.add(prompt(6, 3), 20)
    machine.run()
    assert machine.wasted == 1, "how long an answer may be is known beforehand"
