"""Priority classes in the schedule: who comes first, who has to go, and that nobody starves."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from sim.machine import SIZE, Machine, alone, prompt
from sim.scrape import sample

from kvist.engine.openai import CompletionRequest, parse
from kvist.engine.priority import BATCH, INTERACTIVE, PRIORITIES, REALTIME, priority_of
from kvist.engine.request import CoreStats, Outputs
from kvist.engine.sequence import State
from kvist.engine.stats import EngineMetrics


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("realtime", REALTIME),
        ("interactive", INTERACTIVE),
        ("batch", BATCH),
        (-7, REALTIME),
        (0, INTERACTIVE),
        (3, BATCH),
    ],
)
def test_a_class_is_named_or_given_as_vllms_integer(written: int | str, meant: int) -> None:
    assert priority_of(written) == meant


def test_an_unknown_class_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=", ".join(PRIORITIES)):
        priority_of("urgent")


def test_prompts_of_a_higher_class_come_first_in_a_step_and_into_it() -> None:
    machine = Machine(max_tokens=8, max_seqs=4)
    slow = machine.add(prompt(30, 1), 2, priority=BATCH)
    machine.step()
    late = machine.add(prompt(10, 2), 2, priority=REALTIME)
    steps = [[(one.sequence, one.count) for one in machine.step().work] for _ in range(3)]
    assert steps[0] == [(late, 8)]
    assert steps[1] == [(late, 2), (slow, 4)]
    assert steps[2] == [(late, 1), (slow, 4)]


def test_within_a_class_the_order_is_that_of_arrival() -> None:
    machine = Machine(max_seqs=1)
    classes = [BATCH, REALTIME, INTERACTIVE, REALTIME, BATCH, INTERACTIVE]
    asked = [machine.add(prompt(5, i), 1, priority=one) for i, one in enumerate(classes)]
    order = []
    while not machine.idle():
        order += [work.sequence.number for work in machine.step().work]
    assert order == [1, 3, 2, 5, 0, 4]
    assert all(one.preempted == 0 for one in asked), "peers and betters wait for nobody's seat"


def test_a_higher_class_takes_the_seat_of_the_youngest_of_the_lowest() -> None:
    machine = Machine(max_seqs=3, pages=64)
    running = [
        machine.add(prompt(5, i), 12, priority=one)
        for i, one in enumerate([BATCH, BATCH, INTERACTIVE])
    ]
    for _ in range(3):
        machine.step()
    late = machine.add(prompt(5, 9), 2, priority=INTERACTIVE)
    machine.step()
    assert [one.preempted for one in running] == [0, 1, 0]
    assert late.state is State.RUNNING
    assert machine.scheduler.preemptions == {"decode": 0, "seat": 1, "pages": 0}
    machine.run()
    assert [one.output for one in running] == [alone(prompt(5, i), 12) for i in range(3)]


def test_a_higher_class_takes_pages_and_no_more_than_it_needs() -> None:
    machine = Machine(max_seqs=8, max_tokens=64, pages=24)
    running = [machine.add(prompt(26, i), 6, priority=BATCH) for i in range(3)]
    machine.step()
    late = machine.add(prompt(13, 9), 2, priority=REALTIME)
    machine.step()
    assert [one.preempted for one in running] == [0, 0, 1]
    assert late.state is State.RUNNING
    assert machine.scheduler.preemptions["pages"] == 1
    machine.run()
    assert machine.scheduler.resumed["hbm"] > 0


def test_nobody_is_preempted_for_one_that_would_not_fit_all_the_same() -> None:
    machine = Machine(max_seqs=8, max_tokens=64, pages=12)
    machine.add(prompt(22, 1), 9, priority=REALTIME)
    low = machine.add(prompt(8, 2), 6, priority=BATCH)
    machine.step()
    machine.add(prompt(33, 3), 1, priority=REALTIME)
    machine.step()
    assert low.preempted == 0


def test_a_high_class_does_not_wait_for_a_low_one_to_compute_its_prefix() -> None:
    machine = Machine(max_tokens=8, max_seqs=4)
    machine.add(prompt(30), 1, priority=BATCH)
    machine.step()
    high = machine.add(prompt(30), 1, priority=REALTIME)
    low = machine.add(prompt(30), 1, priority=BATCH)
    machine.step()
    assert high.state is State.RUNNING
    assert low.state is State.WAITING
    machine.run()
    assert high.output == alone(prompt(30), 1)


def test_what_is_preempted_is_given_to_the_cache_and_loaded_again() -> None:
    machine = Machine(max_seqs=1, pages=12)
    low = machine.add(prompt(18), 20, priority=BATCH)
    for _ in range(8):
        machine.step()
    tokens = list(low.tokens)
    high = machine.add(prompt(40, 5), 3, priority=REALTIME)
    machine.step()
    assert machine.finder.kept == low.keys()[: (len(tokens) - 1) // SIZE]
    machine.run()
    assert machine.scheduler.resumed["dram"] > 0, "the high one needed most pages"
    assert low.output == alone(prompt(18), 20)
    assert high.output == alone(prompt(40, 5), 3)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_batch_request_ends_although_realtime_ones_never_stop_coming(overlap: bool) -> None:
    aging_s = 20.0
    machine = Machine(max_tokens=8, max_seqs=2, pages=24, aging_s=aging_s, overlap=overlap)
    for i in range(4):
        machine.add(prompt(8, i), 4, priority=REALTIME)
    poor = machine.add(prompt(24, 99), 8, priority=BATCH)
    steps = 0
    while poor.state is not State.FINISHED:
        machine.add(prompt(8, 100 + steps), 4, priority=REALTIME)  # each more than a step's work
        machine.step()
        steps += 1
        assert steps < 200, "it starves"
    # It waits for its class to rise twice and then for a seat; after that it is the oldest, but
    # shares the budget with one other's decodes.
    assert 2 * aging_s <= steps < 2 * aging_s + 4 + (4 + 24 // 6) + 8 + 2
    assert poor.output == alone(prompt(24, 99), 8)


@pytest.mark.parametrize("flood", [BATCH, INTERACTIVE])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_backlog_that_has_waited_long_is_not_ahead_of_who_comes_above_it(
    flood: int, overlap: bool
) -> None:
    aging_s = 40.0
    machine = Machine(max_tokens=16, max_seqs=4, pages=64, aging_s=aging_s, overlap=overlap)
    backlog = [machine.add(prompt(8, i), 20, priority=flood) for i in range(60)]
    for _ in range(3 * int(aging_s)):
        machine.step()
    assert sum(one.state is State.WAITING for one in backlog) > 20
    for i in range(30):
        late = machine.add(prompt(9, 100 + i), 4, priority=REALTIME)
        for _ in range(4 + 4):
            machine.step()
        assert late.state is State.FINISHED, f"request {i} waits for the backlog"
    assert sum(one.rank < flood for one in backlog) <= machine.now / aging_s
    machine.run()
    assert [one.output for one in backlog] == [alone(prompt(8, i), 20) for i in range(60)]


def test_each_of_a_backlog_has_its_turn_beside_a_flood_from_above() -> None:
    aging_s = 10.0
    machine = Machine(max_tokens=8, max_seqs=2, pages=24, aging_s=aging_s)
    backlog = [machine.add(prompt(8, i), 2, priority=BATCH) for i in range(5)]
    steps, ended = 0, []
    while len(ended) < len(backlog):
        machine.add(prompt(8, 100 + steps), 4, priority=REALTIME)  # each more than a step's work
        machine.step()
        steps += 1
        ended += [one for one in backlog if one.state is State.FINISHED and one not in ended]
        assert steps < 5 * (2 * aging_s + 12), "somebody starves"
    assert ended == backlog, "first come, first served"


def test_peers_do_not_take_turns_however_long_they_wait() -> None:
    machine = Machine(max_seqs=1, aging_s=3.0)
    first, second = machine.add(prompt(5, 1), 30), machine.add(prompt(5, 2), 3)
    machine.run()
    assert first.preempted == second.preempted == 0


def test_a_running_prompt_grows_older_too() -> None:
    machine = Machine(max_tokens=8, max_seqs=4, aging_s=10.0, pages=64)
    poor = machine.add(prompt(40, 99), 1, priority=BATCH)
    machine.step()
    for i in range(60):
        machine.add(prompt(8, i), 1, priority=REALTIME)
        machine.step()
        if poor.state is State.FINISHED:
            return
    raise AssertionError("it holds pages and never ends")


def test_metrics_split_those_that_wait_by_reason_and_class_and_preemptions_by_kind() -> None:
    metrics = EngineMetrics(CollectorRegistry(), "m", lambda: 0.0)
    stats = CoreStats(
        waiting=5,
        waiting_deferred=2,
        waiting_by_class=(0, 1, 4),
        running_by_class=(3, 0, 0),
        preemptions={"decode": 4, "seat": 2, "pages": 1},
        resumed_tokens={"dram": 640},
    )
    metrics.observe_outputs(Outputs([], stats))
    vllm = {"engine": "0", "model_name": "m"}

    def value(name: str, **labels: str) -> float | None:
        return sample(metrics, name, labels)

    waiting = [
        value("vllm:num_requests_waiting_by_reason", **vllm, reason=one)
        for one in ("capacity", "deferred")
    ]
    assert waiting == [3, 2]
    assert value("vllm:num_requests_waiting", **vllm) == 5
    assert value("vllm:num_preemptions_total", **vllm) == 7
    assert value("kvist_engine_preemptions_total", **{"for": "seat"}) == 2
    assert value("kvist_engine_resumed_tokens_total", source="dram") == 640
    assert value("kvist_engine_requests_waiting", priority="batch") == 4
    assert value("kvist_engine_requests_running", priority="realtime") == 3


@pytest.mark.parametrize(
    ("written", "meant"), [("", None), (', "priority": "batch"', BATCH), (', "priority": -1', 0)]
)
def test_a_request_carries_its_class_or_leaves_it_to_the_server(
    written: str, meant: int | None
) -> None:
    body = f'{{"prompt": "a"{written}}}'.encode()
    assert parse(body, CompletionRequest).priority_class == meant
