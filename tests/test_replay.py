"""Replay: traces that are read or refused, and what a cache would hit on them."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sim.traces import chat_lines, write_trace

from kvist.cachesvc.study.replay import OptCache, PolicyCache, replay
from kvist.cachesvc.study.replay_table import parse_capacities
from kvist.cachesvc.study.trace import Trace, read_trace
from kvist.cachesvc.study.whatif import MULTIPLES
from kvist.engine.cli import main
from kvist.proto.errors import ConfigInvalid

Capture = pytest.CaptureFixture[str]


def read(path: Path, milliseconds: bool = False) -> Trace:
    return read_trace(path, milliseconds, lambda _: None)


def line(*ids: object, at: float = 0.0) -> str:
    return json.dumps({"timestamp": at, "input_length": 512 * len(ids), "hash_ids": ids})


def test_block_is_known_by_all_ids_before_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([line(1, 2, 3), line(1, 3), line("1", 2), "", line(1, 2)]))
    trace = read(path)
    assert [trace.prompt(n).tolist() for n in range(4)] == [[0, 1, 2], [0, 3], [4, 5], [0, 1]]
    assert trace.parents.tolist() == [-1, 0, 1, 0, -1, 4]
    assert trace.depths.tolist() == [0, 1, 2, 1, 0, 1]


def test_packed_traces_are_read_and_requests_sorted(tmp_path: Path) -> None:
    text = "\n".join([line(1, at=9000), line(2, at=7000), line(at=8000)])
    for path, opener in ((tmp_path / "a.xz", lzma.open), (tmp_path / "b.gz", gzip.open)):
        with opener(path, "wt") as file:
            file.write(text)
        trace = read(path, milliseconds=True)
        assert trace.times_s.tolist() == [0.0, 1.0, 2.0]
        assert [len(trace.prompt(n)) for n in range(3)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no request with a block"),
        (line(), "no request with a block"),
        (line(1) + "\n{", "line 2: not JSON"),
        ("[1]", "line 1: not an object"),
        ('{"timestamp": "x", "input_length": 1, "hash_ids": [1]}', "line 1: timestamp: 'x'"),
        ('{"timestamp": NaN, "input_length": 1, "hash_ids": [1]}', "line 1: timestamp: nan"),
        ('{"timestamp": 1, "hash_ids": [1]}', "line 1: input_length: None"),
        ('{"timestamp": 1, "input_length": 1, "hash_ids": 7}', "hash_ids: not a list"),
        ('{"timestamp": 1, "input_length": 1, "hash_ids": [[]]}', "hash_ids: [] is no number"),
    ],
)
def test_bad_trace_is_refused_with_line_and_fault(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigInvalid) as refusal:
        read(path)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", ["none.jsonl", "torn.xz", "binary.jsonl", "no.gz", "."])
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "torn.xz").write_bytes(lzma.compress(b"{}" * 1000)[:40])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "no.gz").write_bytes(b"plain")
    with pytest.raises(ConfigInvalid):
        read(tmp_path / name)


def test_capacities_are_blocks_or_percent() -> None:
    assert parse_capacities("5%, 12,0.001%", 2000) == [100, 12, 1]
    for text in ("", "x", "0", "-1", "1.5", "nan", "5%%", "1e99"):
        with pytest.raises(ConfigInvalid):
            parse_capacities(text, 2000)


def model_hits(trace: Trace, capacity: int, key: Callable[[int, int], int]) -> list[int]:
    """A cache in a set; the leaf whose key, of its block's last request, is lowest goes first."""
    cached: set[int] = set()
    keys: dict[int, int] = {}
    hits = []
    for number in range(trace.requests):
        prompt = trace.prompt(number).tolist()
        found = 0
        while found < len(prompt) and prompt[found] in cached:
            found += 1
        hits.append(found)
        cached.update(prompt)
        keys.update({row: key(number, row) for row in prompt})
        while len(cached) > capacity:
            inner = {int(trace.parents[row]) for row in cached}
            cached.remove(min(cached - inner, key=lambda row: (keys[row], -trace.depths[row])))
    return hits


