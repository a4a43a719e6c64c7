"""The history: exact sums over any span, bounded, the same in pieces as at once."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from test_metrics import stats

from kvist.cachesvc.core.store import StoreStats
from kvist.cachesvc.view.history import (
    FIELDS,
    MEMORY_BYTES,
    STEPS_S,
    History,
    Recorder,
    sample,
)
from kvist.proto.errors import Detached
from kvist.proto.histograms import WORKER_HISTOGRAMS, words_of

START = 1_700_000_000.0


def row(tokens: float) -> dict[str, float]:
    """A sample after so many tokens, half of them hits of DRAM."""
    values = dict.fromkeys(FIELDS, 0.0)
    values["hit_tokens.dram"] = values["miss_tokens.tail"] = tokens / 2
    return values


def filled(seconds: int) -> History:
    """One with a sample each second, and 10 tokens in each."""
    history = History()
    for second in range(seconds + 1):
        history.add(START + second, row(10.0 * second))
    return history


def test_a_sample_has_every_field_and_its_tokens_add_up() -> None:
    values = sample(stats())
    assert tuple(values) == FIELDS
    tokens = [n for name, n in values.items() if name.startswith(("hit_tokens.", "miss_tokens."))]
    assert sum(tokens) == 1000
    assert values["used_bytes.flash"] == 400 * 4096
    assert values["evicted_bytes.dram"] == 5 * 4096


@pytest.mark.parametrize(("seconds", "asked"), [(30, 60.0), (300, 60.0), (900, 600.0)])
def test_a_span_counts_what_was_asked_for_in_it_and_no_more_than_there_is(
    seconds: int, asked: float
) -> None:
    span = filled(seconds).span(asked)
    assert span.seconds == min(seconds, asked)
    assert span.requested == 10 * span.seconds
    assert span.sum("hit_tokens.") == span.sum("miss_tokens.")


def test_an_hour_is_counted_from_coarser_samples_to_within_a_step() -> None:
    span = filled(5000).span(3600.0)
    assert abs(span.seconds - 3600) <= 10
    assert span.requested == 10 * span.seconds


def test_the_rings_are_bounded_and_go_as_far_back_as_they_say() -> None:
    history = History()
    for second in range(0, 100_000, 7):
        history.add(START + second, row(second))
    for step, length in STEPS_S.items():
        shown = history.since(step, 0.0)
        assert len(shown["at"]) == length + shown["is_early"]
        assert shown["at"][-1] - shown["at"][0] >= (length - 1) * step
        assert shown["at"] == sorted(shown["at"])
    assert MEMORY_BYTES < 3 << 20


def test_asked_piece_by_piece_it_says_the_same_as_at_once() -> None:
    history, pieces, last = History(), [], 0.0
    for second in range(100):
        history.add(START + second, row(10.0 * second))
        if second % 7 == 0:
            piece = history.since(1, last)
            column = piece["columns"]["hit_tokens.dram"]
            values = column if isinstance(column, list) else [column] * len(piece["at"])
            pieces += zip(piece["at"], values, strict=True)
            last = piece["at"][-1]
    whole = history.since(1, 0.0)
    both = list(zip(whole["at"], whole["columns"]["hit_tokens.dram"], strict=True))
    assert pieces == both[: len(pieces)]
    assert len(both) - len(pieces) == 1


def test_a_column_that_does_not_change_is_one_number() -> None:
    columns = filled(10).since(1, 0.0)["columns"]
    assert columns["hit_tokens.flash"] == 0
    assert columns["hit_tokens.dram"] == [5 * second for second in range(11)]


def test_at_a_coarse_step_the_last_sample_is_of_now() -> None:
    shown = filled(130).since(60, 0.0)
    assert shown["at"] == [START, START + 40, START + 100, START + 130]
    assert shown["is_early"]
    assert shown["columns"]["hit_tokens.dram"][-1] == 5 * 130
    assert not filled(100).since(60, 0.0)["is_early"]


def test_nothing_was_asked_of_a_history_without_samples() -> None:
    history = History()
    assert history.since(1, 0.0)["at"] == []
    assert history.span(60.0).requested == 0


def test_a_store_that_does_not_answer_leaves_a_gap() -> None:
    times = iter(range(1000))
    answers = iter([stats(), None, stats(hit_tokens={"hbm": 0, "dram": 700, "flash": 0})])

    def read() -> StoreStats:
        answer = next(answers)
        if answer is None:
            raise Detached("busy")
        return answer

    history = History()
    recorder = Recorder(read, history, wall=lambda: START, now=lambda: float(next(times)))
    recorder.take()
    with pytest.raises(Detached):
        recorder.take()
    recorder.take()
    assert len(history.since(1, 0.0)["at"]) == 2
    assert history.span(60.0).change["hit_tokens.dram"] == 200


def test_the_recorder_takes_a_sample_at_once_and_leaves_no_thread() -> None:
    taken = threading.Event()

    def read() -> StoreStats:
        taken.set()
        return stats()

    recorder = Recorder(read, History())
    recorder.start()
    assert taken.wait(10.0)
    recorder.close()
    assert "kvist-history" not in {thread.name for thread in threading.enumerate()}


def test_a_wall_clock_that_jumps_back_does_not_turn_the_history_round() -> None:
    wall = iter([START, START - 3600.0, START - 3600.0])
    now = iter([0.0, 1.0, 2.0, 3.0])
    history = History()
    recorder = Recorder(stats, history, wall=lambda: next(wall), now=lambda: next(now))
    recorder.take()
    recorder.take()
    at = history.since(1, 0.0)["at"]
    assert at == [START + 1.0, START + 2.0]


def test_every_total_of_the_store_is_kept() -> None:
    full = dataclasses.asdict(stats())
    words = {word for name in WORKER_HISTOGRAMS for word in words_of(name)}
    for name in (*full["counters"], *full["events"]):
        assert name in FIELDS or name in words, name
