"""`kvist cache ls|show|pin|evict|clear|warm` as a person types them, against real processes."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sim.sidecar import BLOCK_TOKENS, Prompt, Sidecar, load_all, namespace, wait_until

from kvist.cachesvc.tools.dropping import run_clear
from kvist.cachesvc.tools.words import count, parse_span, span
from kvist.engine.cli import build_parser, main
from kvist.proto.errors import ConfigInvalid
from kvist.proto.keys import BlockKey

KVIST = [sys.executable, "-P", "-m", "kvist.engine.cli"]
ASKED = "vllm:prompt_tokens_total"
ACME = namespace(salt="acme:secret")


def token_ids(prompt: Prompt) -> list[int]:
    raw = b"".join(item.tokens for item in prompt.items)
    return [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    folder = tmp_path_factory.mktemp("sidecar")
    made = Sidecar(folder, ("--flash-path", str(folder / "flash"), "--flash-bytes", "8MiB"))
    made.start()
    yield made
    made.close()


@pytest.fixture
def prompts(sidecar: Sidecar) -> Iterator[list[Prompt]]:
    """Two prompts of the common pool, the first used once more, and one of acme's."""
    said(sidecar, "clear", "--yes", "--json")  # what an engine has stored
    client = sidecar.client()
    made = [Prompt(1, 6), Prompt(2, 3)]
    for prompt in made:
        client.store(prompt.items)
    client.touch(made[0].keys, 6)
    acme = sidecar.client("acme", ACME)
    made.append(Prompt(3, 2, ACME))
    acme.store(made[2].items)
    wait_until(
        lambda: any(run["uses"] == 1 for run in said(sidecar, "ls", "--json")["runs"]), "the touch"
    )
    yield made
    said(sidecar, "clear", "--yes", "--json")


