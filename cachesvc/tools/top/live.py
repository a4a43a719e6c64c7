"""`kvist top`: a live view of a sidecar in a terminal, or lines where there is none."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from datetime import datetime
from types import FrameType

from rich.console import Console, Group
from rich.live import Live

from kvist.cachesvc.tools.top.data import Now
from kvist.cachesvc.tools.top.feed import Feed, Prefixes
from kvist.cachesvc.tools.top.view import Shown, screen
from kvist.cachesvc.tools.words import count, percent
from kvist.cachesvc.view.stats_table import source_of
from kvist.proto.errors import ConfigInvalid

# A key, a new size and a new figure show within this time.
LOOK_S = 0.1
INTERVAL_MIN_S, INTERVAL_MAX_S = 0.1, 3600.0
PLAIN_WIDTH, PLAIN_HEIGHT = 100, 60
_QUIT = ("q", "Q", "\x04")


def run_top(flags: argparse.Namespace) -> int:
    """Show until somebody has seen enough.

    Returns: 0; 1 when lines were asked for and nobody answers.

    Raises: ConfigInvalid.
    """
    if not INTERVAL_MIN_S <= flags.interval <= INTERVAL_MAX_S:
        raise ConfigInvalid(f"--interval: give {INTERVAL_MIN_S} to {INTERVAL_MAX_S} seconds")
    source = source_of(flags.url, flags.socket)
    prefixes = Prefixes(source.socket)
    if flags.json or flags.once or not (sys.stdout.isatty() and sys.stdin.isatty()):
        source.tell()
        return _lines(flags, Feed(source.where, source.ask, prefixes if flags.once else None, 0.0))
    feed = Feed(source.where, source.ask, prefixes, flags.interval)
    feed.start()
    try:
        with _terminal(sys.stdin.fileno()):
            _show(feed, Console(), sys.stdin.fileno())
    finally:
        feed.stop()
    return 0


@contextlib.contextmanager
def _terminal(fd: int) -> Iterator[None]:
    """Keys come one by one and unseen; the terminal is as before at the end, whatever ends it."""
    before = termios.tcgetattr(fd)
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGTSTP)}
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # it would leave the shell with our screen
    try:
        tty.setcbreak(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _show(feed: Feed, console: Console, fd: int) -> None:
    shown, drawn, frozen = Shown(), None, feed.scene
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            frozen = frozen if shown.paused else feed.scene
            size = console.size
            state = (id(frozen), shown, size)
            if state != drawn:
                drawn = state
                lines = screen(frozen, shown, size.width, size.height)
                live.update(Group(*lines), refresh=True)
            ready, _, _ = select.select([fd], [], [], LOOK_S)
            for key in _keys(fd) if ready else "":
                if key in _QUIT:
                    return
                shown = shown.pressed(key)


def _keys(fd: int) -> str:
    """What was pressed; a terminal that was hung up means that nobody looks any more."""
    try:
        typed = os.read(fd, 64)
    except OSError:
        typed = b""
    return typed.decode("utf-8", "replace") or _QUIT[0]


def _lines(flags: argparse.Namespace, feed: Feed) -> int:
    """Plain text: the view once, or a line at each interval."""
    now = feed.turn()
    if now is None:
        print(f"kvist top: {feed.scene.problem.removesuffix('; asking again')}", file=sys.stderr)
        return 2
    left = 1 if flags.once else flags.count
    while left is None or left > 0:
        time.sleep(flags.interval)
        now = feed.turn()
        print(_line(flags, feed, now), flush=True)
        left = None if left is None else left - 1
    return 0 if now is not None else 1


def _line(flags: argparse.Namespace, feed: Feed, now: Now | None) -> str:
    if flags.json:
        problem = {"problem": feed.scene.problem} if now is None else {}
        return json.dumps(problem or (now.document() if now else {}))
    if flags.once:
        lines = screen(feed.scene, Shown(), PLAIN_WIDTH, PLAIN_HEIGHT)[:-1]
        return "\n".join(line.plain.rstrip() for line in lines).rstrip()
    at = datetime.now().strftime("%H:%M:%S")
    if now is None:
        return f"{at} {feed.scene.problem}"
    hits = " ".join(f"{tier} {percent(n, now.requested)}" for tier, n in now.hits.items())
    misses = " ".join(f"{why} {percent(n, now.requested)}" for why, n in now.misses.items())
    tiers = " ".join(
        f"{tier.tier} {percent(tier.used_slots, tier.slots)} full" for tier in now.tiers
    )
    asked = count(now.requested / now.seconds) if now.seconds else "0"
    ratio = "-" if now.hit_ratio is None else f"{100 * now.hit_ratio:.1f} %"
    return f"{at} {asked} tokens/s, hit {ratio} ({hits or '-'}), miss {misses or '-'}; {tiers}"
