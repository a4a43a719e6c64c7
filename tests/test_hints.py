"""Hints: on their way from a request to the policy, and what they can win and cannot lose."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from sim.forest import Forest
from sim.stores import Bench, chain, check, keys_of, store_settled
from sim.traces import chat_lines, chat_trace, continuations, write_trace

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.policy.hints import NEVER, PAUSE_KINDS, SOONEST, UNTOLD
from kvist.cachesvc.policy.rgg import Gittins
from kvist.cachesvc.policy.uses import JOIN_S
from kvist.cachesvc.study.replay import replay_policy
from kvist.cachesvc.study.trace import Trace, read_trace
from kvist.cachesvc.worker.ring import RingReader, RingWriter, make_ring
from kvist.engine.api_error import ApiError
from kvist.engine.openai import CompletionRequest, parse
from kvist.proto.errors import ConfigInvalid
from kvist.proto.hints import NO_HINT, PAUSE_MAX_S, Hint
from kvist.proto.keys import BlockKey
from kvist.proto.shm import ENTRIES_OFFSET, ENTRY, EXPECT, TOUCH

END = Hint(session_end=True)


def test_api_takes_hints_and_says_which_is_wrong() -> None:
    def asked(**hints: object) -> CompletionRequest:
        body = json.dumps({"prompt": "a", "cache_hints": hints}).encode()
        return parse(body, CompletionRequest)

    assert asked().hint == parse(b'{"prompt": "a"}', CompletionRequest).hint == NO_HINT
    assert asked(session_end=True, priority=-3).hint == Hint(True, 0.0, -3)
    assert asked(tool_pause_s=12).hint == Hint(tool_pause_s=12.0)
    for hints, words in (
        ({"priority": 4}, "priority: 4, give -3 to 3"),
        ({"tool_pause_s": 1e9}, "tool_pause_s: 1e+09, give 0 to 86400 seconds"),
        ({"session_end": True, "tool_pause_s": 1}, "drop one of the two"),
        ({"end": True}, "unknown field `end`"),
    ):
        with pytest.raises(ApiError) as refusal:
            asked(**hints)
        assert refusal.value.status == 400
        assert refusal.value.param == "cache_hints"
        assert words in refusal.value.message


def test_ring_carries_hints_and_drops_those_that_cannot_be(tmp_path: Path) -> None:
    path, key = tmp_path / "ring", BlockKey(bytes(16))
    make_ring(path, entries=8)
    writer, reader = RingWriter(path), RingReader(path)
    hints = [NO_HINT, END, Hint(tool_pause_s=0.25, priority=-3), Hint(tool_pause_s=PAUSE_MAX_S)]
    for hint in hints:
        writer.push(TOUCH, 1, key, hint)
    writer.push(TOUCH, 1, key)
    with path.open("r+b") as file:
        file.seek(ENTRIES_OFFSET + 4 * 64)
        file.write(ENTRY.pack(TOUCH, 1, key, 7, 0, 100, 9))
    assert [entry.hint for entry in reader.drain(9)] == [*hints, NO_HINT]
    writer.close()
    reader.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=16, flash_slots=24)
    yield made
    check(made)
    made.close()


def expectation_of(bench: Bench, key: BlockKey) -> int:
    row, policy = bench.parts.index.locate(key), bench.parts.placement.policy
    assert row is not None
    assert isinstance(policy, Gittins)
    return policy._hints.expectation(row)


def test_hint_of_a_touch_holds_for_what_the_request_stores_too(bench: Bench) -> None:
    bench.open()
    worker = bench.worker()
    keys = store_settled(bench, worker, 0, 2)
    worker.ring.push(TOUCH, 2, keys[1], Hint(tool_pause_s=30))
    assert worker.put(chain(0, 4)[2:]) == ["stored", "stored"]
    longer = keys_of(chain(0, 4))
    assert [expectation_of(bench, key) for key in longer] == 4 * [SOONEST + 5]
    bench.settle()
    worker.ring.push(TOUCH, 4, longer[3])
    bench.store.tick()
    assert [expectation_of(bench, key) for key in longer] == 4 * [UNTOLD], "its next use ends it"


def test_hint_of_a_request_that_finds_nothing_waits_for_its_first_block(bench: Bench) -> None:
    bench.open()
    worker = bench.worker()
    keys = keys_of(chain(0, 3))
    worker.ring.push(EXPECT, 0, keys[0], END)
    bench.store.tick()
    store_settled(bench, worker, 0, 3)
    assert [expectation_of(bench, key) for key in keys] == 3 * [NEVER]


# What a policy does with them.


def forest_with_chats() -> Forest:
    """Rows 0 to 2 are of both chats, 10 to 12 of the older, 20 to 22 of the later one."""
    forest = Forest(64, "rgg", capacity=64)
    forest.hint = Hint(priority=0, tool_pause_s=0.001)  # hints are heeded from the first one on
    forest.add([60])
    forest.hint = NO_HINT
    forest.clock_s += JOIN_S + 1
    forest.add([0, 1, 2, 10, 11, 12])
    forest.clock_s += JOIN_S + 1
    forest.touch(2)
    forest.add([20, 21, 22], 2)
    forest.clock_s += JOIN_S + 1
    return forest


def taken(forest: Forest, count: int) -> list[int]:
    return [forest.take() for _ in range(count)]


def test_private_end_of_an_ended_session_goes_first_and_what_it_shared_stays() -> None:
    forest = forest_with_chats()
    forest.touch(22, END)
    forest.clock_s += 1
    assert taken(forest, 3) == [22, 21, 20], "although it was used last"
    assert taken(forest, 4) == [60, 12, 11, 10]
    assert taken(forest, 3) == [2, 1, 0]


def test_session_that_goes_on_after_its_end_is_as_any_other() -> None:
    forest = forest_with_chats()
    forest.touch(22, END)
    forest.clock_s += 1
    forest.touch(22)
    forest.clock_s += 1
    assert taken(forest, 4) == [60, 12, 11, 10]


def test_paused_session_is_kept_until_its_time_and_no_longer() -> None:
    forest = forest_with_chats()
    forest.touch(12, Hint(tool_pause_s=60))
    forest.clock_s += 20
    forest.touch(22)
    forest.clock_s += 20
    policy, at = forest.policy, forest.uses.clock()
    assert isinstance(policy, Gittins)
    assert policy.worth(12, at) > policy.worth(22, at), "used before it, but expected"
    forest.clock_s += 160
    at = forest.uses.clock()
    assert policy.worth(12, at) < policy.worth(22, at), "it has not come back in twice its time"


def test_priority_doubles_the_worth_by_step_and_wears_off_what_is_shared() -> None:
    forest = forest_with_chats()
    policy, at = forest.policy, forest.uses.clock()
    assert isinstance(policy, Gittins)
    forest.touch(12)
    plain = policy.worth(12, at), policy.worth(1, at)
    forest.touch(12, Hint(priority=3))
    assert policy.worth(12, at) == pytest.approx(8 * plain[0])
    for weight in (4, 2, 1, 1):
        forest.touch(2)
        assert policy.worth(1, at) == pytest.approx(weight * plain[1])
    forest.touch(12, Hint(priority=-2))
    assert policy.worth(12, at) == pytest.approx(plain[0] / 4)


Guess = Callable[[int, float | None], Hint]
"""From a request's number, and the seconds until it goes on (None: never), to its hint."""


