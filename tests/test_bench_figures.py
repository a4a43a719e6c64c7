"""The arithmetic of `kvist bench`: arrivals, percentiles, concurrency, prompts, chunked bodies."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.engine.bench.arrivals import RAMPS, Arrivals, Ramp
from kvist.engine.bench.client import Outcome
from kvist.engine.bench.serve import fields_of
from kvist.engine.bench.summary import (
    Times,
    Wanted,
    parse_wanted,
    peak_concurrency,
    spread,
    summarize,
)
from kvist.engine.bench.timed_trace import TimedTrace
from kvist.engine.bench.timeline import (
    FAILED,
    FIRST,
    GAPS,
    WAITS,
    parse_thresholds,
    parts_of,
    timeline,
)
from kvist.engine.bench.wire import Dechunker, Head, WireError
from kvist.engine.bench.workload import (
    Prompt,
    RandomPrompts,
    RepeatedPrefixes,
    Vocabulary,
    burstgpt_items,
    custom_items,
    sharegpt_items,
    warm_up_items,
)
from kvist.engine.cli import build_parser
from kvist.proto.errors import ConfigInvalid

IDS = Vocabulary(list(range(100, 900)))
rates = st.floats(0.01, 1e4)
times = st.lists(st.floats(0, 1e3), min_size=1, max_size=50)


def ids(prompt: Prompt) -> list[int]:
    assert isinstance(prompt, list)
    return prompt


def ended(sent: float, end: float, chunks: list[float], tokens: int, due: float = 0.0) -> Outcome:
    return Outcome(due, 10, sent, chunks, end, tokens, counted=True, done=True)


@given(rates, st.floats(0.05, 100), st.integers(1, 300), st.integers(0, 99))
def test_the_last_of_n_requests_is_due_at_n_over_the_rate(
    rate: float, burstiness: float, count: int, seed: int
) -> None:
    due = Arrivals(rate, burstiness).due_s(count, seed)
    assert len(due) == count
    assert due == sorted(due)
    assert due[0] >= 0
    assert due[-1] == pytest.approx(count / rate)
    assert due == Arrivals(rate, burstiness).due_s(count, seed)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_vary_as_a_gamma_process_of_that_burstiness(burstiness: float) -> None:
    gaps = np.diff(Arrivals(50.0, burstiness).due_s(20000, 7))
    variation = gaps.std() / gaps.mean()
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_infinite_burstiness_is_a_clock_and_an_infinite_rate_is_at_once() -> None:
    assert Arrivals(4.0, math.inf).due_s(4, 0) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert Arrivals().due_s(3, 0) == [0.0, 0.0, 0.0]


@given(st.sampled_from(RAMPS), rates, rates, st.integers(2, 200))
def test_a_ramp_goes_from_its_first_rate_to_its_last(
    strategy: str, start: float, end: float, count: int
) -> None:
    ramp = Ramp(strategy, start, end)
    seen = [ramp.rate(number, count) for number in range(count)]
    assert seen[0] == pytest.approx(start)
    assert seen[-1] == pytest.approx(end)
    assert seen == sorted(seen, reverse=end < start) or math.isclose(start, end)
    due = Arrivals(burstiness=math.inf, ramp=ramp).due_s(count, 0)
    assert np.diff([0.0, *due]) == pytest.approx([1 / rate for rate in seen])


@pytest.mark.parametrize(
    ("flag", "make"),
    [
        ("--request-rate", lambda: Arrivals(0.0)),
        ("--request-rate", lambda: Arrivals(math.nan)),
        ("--burstiness", lambda: Arrivals(1.0, -1.0)),
        ("--ramp-up-start-rps", lambda: Arrivals(ramp=Ramp("linear", 0.0, 5.0))),
        ("--percentile-metrics", lambda: parse_wanted("ttft,speed", "99", None)),
        ("--metric-percentiles", lambda: parse_wanted("ttft", "50,101", None)),
        ("--metric-percentiles", lambda: parse_wanted("ttft", "half", None)),
        ("--goodput", lambda: parse_wanted("ttft", "99", ["itl:5"])),
        ("--goodput", lambda: parse_wanted("ttft", "99", ["ttft=5"])),
        ("--random-range-ratio", lambda: RandomPrompts(range_ratio=1.0).items(IDS, 1, 0)),
        ("--random", lambda: RandomPrompts(input_tokens=0).items(IDS, 1, 0)),
        ("--prefix-repetition", lambda: RepeatedPrefixes(prefixes=0).items(IDS, 1, 0)),
    ],
)
def test_a_bad_setting_names_its_flag(flag: str, make: object) -> None:
    with pytest.raises(ConfigInvalid, match=flag):
        make()  # type: ignore[operator]


@given(times, st.floats(0, 100))
def test_a_percentile_lies_on_the_line_between_its_neighbours(
    values: list[float], percent: float
) -> None:
    found = spread("ttft", values, (percent,))
    order = sorted(1e3 * value for value in values)
    place = percent / 100 * (len(order) - 1)
    low = math.floor(place)
    high = min(low + 1, len(order) - 1)
    expected = order[low] + (order[high] - order[low]) * (place - low)
    assert found[f"p{percent:g}_ttft_ms"] == pytest.approx(expected, abs=1e-6)
    middle = spread("ttft", values, (50.0,))["p50_ttft_ms"]
    assert found["median_ttft_ms"] == pytest.approx(middle)
    assert min(order) - 1e-6 <= found["mean_ttft_ms"] <= max(order) + 1e-6


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=30))
def test_peak_concurrency_is_the_most_requests_at_any_moment(spans: list[tuple[int, int]]) -> None:
    outcomes = [ended(float(sent), float(sent + long), [], 0) for sent, long in spans]
    moments = [tick + 0.5 for tick in range(45)]
    most = max(sum(sent < at < sent + long for sent, long in spans) for at in moments)
    instant = any(long == 0 for _, long in spans)
    assert peak_concurrency(outcomes, 99.0) >= most
    assert instant or peak_concurrency(outcomes, 99.0) == most


def test_times_count_from_when_a_request_was_due_if_there_was_a_schedule() -> None:
    late = ended(sent=3.0, end=5.0, chunks=[4.0, 4.5, 5.0], tokens=5, due=1.0)
    from_due, from_sent = Times.of(late, True), Times.of(late, False)
    assert (from_due.ttft, from_due.e2el) == (3.0, 4.0)
    assert (from_sent.ttft, from_sent.e2el) == (1.0, 2.0)
    assert from_due.tpot == from_sent.tpot == 0.25
    assert from_due.itl == [0.5, 0.5]
    assert from_sent.meets({"ttft": 1000.0, "e2el": 2000.0})
    assert not from_due.meets({"ttft": 1000.0})


def test_a_summary_tells_good_failed_and_broken_off_requests_apart() -> None:
    good = ended(0.0, 2.0, [1.0, 2.0], 2)
    good.cached = {"hbm": 4, "dram": 2}
    failed = Outcome(0.0, 10, 0.5, [], 0.6, error="503: busy", done=True)
    outcomes = [good, failed, Outcome(1.0, 10, 1.0), Outcome(1.5, 10)]
    found = summarize(outcomes, 4.0, False, Wanted(goals={"ttft": 900.0}))
    assert (found["completed"], found["failed"], found["interrupted"]) == (1, 1, 2)
    assert found["errors"] == {"503: busy": 1}
    assert found["request_throughput"] == 0.25
    assert found["request_goodput"] == 0.0
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (10, 2)
    assert found["total_token_throughput"] == 3.0
    assert found["max_concurrent_requests"] == 2
    assert (found["cached_tokens"], found["computed_tokens"]) == (6, 4)
    assert found["cached_tokens_by_tier"] == {"hbm": 4, "dram": 2}


@given(
    st.integers(1, 60), st.integers(0, 40), st.floats(0, 0.9), st.integers(1, 20), st.integers(0, 9)
)
def test_random_prompts_have_the_lengths_asked_for_and_share_only_the_prefix(
    tokens: int, prefix: int, ratio: float, count: int, seed: int
) -> None:
    plan = RandomPrompts(tokens, 5, prefix, ratio)
    made = plan.items(IDS, count, seed)
    assert made == plan.items(IDS, count, seed)
    for item in made:
        assert len(item.prompt) == item.prompt_tokens
        assert item.prompt_tokens - prefix >= max(1, int(tokens * (1 - ratio)))
        assert item.prompt_tokens - prefix <= max(1, int(tokens * (1 + ratio)))
        assert ids(item.prompt)[:prefix] == ids(made[0].prompt)[:prefix]


def test_repeated_prefixes_are_used_evenly() -> None:
    made = RepeatedPrefixes(8, 4, 3, 2).items(IDS, 12, 1)
    heads = [tuple(ids(item.prompt)[:8]) for item in made]
    assert sorted(heads.count(head) for head in set(heads)) == [4, 4, 4]
    assert len({tuple(ids(item.prompt)) for item in made}) == 12


def test_warm_up_prompts_share_nothing_with_the_run() -> None:
    made = RandomPrompts(64, 4).items(IDS, 5, 3)
    for item in warm_up_items(IDS, made[0], 3, 3):
        assert item.prompt_tokens == 64
        assert all(ids(item.prompt)[:8] != ids(other.prompt)[:8] for other in made)


def write_trace(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(time: float, tokens: int, hash_ids: list[int], output: int = 8) -> dict[str, object]:
    return {
        "timestamp": time,
        "input_length": tokens,
        "output_length": output,
        "hash_ids": hash_ids,
    }


def test_a_replayed_trace_shares_what_the_recorded_one_shared(tmp_path: Path) -> None:
    path = write_trace(
        tmp_path / "t.jsonl",
        line(5.0, 30, [1, 2]),
        line(6.0, 40, [1, 2, 3]),
        line(9.0, 33, [1, 9]),  # whole chunks alone have ids here
    )
    made = TimedTrace(path, 16, time_scale=0.5).items(IDS, 10, 0)
    first, second, third = (ids(item.prompt) for item in made)
    assert [item.at_s for item in made] == [0.0, 0.5, 2.0]
    assert [item.prompt_tokens for item in made] == [30, 40, 33]
    assert second[:30] == first
    assert third[:16] == first[:16]
    assert third[16:24] != first[16:24]
    assert made == TimedTrace(path, 16, time_scale=0.5).items(IDS, 10, 0)


def test_a_trace_is_scaled_in_length_and_cut_to_a_context(tmp_path: Path) -> None:
    path = write_trace(
        tmp_path / "t.jsonl", line(0, 32, [1, 2], 20), line(1, 64, [1, 2, 3, 4]), line(2, 9, [1], 1)
    )
    made = TimedTrace(path, 16, 1.0, 0.5, 0.25, max_tokens=30).items(IDS, 10, 0)
    assert [(item.prompt_tokens, item.output_tokens) for item in made] == [(16, 5), (4, 1)]
    assert ids(made[1].prompt) == ids(made[0].prompt)[:4]
    assert len(TimedTrace(path, 16).items(IDS, 2, 0)) == 2


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (line(0, 100, [1, 2]), "--timed-trace-chunk-hash-size"),
        ({"timestamp": 0, "input_length": 5}, "hash_ids"),
        ({**line(0, 5, [1]), "timestamp": "noon"}, "timestamp"),
        ({**line(0, 5, [1]), "output_length": -1}, "output_length"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(
    tmp_path: Path, document: dict[str, object], fault: str
) -> None:
    path = write_trace(tmp_path / "t.jsonl", line(0, 16, [1]), document)
    with pytest.raises(ConfigInvalid, match=f"line 2.*{fault}"):
        TimedTrace(path, 16).items(IDS, 10, 0)


def test_conversations_give_first_questions_with_recorded_lengths(tmp_path: Path) -> None:
    talk = [{"value": "one two three four five"}, {"value": "six seven eight nine"}, {"value": "x"}]
    short = [{"value": "hi"}, {"value": "six seven eight nine"}]
    path = tmp_path / "s.json"
    entries = [{"conversations": talk}, {"conversations": short}, {"conversations": talk[:1]}, 7]
    path.write_text(json.dumps(entries))
    made = sharegpt_items(path, 3, 0, lambda text: len(text.split()), None)
    assert [(i.prompt, i.prompt_tokens, i.output_tokens) for i in made] == [
        ("one two three four five", 5, 4)
    ] * 3
    assert sharegpt_items(path, 1, 0, lambda text: len(text.split()), 2)[0].output_tokens == 2


def test_a_file_of_prompts_may_hold_text_or_ids(tmp_path: Path) -> None:
    path = write_trace(
        tmp_path / "c.jsonl", {"prompt": "a b"}, {"prompt": [1, 2, 3], "output_tokens": 9}
    )
    made = custom_items(path, 2, lambda text: len(text.split()), 4)
    assert [(i.prompt, i.prompt_tokens, i.output_tokens) for i in made] == [
        ("a b", 2, 4),
        ([1, 2, 3], 3, 9),
    ]
    write_trace(path, {"prompt": 5})
    with pytest.raises(ConfigInvalid, match="line 1: prompt"):
        custom_items(path, 2, len, 4)


def test_burstgpt_gives_the_lengths_of_gpt_4s_answered_requests(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,API log\n"
        "45,GPT-4,30,7,37,API log\n"
        "47,GPT-4,90,0,90,API log\n"
        "60,GPT-4,12,5,17,Conversation log\n"
    )
    made = burstgpt_items(path, 3, 0, IDS)
    assert {(len(ids(i.prompt)), i.output_tokens) for i in made} == {(30, 7), (12, 5)}
    assert len(made) == 3, "a file with too few is used more than once"
    path.write_text("Timestamp,Model\n5,GPT-4\n")
    with pytest.raises(ConfigInvalid, match="Request tokens"):
        burstgpt_items(path, 1, 0, IDS)


def test_a_timeline_has_a_row_of_parts_for_each_request() -> None:
    good = ended(1.0, 2.09, [2.0, 2.01, 2.02, 2.05, 2.09], 5, due=0.5)
    lost = Outcome(3.0, 10, 3.0, [3.5], 4.0, 1, error="out of <pages>", done=True)
    limits = parse_thresholds("25,35")
    parts = [(colour, round(end - begin, 3)) for begin, end, colour in parts_of(good, limits)]
    assert parts == [(WAITS, 0.5), (FIRST, 1.0), (GAPS[0], 0.02), (GAPS[1], 0.03), (GAPS[2], 0.04)]
    assert parts_of(lost, limits)[-1] == (3.5, 4.0, FAILED)
    page = timeline([good, lost, Outcome(5.0, 10)], limits)
    assert page.count("<g>") == 3
    assert "out of &lt;pages&gt;" in page
    assert timeline([], limits).count("<g>") == 0
    for bad in ("25", "50,25", "a,b", "0,nan"):
        with pytest.raises(ConfigInvalid, match="--timeline-itl-thresholds"):
            parse_thresholds(bad)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.integers(0, 2**32))
def test_a_chunked_body_is_the_same_however_its_bytes_are_cut(
    parts: list[bytes], seed: int
) -> None:
    wire = b"".join(b"%x;note=1\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n"
    wire += b"trailer: 1\r\n" * (seed % 2) + b"\r\n"
    chance = random.Random(seed)
    dechunker, got = Dechunker(), b""
    while wire:
        assert not dechunker.ended
        cut = chance.randint(1, 9)
        got += dechunker.push(wire[:cut])
        wire = wire[cut:]
    assert got == b"".join(parts)
    assert dechunker.ended


def test_what_is_not_http_is_refused() -> None:
    with pytest.raises(WireError):
        Dechunker().push(b"no size\r\n")
    with pytest.raises(WireError):
        Head.parse(b"SSH-2.0-OpenSSH_9")
    head = Head.parse(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 12\r\nConnection: close")
    assert (head.status, head.length, head.chunked, head.keep) == (429, 12, False, False)


@pytest.mark.parametrize(
    ("backend", "asked"),
    [("openai", {"logprobs": 3}), ("openai-chat", {"logprobs": True, "top_logprobs": 3})],
)
def test_logprobs_are_asked_for_as_each_interface_writes_it(
    backend: str, asked: dict[str, object]
) -> None:
    words = ["bench", "serve", "--backend", backend, "--logprobs", "3"]
    assert fields_of(build_parser().parse_args(words), "m") == {
        "model": "m", "temperature": 0.0, **asked,
    }  # fmt: skip
