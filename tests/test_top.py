"""`kvist top`: its figures and lines, and the program itself in a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sim.sidecar import Prompt, Sidecar, load_all, wait_until

from kvist.cachesvc.tools.top.data import Reading, Window, hit_ratio_of
from kvist.cachesvc.tools.top.view import TABS, Scene, Shown, screen
from kvist.engine.cli import main

WAIT_S = 20.0
ALTERNATE_ON, ALTERNATE_OFF = b"\x1b[?1049h", b"\x1b[?1049l"
# Run before the program: gives it the pseudo-terminal, so that Ctrl-C comes as a signal.
IN_ITS_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
CURSOR_OFF, CURSOR_ON = b"\x1b[?25l", b"\x1b[?25h"


def stats(hits: int, misses: int, epoch: str = "a", written: int = 0) -> dict[str, Any]:
    tier = {
        "tier": "dram", "state": "ready", "slots": 100, "used_slots": 25, "slot_bytes": 1 << 20,
        "evicted_blocks": 0, "written_blocks": written, "read_blocks": 0,
    }  # fmt: skip
    return {
        "boot_epoch": epoch, "uptime_s": 61.0, "sessions": 2, "blocks": 25, "tiers": [tier],
        "hit_tokens": {"dram": hits, "flash": 0}, "miss_tokens": {"never_stored": misses},
        "workers": [], "counters": {"loaded_bytes": 0},
        "worth": [
            {"tier": "hbm", "saved_s": 9.0, "load_s": 0.0, "store_s": 0.0, "net_s": 9.0},
            {"tier": "dram", "saved_s": 5.0, "load_s": 1.0, "store_s": 1.5, "net_s": 2.5},
        ],
        "health": "Working; one thing to improve",
        "advice": [{"level": "warn", "code": "x", "what": "It is small.", "do": "Raise it. " * 20}],
        "tenants": [
            {
                "tenant": "acme", "lookups": 3, "requested_tokens": 200, "hit_tokens": {"dram": 50},
                "saved_s": {"dram": 5.0}, "net_s": 2.5, "held_blocks": {"dram": 4, "flash": 0},
            }
        ],
    }  # fmt: skip


def test_now_is_what_came_in_the_last_seconds_and_adds_up() -> None:
    window = Window()
    assert window.now() is None
    window.add(Reading(0.0, stats(1000, 0)))
    first = window.now()
    assert first is not None
    assert (first.seconds, first.requested, first.hit_ratio) == (0.0, 1000, 1.0)
    for second in range(1, 31):
        window.add(Reading(float(second), stats(1000 + 10 * second, 30 * second, written=second)))
    now = window.now()
    assert now is not None
    assert 10.0 <= now.seconds <= 11.0
    assert now.requested == sum(now.hits.values()) + sum(now.misses.values())
    assert now.hit_ratio == pytest.approx(0.25)
    assert hit_ratio_of(now.stats) == pytest.approx(1300 / 2200)
    assert now.hits == {"dram": round(10 * now.seconds)}
    assert now.tiers[0].in_bytes_per_s == pytest.approx(1 << 20)
    assert len(window.readings) <= 13


def test_a_sidecar_that_began_anew_begins_a_new_window() -> None:
    window = Window()
    window.add(Reading(0.0, stats(5000, 5000)))
    window.add(Reading(1.0, stats(10, 30, epoch="b")))
    now = window.now()
    assert now is not None
    assert (now.requested, now.seconds) == (40, 0.0)


RUN = {
    "key": "ab" * 16, "namespace": "cd" * 32, "tenant": "", "prefix_tokens": 1500, "blocks": 24,
    "dram_blocks": 24, "flash_blocks": 0, "bytes": 24 << 20, "uses": 7, "idle_s": 3.0,
}  # fmt: skip


def scene(problem: str = "") -> Scene:
    window = Window()
    window.add(Reading(0.0, stats(0, 0)))
    window.add(Reading(10.0, stats(750, 250)))
    return Scene("here", window.now(), problem, [RUN])


@pytest.mark.parametrize("tab", TABS)
@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 60), (20, 3), (5, 1)])
def test_a_screen_is_as_large_as_the_terminal_and_no_larger(
    tab: str, width: int, height: int
) -> None:
    for what in (scene(), Scene("here", None, "waiting"), scene("gone")):
        lines = screen(what, Shown(tab), width, height)  # type: ignore[arg-type]
        assert len(lines) == height
        assert all(line.cell_len <= width for line in lines)


def test_a_screen_says_the_hit_rate_the_reasons_and_the_hottest_prefix() -> None:
    text = "\n".join(line.plain for line in screen(scene(), Shown(), 80, 24))
    assert "75.0 % last 10 s, 75.0 % ever, 100 tok/s" in text
    assert "dram 75.0 %" in text
    assert "never_stored 25.0 %" in text
    assert "abababababab     1500" in text
    assert "worth it +2.5 s = 5.0 s of prefill saved - 2.5 s moving" in text
    assert "health   Working; one thing to improve: It is small." in text
    assert "…" not in text, "all of it fits 80 columns"
    tenants = "\n".join(line.plain for line in screen(scene(), Shown("tenants"), 80, 24))
    assert "acme" in tenants
    assert "25.0 %" in tenants
    assert "…" not in tenants
    health = [line.plain for line in screen(scene(), Shown("health"), 80, 24)]
    assert sum("Raise it." in line for line in health) > 2, "it is wrapped, not cut"


def test_of_a_sidecar_that_is_gone_the_figures_are_marked_as_old_and_no_health_is_told() -> None:
    problem = "kvistd has not answered since 13:26:40: Connection refused; asking again"
    for size in ((80, 24), (50, 12), (100, 60)):
        gone = screen(scene(problem), Shown(), *size)
        words, figures = " ".join(line.plain.strip() for line in gone), gone[2:-1]
        assert words.startswith(problem), "first, and never cut"
        assert "75.0 %" in words.partition("Working")[0], "the last figures stay, above the tabs"
        assert {(line.style, len(line.spans)) for line in figures if line} == {("dim", 0)}


BROKEN = {
    "health": "One thing broken; requests are served all the same",
    "advice": [
        {"level": "bad", "code": "x", "what": "Flash is off, input/output error.", "do": "Mend it."}
    ],
    "ttft": [{"tier": "none", "mean_s": 1.25}, {"tier": "dram", "mean_s": 0.2}],
}


def broken_scene() -> Scene:
    flash = {
        "tier": "flash", "state": "failed", "slots": 10, "used_slots": 0, "slot_bytes": 1 << 20,
        "evicted_blocks": 0, "written_blocks": 0, "read_blocks": 0,
        "failure": "segment-00000: Input/output error",
    }  # fmt: skip
    figures = stats(0, 0) | BROKEN
    window = Window()
    window.add(Reading(0.0, figures | {"tiers": [*figures["tiers"], flash]}))
    return Scene("here", window.now(), "", [RUN])


def test_what_is_broken_comes_first_on_a_small_screen_too() -> None:
    for width, height in ((80, 24), (60, 12)):
        lines = [line.plain for line in screen(broken_scene(), Shown(), width, height)]
        assert lines[1].startswith("health   One thing broken; requests are served")
        assert "Flash is off" in " ".join(lines[1:3])
        assert any("segment-00000: Input/output error" in line for line in lines)
    text = "\n".join(line.plain for line in screen(broken_scene(), Shown(), 80, 24))
    assert "ttft     nothing 1.250 s  dram 0.200 s  cached, mean since start" in text
    assert "abababababab" in text, "there is room for the view that was chosen"


def test_a_tall_screen_shows_all_views_and_the_chosen_one_first() -> None:
    lines = [line.plain.strip() for line in screen(broken_scene(), Shown("workers"), 100, 60)]
    at = [lines.index(name) for name in ("health", "tenants", "eviction", "prefixes")]
    assert at == sorted(at)
    assert lines.index("no worker is attached") < at[0]
    assert "bad  Flash is off, input/output error. Mend it." in lines
    assert any(line.startswith("acme ") for line in lines)
    low = "\n".join(line.plain for line in screen(broken_scene(), Shown("workers"), 100, 30))
    assert "Mend it" not in low


def test_of_an_older_sidecar_it_says_what_is_not_known() -> None:
    old = {name: value for name, value in stats(5, 5).items() if name not in ("worth", "tenants")}
    del old["health"], old["advice"]
    window = Window()
    window.add(Reading(0.0, old))
    for tab in ("tenants", "health"):
        what = screen(Scene("here", window.now()), Shown(tab), 80, 24)  # type: ignore[arg-type]
        assert any("older than the tool" in line.plain for line in what)


def test_keys_change_the_view_and_others_do_not() -> None:
    shown = Shown()
    assert shown.pressed("\t").tab == "workers"
    assert shown.pressed("3").tab == "eviction"
    assert shown.pressed("5").pressed("\t") == shown
    assert shown.pressed("s").sort == "size"
    assert shown.pressed("p").paused
    assert shown.pressed("p").pressed(" ") == shown
    assert shown.pressed("x") == shown.pressed("\x1b") == shown


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    port = "127.0.0.1:0"
    made = Sidecar(tmp_path_factory.mktemp("sidecar"), ("--http-listen", port))
    made.start()
    client = made.client("worker-a")
    prompt = Prompt(1, 5)
    client.store(prompt.items)
    assert load_all(client, prompt) == [None] * 5
    client.touch(prompt.keys, 5)
    client.count(100, {"dram": 80}, {"tail": 20})
    yield made
    made.close()


class Terminal:
    """A program in a pseudo-terminal of 24 lines and 80 columns."""

    def __init__(self, *arguments: str) -> None:
        self.fd, other = pty.openpty()
        self.resize(24, 80)
        self.modes = termios.tcgetattr(self.fd)
        command = [sys.executable, "-P", "-c", IN_ITS_TERMINAL, sys.executable, "-P", "-m"]
        # Where these are set, the terminal's own size is not asked for.
        sizeless = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*command, "kvist.engine.cli", *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            env={**sizeless, "TERM": "xterm-256color"},
        )
        os.close(other)
        self.output = b""

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> None:
        while select.select([self.fd], [], [], 0.05)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self.output += data

    def wait_for(self, words: bytes, since: int = 0) -> int:
        """Until it was written; returns where the output ends by then."""
        deadline = time.monotonic() + WAIT_S
        while words not in self.output[since:]:
            assert time.monotonic() < deadline, (words, self.text()[-3000:])
            self.read()
        return len(self.output)

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def text(self) -> str:
        return re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", self.output).decode("utf-8", "replace")

    def end(self) -> int:
        """Its exit code; as the shell says it when a signal ended it."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            self.read()
            if time.monotonic() > deadline:
                self.process.kill()
        self.read()
        modes = termios.tcgetattr(self.fd)
        os.close(self.fd)
        assert modes == self.modes, "the terminal is as it was"
        code = self.process.returncode
        return 128 - code if code < 0 else code


