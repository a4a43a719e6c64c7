"""A made-up trace: chats over a few system prompts, each turn longer than the one before."""

from __future__ import annotations

import json
import random
from pathlib import Path

from kvist.cachesvc.study.trace import Trace, read_trace


def chat_lines(
    requests: int, seed: int, sessions: int = 40, end: float = 0.3
) -> list[dict[str, object]]:
    """Requests of chats that go on or end after each turn; answers are not in the prompts.

    Args:
        sessions: that go on at a time.
        end: probability that a chat ends after a turn.
    """
    chance = random.Random(seed)
    ids = iter(range(10**9))
    prompts = [[next(ids) for _ in range(chance.randint(1, 6))] for _ in range(4)]

    def begin() -> list[int]:
        return list(chance.choices(prompts, [8, 4, 2, 1])[0])

    chats = [begin() for _ in range(sessions)]
    lines: list[dict[str, object]] = []
    time_s = 0.0
    for _ in range(requests):
        time_s += chance.expovariate(1.0)
        which = int(chance.random() ** 2 * sessions)
        chat = chats[which]
        chat += [next(ids) for _ in range(chance.randint(1, 8))]
        lines.append(
            {"timestamp": round(time_s, 3), "input_length": 512 * len(chat), "hash_ids": [*chat]}
        )
        if chance.random() < end or len(chat) > 60:
            chats[which] = begin()
    return lines


def write_trace(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def chat_trace(folder: Path, requests: int, seed: int, **settings: float) -> Trace:
    lines = chat_lines(requests, seed, **settings)  # type: ignore[arg-type]
    return read_trace(write_trace(folder / "chats.jsonl", lines), False, lambda _: None)


def continuations(trace: Trace) -> dict[int, float]:
    """Of each request that another one goes on from, but for its last block: seconds until then."""
    waiting: dict[int, list[int]] = {}
    gaps: dict[int, float] = {}
    for number, at_s in enumerate(trace.times_s.tolist()):
        prompt = trace.prompt(number).tolist()
        for row in prompt:
            for before in waiting.pop(row, ()):
                gaps[before] = at_s - float(trace.times_s[before])
        waiting.setdefault(prompt[-2:][0], []).append(number)
    return gaps
