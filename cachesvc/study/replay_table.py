"""`kvist cache replay`: what a cache of some size would hit on a trace, as a table or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvist.cachesvc.study.replay import Contender, Score, replay_policy
from kvist.cachesvc.study.trace import Trace, read_trace
from kvist.cachesvc.study.whatif import MULTIPLES
from kvist.proto.errors import ConfigInvalid

_PROGRESS_S = 0.2
MS_SPAN = 1e6


def run_replay(flags: argparse.Namespace) -> int:
    """Replay and print; the flags are those of engine/cli.py.

    Returns: the exit code.

    Raises: ConfigInvalid: the trace or a flag is wrong.
    """
    if flags.block_tokens < 1:
        raise ConfigInvalid("--block-tokens: give 1 or more")
    parse_capacities(flags.capacity, 1)  # before the long part
    progress = Progress()
    try:
        return _replay(flags, progress)
    except KeyboardInterrupt:
        progress.end()
        print(f"interrupted: {progress.where}", file=sys.stderr)
        raise


def _replay(flags: argparse.Namespace, progress: Progress) -> int:
    trace = read_trace(Path(flags.trace), flags.ms, progress.say)
    if not flags.ms and looks_like_ms(trace):
        progress.end()
        days = trace.times_s[-1] / 86400
        print(
            f"kvist cache replay: as seconds the timestamps span {days:.0f} days; if they are "
            "milliseconds, give --ms: the policy learns from times",
            file=sys.stderr,
        )
    rows = []
    for capacity in parse_capacities(flags.capacity, trace.distinct):
        scores = []
        contenders: tuple[Contender, ...] = (flags.policy, "lru", "opt")
        for policy in dict.fromkeys(contenders):
            progress.begin(f"{policy} with {capacity} blocks", trace.requests)
            score = replay_policy(
                trace, capacity, policy, flags.block_tokens, flags.seed, progress.at
            )
            scores.append(score)
        rows.append(scores)
    progress.end()
    print(as_json(trace, rows) if flags.json else as_table(trace, rows))
    return 0


def looks_like_ms(trace: Trace) -> bool:
    """Whole numbers over a span of more than 11 days, which as milliseconds are 17 minutes."""
    times = trace.times_s
    return bool(times[-1] > MS_SPAN) and not np.any(times % 1)


def parse_capacities(text: str, distinct: int) -> list[int]:
    """Sizes in blocks, each at least 1.

    Args:
        text: like "5%,1000".
        distinct: blocks that percent are of.

    Raises: ConfigInvalid.
    """
    sizes = []
    for part in text.split(","):
        word = part.strip()
        try:
            number = float(word.removesuffix("%"))
        except ValueError:
            number = 0.0
        if not 0 < number < 1e15 or (not word.endswith("%") and number != int(number)):
            raise ConfigInvalid(
                f"--capacity: {word!r} is no size; give blocks or percent over 0, like 5% or 1000"
            )
        blocks = number * distinct / 100 if word.endswith("%") else number
        sizes.append(max(1, round(blocks)))
    return sizes


def as_json(trace: Trace, rows: Sequence[Sequence[Score]]) -> str:
    """One object: the trace, and for each size the score of each policy."""
    document = {
        "trace": trace.name,
        "requests": trace.requests,
        "block_events": len(trace.blocks),
        "distinct_blocks": trace.distinct,
        "sizes": [
            {
                "capacity_blocks": scores[0].capacity,
                "capacity_percent": round(100 * scores[0].capacity / trace.distinct, 3),
                "policies": {
                    score.policy: {
                        key: round(value, 4) if isinstance(value, float) else value
                        for key, value in dataclasses.asdict(score).items()
                        if key not in ("policy", "capacity")
                    }
                    for score in scores
                },
            }
            for scores in rows
        ],
    }
    return json.dumps(document)


def as_table(trace: Trace, rows: Sequence[Sequence[Score]]) -> str:
    """For people, 80 columns."""
    lines = [
        f"{trace.name}: {trace.requests} requests, {len(trace.blocks)} block events, "
        f"{trace.distinct} different blocks",
        "",
        "   cache in blocks  policy   block     token   compute   over lru   us per",
        "                             hits %    hits %   hits %     points    event",
    ]
    for scores in rows:
        lru = next(score for score in scores if score.policy == "lru")
        for score in scores:
            is_first = score is scores[0]
            percent = f"{100 * score.capacity / trace.distinct:.1f} %"
            size = f"{percent:>7} {score.capacity:10}" if is_first else ""
            won = f"{score.blocks - lru.blocks:+.2f}" if score is not lru else ""
            event_us = 1e6 * score.seconds / max(1, len(trace.blocks))
            lines.append(
                f"{size:18}  {score.policy:6}{score.blocks:8.2f}{score.tokens:10.2f}"
                f"{score.work:9.2f}{won:>11}{event_us:9.2f}"
            )
    lines += ["", "What if: block hits of lru in other sizes, as the service tells while it runs."]
    lines.append("   cache in blocks" + "".join(f"{f'x {each:g}':>10}" for each in MULTIPLES))
    for scores in rows:
        ratios = "".join(f"{100 * point.hit_ratio:8.2f} %" for point in scores[0].what_if)
        lines.append(f"{scores[0].capacity:18}{ratios}")
    return "\n".join(lines)


class Progress:
    """One line on the terminal that says how far it is; nothing when stderr is no terminal."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._shown_s = 0.0
        self._what = ""
        self._of = 1
        self._done = 0
        self._is_shown = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Replace the line."""
        if self._is_shown and self._now() - self._shown_s >= _PROGRESS_S:
            self._shown_s = self._now()
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def begin(self, what: str, of: int) -> None:
        """A long piece of work begins."""
        self._what, self._of, self._done = what, of, 0

    @property
    def where(self) -> str:
        """What was under way, and how far."""
        return f"{self._what}: {100 * self._done // self._of} %" if self._what else "reading"

    def at(self, done: int) -> None:
        """So far."""
        self._done = done
        self.say(self.where)

    def end(self) -> None:
        """Remove the line."""
        if self._is_shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
