"""Logs: KVIST_DEBUG, one format for engine and sidecar, and a request's id through both."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from sim.models import tiny_llama
from sim.sidecar import KVISTD, Prompt, Sidecar, wait_until

from kvist.cachesvc.log import DETAIL_BURST_LINES, Log, debug_detail
from kvist.engine.local import LocalProcess, free_port
from kvist.engine.logs import LibraryLines
from kvist.proto.errors import ConfigInvalid


@pytest.mark.parametrize(
    ("text", "engine", "cachesvc"),
    [
        ("", 0, 0),
        ("2", 2, 2),
        ("engine:3", 3, 0),
        ("engine:2,cachesvc:1", 2, 1),
        (" 1 , cachesvc:3 ", 1, 3),
    ],
)
def test_kvist_debug_is_for_both_or_for_each(text: str, engine: int, cachesvc: int) -> None:
    environment = {"KVIST_DEBUG": text} if text else {}
    assert debug_detail("engine", environment) == engine
    assert debug_detail("cachesvc", environment) == cachesvc


@pytest.mark.parametrize("text", ["4", "-1", "yes", "gpu:1", "engine:", "engine=1"])
def test_a_detail_that_is_none_is_told_with_what_may_stand_there(text: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"KVIST_DEBUG: .* like engine:2,cachesvc:1"):
        debug_detail("engine", {"KVIST_DEBUG": text})


def test_detail_is_written_whatever_the_level_and_no_more_of_it_than_was_asked_for() -> None:
    stream = io.StringIO()
    log = Log(stream, "error", detail=2)
    log.info("no")
    log.debug("one")
    log.detail(2, "two")
    log.detail(3, "three")
    assert [line.split()[2] for line in stream.getvalue().splitlines()] == ["one", "two"]
    assert log.shows(2)
    assert not log.shows(3)
    assert Log(stream, "debug").shows(1)
    assert not Log(stream, "debug").shows(2)
    assert not Log(stream).shows(1)


def test_detail_is_limited_too_and_says_what_was_dropped() -> None:
    stream, now = io.StringIO(), 0.0
    log = Log(stream, detail=3, now=lambda: now)
    for _ in range(DETAIL_BURST_LINES + 7):
        log.detail(3, "step")
    now = 11.0
    log.detail(3, "step")
    lines = stream.getvalue().splitlines()
    assert len(lines) == DETAIL_BURST_LINES + 1
    assert lines[-1].endswith("step similar_dropped=7")


def test_what_libraries_log_comes_in_our_format() -> None:
    stream = io.StringIO()
    library = logging.getLogger("some.library")
    handler = LibraryLines(Log(stream, format="json"))
    library.addHandler(handler)
    library.propagate = False
    try:
        library.warning("only %d left", 3)
        raise ValueError("gone")
    except ValueError:
        library.exception("failed")
    finally:
        library.removeHandler(handler)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["name"], first["text"]) == (
        "library", "some.library", "only 3 left",
    )  # fmt: skip
    assert (first["level"], second["level"]) == ("warning", "error")
    assert "ValueError: gone" in second["text"]


def lines_of(text: str, event: str) -> list[dict[str, str]]:
    """Fields of the lines of an event."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if f" {event} " in f"{line} ":
            found.append(dict(word.split("=", 1) for word in words if "=" in word))
    return found


def test_the_sidecar_names_the_request_that_a_call_comes_from(tmp_path: Path) -> None:
    program = (sys.executable, "-c", WITH_DETAIL, "cachesvc:3", str(KVISTD))
    sidecar = Sidecar(tmp_path, program=program)
    sidecar.start()
    client, prompt = sidecar.client(), Prompt(1, 3)
    for item in prompt.items:
        object.__setattr__(item, "request", "chatcmpl-7-0")
    client.store(prompt.items)
    wait_until(lambda: "committed" in sidecar.text(), "the commit to be logged")
    (reserved,) = lines_of(sidecar.text(), "reserved")
    assert reserved["request"] == "chatcmpl-7-0"
    assert (reserved["blocks"], reserved["session"]) == ("3", reserved["session"])
    assert reserved["keys"] == ",".join(key.hex() for key in prompt.keys)
    (committed,) = lines_of(sidecar.text(), "committed")
    assert committed["session"] == reserved["session"]
    sidecar.close()


# kvistd with KVIST_DEBUG, which the fixture leaves out of the environment.
WITH_DETAIL = """
import os, sys
os.environ["KVIST_DEBUG"] = sys.argv[1]
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_sidecar_with_a_wrong_detail_says_so_and_does_not_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(KVISTD), "--run-dir", str(tmp_path), "--shm-dir", str(tmp_path)],
        env={**os.environ, "KVIST_DEBUG": "loud"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert "KVIST_DEBUG: 'loud' is no detail" in done.stderr


def test_one_id_leads_from_the_reply_through_the_engines_log_to_the_sidecars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (sys.executable, "-c", WITH_DETAIL, "2", str(KVISTD))
    sidecar = Sidecar(tmp_path / "sidecar", program=program)
    sidecar.start()
    tiny_llama(tmp_path / "model", 1)
    monkeypatch.setenv("KVIST_DEBUG", "engine:3")
    port, log = free_port(), tmp_path / "engine.log"
    command = [*(sys.executable, "-P", "-m", "kvist.engine.cli", "serve", str(tmp_path / "model"))]
    command += ["--port", str(port), "--cache", str(sidecar.socket), "--block-size", "16"]
    command += ["--threads", "1", "--dtype", "float32", "--log-format", "json"]
    engine = LocalProcess(command, f"http://127.0.0.1:{port}", "/health", log)
    engine.start()
    try:
        engine.wait_ready()
        body = {"model": "model", "prompt": list(range(5, 70)), "max_tokens": 2}
        reply = httpx.post(f"{engine.url}/v1/completions", json=body, timeout=60).json()
        request = f"{reply['id']}-0"

        def told(event: str) -> list[dict[str, object]]:
            lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
            return [each for each in map(json.loads, lines) if each["event"] == event]

        wait_until(lambda: bool(told("stored")), "the store to be logged", 20.0)
        (ended,) = told("request ended")
        assert (ended["request"], ended["prompt"], ended["output"]) == (request, 65, 2)
        assert (ended["finish"], ended["cache_end"]) == ("length", "never_stored")
        assert told("step")
        assert {line["request"] for line in told("stored")} == {request}
        reserved = lines_of(sidecar.text(), "reserved")
        assert {line["request"] for line in reserved if "request" in line} == {request}
    finally:
        assert engine.stop() == 0
        sidecar.close()
