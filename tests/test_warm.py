"""`kvist cache warm` against a real engine and a real sidecar."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.models import tiny_llama
from sim.server import metric
from sim.sidecar import Sidecar, wait_until

from kvist.engine.cli import main
from kvist.engine.local import LocalProcess, free_port

KVIST = [sys.executable, "-P", "-m", "kvist.engine.cli"]
ASKED = "vllm:prompt_tokens_total"


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path_factory.mktemp("sidecar"))
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(sidecar: Sidecar, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalProcess]:
    """A real engine, of a model of a few weights, at the real sidecar."""
    folder, port = tmp_path_factory.mktemp("engine"), free_port()
    tiny_llama(folder / "model", 1)
    command = [*KVIST, "serve", str(folder / "model"), "--port", str(port), "--threads", "1"]
    command += ["--cache", str(sidecar.socket), "--block-size", "16", "--dtype", "float32"]
    server = LocalProcess(command, f"http://127.0.0.1:{port}", "/health", folder / "log")
    server.start()
    server.wait_ready()
    yield server
    assert server.stop() == 0


def warm(
    capsys: pytest.CaptureFixture[str], engine: LocalProcess, file: Path, *flags: str
) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["cache", "warm", str(file), "--url", engine.url, *flags])
    text = capsys.readouterr()
    return code, text.out, text.err


def test_warm_sends_every_kind_of_line_and_counts_its_tokens(
    engine: LocalProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    chat = {"messages": [{"role": "user", "content": "Tell me of blocks."}]}
    lines = ["Some text.", [1, 2, 3], {"prompt": "More."}, chat, {"custom_id": "a", "body": chat}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    code, out, error = warm(capsys, engine, file, "--json", "--socket", "/nowhere")
    assert code == 0, error
    document = json.loads(out)
    assert (document["prompts"], document["failed"]) == (5, 0)
    assert document["prompt_tokens"] > 5
    assert document["next_line"] == 10
    assert document["cached_now"] is None
    assert json.loads(warm(capsys, engine, file, "--json", "--from-line", "7")[1])["prompts"] == 2
    assert "5 prompts of" in warm(capsys, engine, file, "--socket", "/nowhere")[1]


def test_after_warm_the_sidecar_has_the_prompts_and_says_so(
    engine: LocalProcess,
    sidecar: Sidecar,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "prompts.jsonl"
    ids = [[100 + n, *range(5, 69)] for n in range(3)]
    file.write_text("\n".join(map(json.dumps, [*ids, "Words " * 30])))
    where = ("--json", "--socket", str(sidecar.socket))
    first = json.loads(warm(capsys, engine, file, *where)[1])
    text = first["prompt_tokens"] - 3 * 65
    stored = 3 * 64 + text // 16 * 16
    assert first["cached_before_tokens"] == 0
    assert first["cached_now"] == {
        "prompts": 4,
        "of_tokens": first["prompt_tokens"],
        "tokens": stored,
        "dram_tokens": stored,
    }
    again = json.loads(warm(capsys, engine, file, *where)[1])
    assert again["cached_before_tokens"] >= 3 * 64
    words = warm(capsys, engine, file, "--socket", str(sidecar.socket))[1]
    assert f"cached now: {stored} of {first['prompt_tokens']} tokens (all in DRAM)" in words


def test_warm_goes_on_after_a_prompt_that_the_engine_refuses_and_says_which(
    engine: LocalProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"good"\n[999999999]\n"good, too"\n')
    code, out, _ = warm(capsys, engine, file, "--socket", "/nowhere", "--concurrency", "1")
    assert code == 1
    assert "2 prompts of" in out
    assert "1 prompt failed, the first of line 2: " in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1"),
        ('"fine"\n{"prompt": 3}', "line 2"),
        ('{"prompt": "a", "messages": []}', "line 1: not a prompt"),
        ('["words"]', "one of token ids"),
        ("\n\n", "has no prompt"),
    ],
)
def test_a_line_that_is_no_prompt_is_told_before_anything_is_sent(
    engine: LocalProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    code, out, error = warm(capsys, engine, file)
    assert (code, out) == (2, "")
    assert words in error


def test_warm_without_an_engine_names_the_flag(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"text"')
    capsys.readouterr()
    for url, words in (("http://127.0.0.1:9", "no server answers"), ("ftp://x", "is no URL")):
        assert main(["cache", "warm", str(file), "--url", url]) == 2
        assert words in capsys.readouterr().err


def test_an_interrupted_warm_says_what_was_done_and_from_which_line_to_go_on(
    engine: LocalProcess, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(f"prompt {n} " * 20) for n in range(20_000)))
    command = [*KVIST, "cache", "warm", str(file), "--url", engine.url, "--json"]
    before = metric(engine.url, ASKED)
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: metric(engine.url, ASKED) > before, "the first prompt", 30.0)
    tool.send_signal(signal.SIGINT)
    out, error = tool.communicate(timeout=30)
    assert tool.returncode == 130, error
    document = json.loads(out)
    assert 0 < document["prompts"] < 20_000
    # With two at once, some of later lines may be done before that of an earlier one.
    assert 1 <= document["next_line"] <= document["prompts"] + 1
    assert error == ""
