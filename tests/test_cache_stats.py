"""`kvist cache stats` against a real sidecar and a worker that has measured something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.sidecar import Prompt, Sidecar, load_all, wait_until

from kvist.cachesvc.view.stats_table import from_url
from kvist.engine.cli import main
from kvist.proto.shm import NEVER, RATES

MEASURED = {name: 10 * at for at, name in enumerate(RATES, 1)} | {
    "load_bytes_per_s.dram": 5_210_000_000,
    "break_even_tokens.dram": 64,
    "break_even_tokens.flash": NEVER,
}


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path_factory.mktemp("sidecar"))
    made.start()
    client = made.client("worker-a")
    prompt = Prompt(1, 5)
    client.store(prompt.items)
    assert load_all(client, prompt) == [None] * 5
    client.count(100, {"dram": 80}, {"tail": 4, "cheaper": 16})
    client.show_rates(MEASURED)
    wait_until(lambda: from_url(made.said("page"))["blocks"] == 5, "the blocks to be counted")
    yield made
    made.close()


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = main(["cache", "stats", *flags])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_tables_show_tiers_reasons_rates_and_the_length_that_pays(
    sidecar: Sidecar, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "--url", sidecar.said("page"))
    assert code == 0
    words = [line.split() for line in out.splitlines()]
    assert any(line[:1] == ["dram"] and line[3:4] == ["5"] for line in words)
    assert ["hit", "dram", "80", "80.0", "%"] in words
    assert ["miss", "cheaper", "16", "16.0", "%"] in words
    worker = next(line for line in words if line[:1] == ["worker-a"])
    assert worker[1] == "5.21"
    assert worker[-2:] == ["64", "never"]
    assert all(len(line) <= 80 for line in out.splitlines())


def test_grpc_and_the_page_say_the_same(
    sidecar: Sidecar, capsys: pytest.CaptureFixture[str]
) -> None:
    by_page = json.loads(run(capsys, "--url", sidecar.said("page"), "--json")[1])
    by_grpc = json.loads(run(capsys, "--socket", str(sidecar.socket), "--json")[1])
    assert by_grpc.keys() == by_page.keys()
    for name in by_grpc.keys() - {"uptime_s", "spans", "attached"}:  # which go on with the clock
        assert by_grpc[name] == by_page[name], name
    assert by_grpc["workers"] == [{"client": "worker-a", "rates": MEASURED}]


def test_without_workers_there_are_no_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Sidecar(tmp_path)
    alone.start()
    assert "no worker is attached" in run(capsys, "--socket", str(alone.socket))[1]
    alone.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--url", "http://127.0.0.1:1"), "no sidecar answers"),
        (("--url", "127.0.0.1:9401"), "does not begin with http://"),
        (("--socket", "/nowhere/kvistd.sock"), "no sidecar answers"),
    ],
)
def test_where_nobody_answers_the_message_names_the_flag(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, str], said: str
) -> None:
    code, out, error = run(capsys, *flags)
    assert (code, out) == (2, "")
    assert flags[0] in error
    assert said in error
