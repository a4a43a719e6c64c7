"""What `kvist demo --keep` goes on asking: visitors of many branches, so that its page is alive."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from kvist.engine.demo_text import CHATS, SYSTEM_PROMPT

BRANCHES = 16
# About 500 tokens: a new branch is a prefill of half a second on two cores.
HANDBOOK_CHARACTERS = 2200
ANSWER_TOKENS = 16
TENANTS = ("north:demo", "south:demo")


def visitors(seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Requests without end: number of a visitor, and the body of its question.

    Each branch has a handbook of its own, so its first visitor finds nothing, and a few branches
    have most of the visitors. Half of the branches belong to either of two tenants.
    """
    draw = random.Random(seed)
    branches = range(BRANCHES)
    weights = [1 / (1 + branch) for branch in branches]
    number = 0
    while True:
        number += 1
        (branch,) = draw.choices(branches, weights)
        handbook = f"You are branch {branch + 1}. {SYSTEM_PROMPT[:HANDBOOK_CHARACTERS]}"
        question = draw.choice(CHATS[branch % len(CHATS)])
        yield (
            number,
            {
                "model": "demo",
                "messages": [
                    {"role": "system", "content": handbook},
                    {"role": "user", "content": question},
                ],
                "temperature": 0,
                "max_tokens": ANSWER_TOKENS,
                "cache_salt": TENANTS[branch % len(TENANTS)],
            },
        )
