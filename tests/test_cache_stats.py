"""`kvist cache stats` against a real sidecar and a worker that has measured something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.sidecar import Prompt, Sidecar, load_all, wait_until

from kvist.cachesvc.folders import ADDRESS_NAME, leave_address, left_address
from kvist.cachesvc.tools import door
from kvist.cachesvc.view import stats_table
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
    for tier in (*by_page["tiers"], *by_grpc["tiers"]):
        del tier["node_bytes"]  # known when the arena is populated, perhaps between the two
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


@pytest.mark.parametrize("tool", [("cache", "stats"), ("cache", "ls"), ("top", "--once")])
def test_a_variable_is_obeyed_by_every_tool_and_named_where_nobody_answers(
    tool: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVIST_SOCKET", "/nowhere/kvistd.sock")
    assert main(tool) == 2
    error = capsys.readouterr().err
    why = "no sidecar answers at /nowhere/kvistd.sock: No such file or directory"
    assert f"KVIST_SOCKET: {why}" in error


def test_where_nobody_said_anything_the_error_says_what_was_tried_and_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home(monkeypatch, tmp_path)
    monkeypatch.setattr(stats_table, "PAGE", "http://127.0.0.1:1")
    code, _, error = run(capsys)
    assert code == 2
    wanted = (f"{tmp_path}/kvist/kvistd.sock", "http://127.0.0.1:1", "--socket", "--url")
    assert all(one in error for one in wanted)


def at_home(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Be a user whose runtime folder it is; root's would be that of the machine."""
    for name in ("KVIST_SOCKET", "KVIST_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    run = (f"{folder}/kvist", f"{folder}/shm")
    monkeypatch.setattr(door, "home_folders", lambda _user, _environment: run)


def test_the_tools_find_this_users_sidecar_wherever_its_socket_is_and_say_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home(monkeypatch, tmp_path)
    made = Sidecar(tmp_path / "far", ["--run-dir", str(tmp_path / "kvist")])
    made.start()
    made.client().store(Prompt(1, 3).items)
    for tool in ("cache stats", "cache ls", "top --once --interval 0.1"):
        assert main(tool.split()) == 0
        assert f"of the sidecar at {made.socket}" in capsys.readouterr().err
    note = tmp_path / "kvist" / ADDRESS_NAME
    text = note.read_text()
    made.kill()
    assert note.read_text() == text
    assert main(["cache", "ls"]) == 2
    assert f"no sidecar answers at {made.socket}" in capsys.readouterr().err
    made.start()
    made.close()
    assert not note.exists()


def test_a_note_of_another_user_or_of_no_path_is_not_followed(tmp_path: Path) -> None:
    note = leave_address(tmp_path, Path("/a/b.sock"))
    assert left_address(tmp_path) == "/a/b.sock"
    note.write_text("host:1\n")
    assert left_address(tmp_path) == ""
    note.rename(tmp_path / "other")
    note.symlink_to(tmp_path / "other")
    assert left_address(tmp_path) == ""
    assert left_address(tmp_path / "none") == ""


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