def said(sidecar: Sidecar, *arguments: str) -> Any:
    """The JSON of a tool that ends well."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["cache", *arguments, "--socket", str(sidecar.socket)]) == 0
    return json.loads(out.getvalue())


def run(
    capsys: pytest.CaptureFixture[str], sidecar: Sidecar, *arguments: str
) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["cache", *arguments, "--socket", str(sidecar.socket)])
    text = capsys.readouterr()
    return code, text.out, text.err


def test_ls_shows_the_most_used_first_and_filters_choose(
    sidecar: Sidecar, prompts: list[Prompt], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, sidecar, "ls")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[1][0] == prompts[0].keys[-1].hex()[:12]
    assert lines[1][1:3] == [str(6 * BLOCK_TOKENS), "6"]
    assert len(lines) == 4
    assert all(len(line) <= 80 for line in out.splitlines())
    for flags, expected in (
        (("--sort", "size", "--reverse", "--limit", "1"), prompts[2]),
        (("--min-uses", "1"), prompts[0]),
        (("--min-tokens", str(4 * BLOCK_TOKENS)), prompts[0]),
        (("--namespace", ACME.digest().hex()[:10]), prompts[2]),
    ):
        code, out, _ = run(capsys, sidecar, "ls", *flags)
        assert out.splitlines()[1].startswith(expected.keys[-1].hex()[:12]), flags
    assert "and 2 more" in run(capsys, sidecar, "ls", "--limit", "1")[1]
    assert "no prefix is stored that fits" in run(capsys, sidecar, "ls", "--pinned")[1]


def test_show_takes_the_first_digits_of_a_key_and_says_all(
    sidecar: Sidecar, prompts: list[Prompt], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = prompts[0]
    code, out, _ = run(capsys, sidecar, "show", prompt.keys[2].hex()[:16], "--tokens")
    assert code == 0
    fields = {line[:12].strip(): line[12:] for line in out.splitlines()}
    assert fields["key"] == prompt.keys[2].hex()
    assert fields["position"] == "block 2 of its prompt, tokens 32 to 47"
    assert fields["before it"] == ", ".join(key.hex()[:12] for key in prompt.keys[:2])
    assert fields["tokens"].split() == [str(token) for token in token_ids(prompt)[32:48]]
    assert "checksum right" in fields["dram"]
    document = json.loads(run(capsys, sidecar, "show", prompt.keys[2].hex(), "--json")[1])
    assert document["chain"] == [key.hex() for key in prompt.keys[:3]]
    assert document["tokens"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("show", "0" * 32), 1, "no tier holds the block"),
        (("show", "xyz"), 2, "is no key"),
        (("show", "0" * 31), 1, "no stored block has a key that begins"),
        (("evict", "0" * 32), 1, "no tier holds the block"),
        (("ls", "--namespace", "nothex"), 2, "is no digest"),
        (("ls", "--limit", "-1"), 2, "--limit"),
        (("pin",), 2, "give a key, or --prompts FILE"),
        (("pin", "00", "--ttl", "soon"), 2, "--ttl"),
        (("pin", "00", "--strength", "0"), 2, "--strength"),
        (("warm", "/nowhere/prompts"), 2, "cannot read /nowhere/prompts"),
        (("clear", "--namespace", "zz", "--yes"), 2, "--namespace"),
    ],
)
def test_a_mistake_gets_a_sentence_and_its_exit_code(
    sidecar: Sidecar,
    prompts: list[Prompt],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    assert prompts
    got, out, error = run(capsys, sidecar, *arguments)
    assert (got, out) == (code, "")
    assert words in error
    assert error.startswith(f"kvist cache {arguments[0]}: ")
    assert "Traceback" not in error


def test_digits_that_several_keys_begin_with_are_answered_with_those_keys(
    sidecar: Sidecar, capsys: pytest.CaptureFixture[str]
) -> None:
    client = sidecar.client("many")
    many = [Prompt(seed, 1) for seed in range(40, 60)]
    for prompt in many:
        client.store(prompt.items)
    digits = [prompt.keys[0].hex()[0] for prompt in many]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    code, _, error = run(capsys, sidecar, "show", twice)
    assert code == 2
    assert f"several blocks begin with {twice}" in error
    run(capsys, sidecar, "clear", "--yes")


def test_pins_are_set_by_key_and_by_prompt_and_end(
    sidecar: Sidecar, prompts: list[Prompt], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    key = prompts[0].keys[3].hex()
    code, out, _ = run(capsys, sidecar, "pin", key, "--ttl", "5m", "--strength", "7")
    assert (code, out) == (0, "4 blocks pinned for 5m\n")
    shown = json.loads(run(capsys, sidecar, "show", key, "--json")[1])
    assert 290 < shown["pinned_s"] <= 301
    assert shown["pin_lives"] == {"dram": 7, "flash": 7}
    (pinned,) = json.loads(run(capsys, sidecar, "ls", "--pinned", "--json")[1])["runs"]
    assert pinned["pinned_blocks"] == 4
    assert run(capsys, sidecar, "unpin", key)[1] == "4 blocks unpinned\n"
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(token_ids(each)) for each in prompts[:2]))
    code, _, error = run(capsys, sidecar, "pin", "--prompts", str(file))
    assert code == 2
    assert "--namespace: 2 namespaces with blocks fit" in error
    own = namespace().digest().hex()[:12]
    code, out, _ = run(capsys, sidecar, "pin", "--prompts", str(file), "--namespace", own)
    assert (code, out) == (0, "9 blocks pinned for 1h\n")


def test_evict_drops_a_leaf_or_a_tree_and_clear_a_namespace(
    sidecar: Sidecar, prompts: list[Prompt], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [key.hex() for key in prompts[0].keys]
    assert run(capsys, sidecar, "evict", keys[5])[1] == "1 block dropped\n"
    code, _, error = run(capsys, sidecar, "evict", keys[2])
    assert code == 2
    assert "give --descendants" in error
    assert run(capsys, sidecar, "evict", keys[2], "--descendants")[1] == "3 blocks dropped\n"
    assert len(said(sidecar, "show", keys[1], "--json")["chain"]) == 2
    code, out, _ = run(
        capsys, sidecar, "clear", "--namespace", ACME.digest().hex(), "--yes", "--json"
    )
    assert (code, json.loads(out)) == (0, {"dropped": 2})
    assert run(capsys, sidecar, "clear", "--namespace", "00", "--yes")[0] == 1
    assert {run["namespace"] for run in said(sidecar, "ls", "--json")["runs"]} == {
        namespace().digest().hex()
    }


def test_clear_asks_on_a_terminal_and_refuses_without_one(
    sidecar: Sidecar, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prompts
    flags = build_parser().parse_args(["cache", "clear", "--socket", str(sidecar.socket)])
    with pytest.raises(ConfigInvalid, match="--yes"):
        run_clear(flags)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def no(question: str) -> str:
        asked.append(question)
        return "n"

    assert run_clear(flags, no) == 1
    assert asked == ["drop 11 blocks of 2 namespaces from every tier? [y/N] "]
    assert run_clear(flags, lambda _question: "Y") == 0
    assert said(sidecar, "ls", "--json")["runs"] == []


def test_a_reader_that_goes_away_ends_a_tool_quietly(
    sidecar: Sidecar, prompts: list[Prompt]
) -> None:
    assert prompts
    command = [*KVIST, "cache", "ls", "--json", "--socket", str(sidecar.socket)]
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.stdout is not None
    assert tool.stderr is not None
    tool.stdout.close()  # before it says a word
    assert tool.wait(30) == 141
    assert tool.stderr.read() == b""
    tool.stderr.close()


def test_prefetch_raises_what_a_restart_left_on_flash_and_computes_nothing(
    sidecar: Sidecar, prompts: list[Prompt], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = {prompt.keys[-1].hex() for prompt in prompts}

    def all_on(tier: str) -> bool:
        runs = said(sidecar, "ls", "--json", "--limit", "0")["runs"]
        mine = [run for run in runs if run["key"] in own]
        return len(mine) == 3 and all(run[f"{tier}_blocks"] == run["blocks"] for run in mine)

    wait_until(lambda: all_on("flash"), "all to sink", 20.0)
    sidecar.stop()
    sidecar.start()
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(token_ids(each)) for each in prompts))
    code, out, error = run(capsys, sidecar, "warm", str(file), "--prefetch", "--json")
    assert code == 0, error
    assert json.loads(out) == {
        "prompts": 3,
        "cached_tokens": 11 * BLOCK_TOKENS,
        "rising_blocks": 11,
    }

    wait_until(lambda: all_on("dram"), "all to rise", 20.0)
    assert "rising" not in run(capsys, sidecar, "show", prompts[1].keys[0].hex())[1]


def test_a_damaged_copy_gives_exit_code_one(
    sidecar: Sidecar, capsys: pytest.CaptureFixture[str]
) -> None:
    client = sidecar.client("damage")
    prompt = Prompt(99, 1)
    client.store(prompt.items)
    assert load_all(client, prompt) == [None]
    key = BlockKey(prompt.keys[0])
    slot = said(sidecar, "show", key.hex(), "--json")["copies"][0]["slot"]
    arena = next((sidecar.folder / "shm").glob("*/arena"))
    slot_bytes = 3 * 4096
    with arena.open("r+b") as file:
        file.seek(slot * slot_bytes + 4096)
        byte = file.read(1)
        file.seek(slot * slot_bytes + 4096)
        file.write(bytes([byte[0] ^ 0xFF]))
    code, out, _ = run(capsys, sidecar, "show", key.hex())
    assert code == 1
    assert "checksum wrong" in out


def test_numbers_and_times_keep_their_width() -> None:
    assert [count(n) for n in (0, 999, 9999, 12_345, 4_560_000, 7e9)] == [
        "0", "999", "9999", "12.3k", "4.6M", "7.0G",
    ]  # fmt: skip
    assert [span(s) for s in (0.2, 59, 60, 7200, 200_000)] == ["0s", "59s", "1m", "2h", "2d"]
    assert [parse_span("--ttl", text) for text in ("90", "90s", "30m", "24h", "7d")] == [
        90, 90, 1800, 86400, 604800,
    ]  # fmt: skip