def small(folder: Path) -> Trace:
    return read(write_trace(folder / "small.jsonl", chat_lines(300, seed=1, sessions=8)))


def test_lru_is_that_of_a_plain_model(tmp_path: Path) -> None:
    trace = small(tmp_path)
    for capacity in (1, 40, 120):
        hits, _ = replay(trace, PolicyCache(trace, capacity, "lru", 0), lambda _: None)
        assert hits.tolist() == model_hits(trace, capacity, lambda number, _: number)


def test_opt_is_that_of_a_plain_model_and_never_worse(tmp_path: Path) -> None:
    trace = small(tmp_path)

    def next_use(number: int, row: int) -> int:
        start = int(trace.starts[number + 1])
        later = np.flatnonzero(trace.blocks[start:] == row)
        return -start - int(later[0]) if len(later) else -(10**9)

    for capacity in (40, 120):
        hits, _ = replay(trace, OptCache(trace, capacity), lambda _: None)
        assert hits.sum() == sum(model_hits(trace, capacity, next_use))
        for policy in ("rgg", "lru"):
            others, _ = replay(trace, PolicyCache(trace, capacity, policy, 0), lambda _: None)
            assert hits.sum() >= others.sum()


def test_everything_fits_and_hits_are_what_comes_again(tmp_path: Path) -> None:
    trace = small(tmp_path)
    hits, _ = replay(trace, PolicyCache(trace, trace.distinct, "rgg", 0), lambda _: None)
    assert hits.sum() == len(trace.blocks) - trace.distinct


def test_command_prints_a_table_for_people(tmp_path: Path, capsys: Capture) -> None:
    path = write_trace(tmp_path / "chats.jsonl", chat_lines(200, seed=2))
    assert main(["cache", "replay", str(path), "--capacity", "10%,300"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("chats.jsonl: 200 requests, ")
    assert sum(" rgg " in row for row in out) == sum(" opt " in row for row in out) == 2
    assert max(map(len, out)) <= 80


def test_command_prints_json_for_scripts(tmp_path: Path, capsys: Capture) -> None:
    path = write_trace(tmp_path / "chats.jsonl", chat_lines(200, seed=2))
    arguments = ["cache", "replay", str(path), "--capacity", "50%", "--policy", "lru", "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    (size,) = document["sizes"]
    assert document["requests"] == 200
    assert set(size["policies"]) == {"lru", "opt"}
    curve = size["policies"]["lru"]["what_if"]
    assert [point["multiple"] for point in curve] == list(MULTIPLES)
    assert curve[1]["hit_ratio"] == pytest.approx(size["policies"]["lru"]["blocks"] / 100, abs=1e-4)
    assert 0 < size["policies"]["lru"]["blocks"] <= size["policies"]["opt"]["blocks"] <= 100


@pytest.mark.parametrize(("step", "ms"), [(1000, []), (1000, ["--ms"]), (1, [])])
def test_milliseconds_that_are_read_as_seconds_are_asked_about(
    step: int, ms: list[str], tmp_path: Path, capsys: Capture
) -> None:
    times = (step * 60 * at for at in range(30))
    request = {"input_length": 512, "hash_ids": [1]}
    lines = [{"timestamp": time, **request} for time in times]
    path = write_trace(tmp_path / "chats.jsonl", lines)
    assert main(["cache", "replay", str(path), "--capacity", "1", *ms]) == 0
    assert ("give --ms" in capsys.readouterr().err) == (step == 1000 and not ms)


def test_command_says_what_is_wrong(tmp_path: Path, capsys: Capture) -> None:
    path = write_trace(tmp_path / "chats.jsonl", chat_lines(5, seed=2))
    for arguments in (["no such file"], [str(path), "--capacity", "much"]):
        assert main(["cache", "replay", *arguments]) == 2
        assert "kvist cache replay: error: " in capsys.readouterr().err