def hinted(trace: Trace, guess: Guess) -> Trace:
    gaps = continuations(trace)
    hints: Mapping[int, Hint] = {n: guess(n, gaps.get(n)) for n in range(trace.requests)}
    return replace(trace, hints=hints)


def hits(trace: Trace, capacity: int, policy: str = "rgg") -> float:
    return replay_policy(trace, capacity, policy, 512, 0, lambda _: None).blocks  # type: ignore[arg-type]


def truth(_: int, gap_s: float | None) -> Hint:
    return END if gap_s is None else Hint(tool_pause_s=max(0.1, round(gap_s)))


def opposite(_: int, gap_s: float | None) -> Hint:
    return Hint(tool_pause_s=20) if gap_s is None else END


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return chat_trace(tmp_path_factory.mktemp("chats"), requests=1200, seed=5)


@pytest.fixture(scope="module")
def lru_hits(chats: Trace) -> float:
    return hits(chats, 300, "lru")


def test_true_hints_win(chats: Trace) -> None:
    assert hits(hinted(chats, truth), 300) > hits(chats, 300) + 5


@pytest.mark.parametrize(
    "guess",
    [
        lambda *_: END,
        lambda *_: Hint(tool_pause_s=30, priority=3),
        lambda number, _: Hint(priority=number * 5 % 7 - 3),
        opposite,
    ],
)
def test_hints_that_are_wrong_lose_little_to_leaf_lru(
    chats: Trace, lru_hits: float, guess: Guess
) -> None:
    """Of a trace this short; of 12,000 requests and more it is less than the guard allows."""
    assert hits(hinted(chats, guess), 300) > lru_hits - 1


def test_trace_may_have_hints(tmp_path: Path) -> None:
    lines = chat_lines(3, seed=1)
    lines[1]["cache_hints"] = {"session_end": True}
    lines[2]["cache_hints"] = {"tool_pause_s": 3, "priority": -1}
    trace = read_trace(write_trace(tmp_path / "t.jsonl", lines), False, lambda _: None)
    assert trace.hints == {1: END, 2: Hint(tool_pause_s=3, priority=-1)}
    for told, words in (
        ([], "cache_hints: not an object"),
        ({"end": True}, "'end' is not one of session_end, tool_pause_s, priority"),
        ({"priority": True}, "priority: True is of another type"),
        ({"priority": 9}, "priority: 9, give -3 to 3"),
    ):
        lines[1]["cache_hints"] = told
        with pytest.raises(ConfigInvalid) as refusal:
            read_trace(write_trace(tmp_path / "t.jsonl", lines), False, lambda _: None)
        assert f"line 2: {words}" in str(refusal.value) or words in str(refusal.value)


def test_longest_pause_has_a_kind() -> None:
    forest = Forest(8, "rgg")
    forest.hint = Hint(tool_pause_s=PAUSE_MAX_S)
    forest.add([0])
    assert isinstance(forest.policy, Gittins)
    assert forest.policy._hints.expectation(0) == SOONEST + PAUSE_KINDS - 1
    assert forest.parent[0] == NO_ROW
