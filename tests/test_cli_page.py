"""docs/cli.md says what the parsers say."""

from __future__ import annotations

import os
from pathlib import Path

from kvist.engine.cli_page import page

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_is_what_the_parsers_give() -> None:
    fresh = page()
    assert (ROOT / "docs/cli.md").read_text() == fresh, (
        "docs/cli.md is stale: python -m kvist.engine.cli_page docs/cli.md"
    )


def test_the_page_says_nothing_of_the_machine_that_made_it() -> None:
    text = page()
    assert str(Path.home()) not in text.replace("/root/", "/") or str(Path.home()) == "/"
    assert f"Compute ({len(os.sched_getaffinity(0))})" not in text
    for command in ("ls", "show", "pin", "unpin", "evict", "clear", "warm", "doctor", "verify"):
        assert f"### kvist cache {command}\n" in text
    assert "## kvist top\n" in text