@pytest.fixture
def where(sidecar: Sidecar) -> list[str]:
    return ["--url", sidecar.said("page"), "--socket", str(sidecar.socket), "--interval", "0.2"]


def left_as_it_was(output: bytes) -> bool:
    """The other screen was left, and the cursor shown, after they were used last."""
    return output.rfind(ALTERNATE_OFF) > output.rfind(ALTERNATE_ON) >= 0 and output.rfind(
        CURSOR_ON
    ) > output.rfind(CURSOR_OFF)


def test_in_a_terminal_it_shows_figures_answers_keys_and_quits(where: list[str]) -> None:
    terminal = Terminal("top", *where)
    terminal.wait_for(ALTERNATE_ON)
    at = terminal.wait_for(b"q quit")
    terminal.wait_for(Prompt(1, 5).keys[-1].hex()[:12].encode())
    terminal.press("2")
    at = terminal.wait_for(b"worker-a", at)
    terminal.press("3")
    at = terminal.wait_for(b"leaf-LRU would", at)
    terminal.resize(12, 44)
    at = terminal.wait_for("…".encode(), at)
    terminal.press("q")
    assert terminal.end() == 0
    assert left_as_it_was(terminal.output)


def test_a_socket_says_as_much_as_the_page_and_nothing_flickers(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path, ("--http-listen", ""))  # nobody else remembers
    sidecar.start()
    client = sidecar.client("worker-c")
    prompt = Prompt(3, 4)
    client.store(prompt.items)
    client.count(100, {"dram": 60}, {"tail": 40})
    terminal = Terminal("top", "--socket", str(sidecar.socket), "--interval", "0.2")
    at = terminal.wait_for(b"q quit")
    terminal.wait_for(b"health   ")
    terminal.wait_for(b"worth it ")
    terminal.press("4")
    at = terminal.wait_for(b"60.0 %", at)
    terminal.press("5")
    terminal.wait_for(b"nothing to improve", at)
    terminal.press("p")
    terminal.wait_for(b"PAUSED", at)
    terminal.read()
    at = len(terminal.output)
    time.sleep(0.5)
    terminal.read()
    assert len(terminal.output) == at, "a screen that stands still is not written again"
    drawn = terminal.output[terminal.output.find(b"q quit") :]
    assert not re.search(rb"\x1b\[[0-3]?[JK]", drawn), "drawn over, never erased"
    terminal.press("q")
    assert terminal.end() == 0
    sidecar.close()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 130)]
)
def test_a_signal_ends_it_and_the_terminal_is_as_before(
    where: list[str], number: signal.Signals | None, code: int
) -> None:
    terminal = Terminal("top", *where)
    terminal.wait_for(b"q quit")
    if number is None:
        terminal.press("\x03")  # Ctrl-C, which the terminal turns into the signal
    else:
        terminal.process.send_signal(number)
    assert terminal.end() == code
    assert left_as_it_was(terminal.output)
    assert "Traceback" not in terminal.text()


def test_a_sidecar_that_goes_and_comes_back_is_told_and_shown_again(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path)
    sidecar.start()
    terminal = Terminal("top", "--socket", str(sidecar.socket), "--interval", "0.2")
    at = terminal.wait_for(b"no worker has attached yet")
    sidecar.kill()
    at = terminal.wait_for(b"kvistd has not answered since ", at)
    sidecar.start()
    sidecar.client("worker-b")
    at = terminal.wait_for(b"dram", at)
    terminal.wait_for(b"All is well", at)
    terminal.press("q")
    assert terminal.end() == 0
    sidecar.close()


def test_without_a_terminal_it_prints_lines(
    where: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*flags: str) -> str:
        capsys.readouterr()
        assert main(["top", *where, *flags]) == 0
        return capsys.readouterr().out

    wait_until(lambda: "80.0 % ever" in said("--once"), "the figures")
    once = said("--once")
    assert not any(word in once for word in ("\x1b", "q quit"))
    lines = said("--count", "2").splitlines()
    assert len(lines) == 2
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    document = json.loads(said("--json", "--once"))
    assert document["sessions"] == 1
    assert document["requested_tokens"] == sum(document["hit_tokens"].values()) + sum(
        document["miss_tokens"].values()
    )


def test_where_nobody_answers_lines_end_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--url", "http://127.0.0.1:9"]) == 2
    assert "no sidecar answers" in capsys.readouterr().err
    assert main(["top", "--interval", "0"]) == 2
    assert "--interval" in capsys.readouterr().err
