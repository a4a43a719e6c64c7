"""The advice: each rule speaks when its number says so, and only then."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_metrics import stats

from kvist.cachesvc.core.report import Attached, EvictionUse, TierUse
from kvist.cachesvc.core.store import StoreStats
from kvist.cachesvc.study.whatif import Estimate
from kvist.cachesvc.view.advice import RULES, Seen, advise, in_words
from kvist.cachesvc.view.history import FIELDS, Span

DOCS = Path(__file__).resolve().parent.parent / "docs"
WELL = stats(
    tiers=(TierUse("dram", "ready", 100, 40, 4096, 0, 40, 0),), eviction=(), what_if={},
)  # fmt: skip
FULL = TierUse("dram", "ready", 100, 99, 4096, 0, 99, 0)


def curve(half: float, now: float, twice: float) -> dict[str, tuple[Estimate, ...]]:
    points = zip((0.5, 1.0, 2.0), (half, now, twice), strict=True)
    return {"dram": tuple(Estimate(multiple, 1, ratio) for multiple, ratio in points)}


def span(**change: float) -> Span:
    """Of ten minutes in which 10,000 tokens were asked for, unless told otherwise."""
    values = dict.fromkeys(FIELDS, 0.0) | {"hit_tokens.dram": 10_000.0}
    missed = sum(n for name, n in change.items() if name.startswith("miss_tokens_"))
    values["hit_tokens.dram"] -= missed
    for name, n in change.items():
        values[name.replace("miss_tokens_", "miss_tokens.")] = n
    return Span(600.0, values)


def seen(
    now: StoreStats = WELL, change: Mapping[str, float] | None = None, saved_s: float | None = 1.0
) -> Seen:
    happened = span(**(change or {}))
    return Seen(now, happened, happened, saved_s)


def said(code: str, at: Seen) -> str:
    """What a rule says; "" when it is silent."""
    return next((each.what for each in advise(at) if each.code == code), "")


def worker(model: str) -> Attached:
    return Attached("a", 1, "00", model, 1.0, 0, 0, 0, 0, 0, 0, 0)


def test_of_a_cache_that_is_well_nothing_is_said() -> None:
    assert advise(seen()) == ()
    assert in_words(()) == "All is well"


@pytest.mark.parametrize(
    ("code", "change", "words"),
    [
        ("checksum-failures", {"dram_corrupt": 2, "flash_corrupt": 1}, "2 in dram and 1 in flash"),
        ("self-test", {"miss_tokens_self_test": 10}, "runs without the cache"),
        ("evicted", {"miss_tokens_evicted": 600, "miss_tokens_not_admitted": 400}, "10 %"),
        ("namespace-mismatch", {"miss_tokens_namespace": 2000}, "20 %"),
        ("flash-write-bound", {"sinks_dropped": 40, "flash_written": 60}, "drops 40 %"),
        ("write-budget", {"sinks_over_budget": 75, "flash_written": 25}, "75 %"),
        ("not-attached", {"miss_tokens_detached": 500}, "5 %"),
        ("cache-bypassed", {"miss_tokens_no_cache": 500}, "turned off"),
        ("flash-late", {"miss_tokens_flash_late": 700}, "7 %"),
        ("no-room-to-rise", {"rises_refused": 50, "flash_read": 50}, "50 %"),
        ("ring-drops", {"ring_drops": 80}, "80 reports"),
        ("refused-blocks", {"commits_refused": 3}, "3 blocks"),
        ("cheaper-to-compute", {"miss_tokens_cheaper": 900}, "9 %"),
        ("short-prompts", {"miss_tokens_tail": 4000}, "40 %"),
    ],
)
def test_a_rule_speaks_of_what_happened_with_its_number(
    code: str, change: dict[str, float], words: str
) -> None:
    assert words in said(code, seen(change=change))
    tenth = {name: n / 10 for name, n in change.items() if code not in ALWAYS}
    assert not said(code, seen(change=tenth))


# What is said at the first time that it happens.
ALWAYS = {"checksum-failures", "self-test", "refused-blocks"}


@pytest.mark.parametrize(
    ("code", "changes", "words"),
    [
        (
            "flash-off",
            {"tiers": (TierUse("flash", "failed", 9, 0, 4096, 0, 0, 0, failure="disk full"),)},
            "disk full",
        ),
        ("flash-rebuilding", {"tiers": (TierUse("flash", "rebuilding", 9, 0, 4096, 0, 0, 0),)}, ""),
        ("dram-small", {"tiers": (FULL,), "what_if": curve(0.2, 0.3, 0.42)}, "+12 points"),
        ("dram-large", {"tiers": (FULL,), "what_if": curve(0.298, 0.3, 0.3)}, "0.2 points"),
        ("policy-fell-back", {"eviction": (EvictionUse("dram", 9, 1, 2, -1, True, 1),)}, "dram"),
        ("nobody-attached", {"sessions": 0}, "No engine"),
    ],
)
def test_a_rule_speaks_of_how_things_are(code: str, changes: dict[str, object], words: str) -> None:
    what = said(code, seen(dataclasses.replace(WELL, **changes)))  # type: ignore[arg-type]
    assert what
    assert words in what


def test_of_a_tier_with_room_left_no_size_is_recommended() -> None:
    for ratios in ((0.2, 0.3, 0.42), (0.3, 0.3, 0.3)):
        roomy = dataclasses.replace(WELL, what_if=curve(*ratios))
        assert advise(seen(roomy)) == ()


def test_few_tokens_and_few_blocks_say_nothing() -> None:
    few = Span(600.0, dict.fromkeys(FIELDS, 0.0) | {"miss_tokens.namespace": 1999.0})
    assert advise(Seen(WELL, few, few)) == ()
    assert not said("flash-write-bound", seen(change={"sinks_dropped": 49}))
    outage = {"sinks_failed": 400, "flash_written": 60}
    assert not said("flash-write-bound", seen(change=outage)), "that is not the queue's fault"


def test_a_cache_that_costs_more_than_it_saves_is_told_of_once_it_was_used() -> None:
    assert "2.5 s more" in said("not-worth-it", seen(saved_s=-2.5))
    assert not said("not-worth-it", seen(saved_s=None))
    assert not said("not-worth-it", seen(saved_s=0.1))


def test_engines_that_differ_are_named() -> None:
    both = (worker("llama bfloat16"), worker("llama float32"))
    at = seen(stats(attached=both), {"miss_tokens_namespace": 2000})
    assert "llama bfloat16; llama float32" in said("namespace-mismatch", at)


def test_the_worst_comes_first_and_health_is_a_line() -> None:
    broken = dataclasses.replace(
        WELL, sessions=0, tiers=(TierUse("flash", "failed", 9, 0, 4096, 0, 0, 0),)
    )
    advice = advise(seen(broken, {"miss_tokens_evicted": 1000, "miss_tokens_cheaper": 1000}))
    assert [each.level for each in advice] == ["bad", "warn", "note", "note"]
    assert in_words(advice).startswith("One thing broken")
    assert in_words(advice[1:]) == "Working; one thing to improve"
    assert in_words(advice[2:]) == "All is well"


def test_every_rule_has_its_section_in_the_docs() -> None:
    text = (DOCS / "page.md").read_text()
    headings = {
        line.removeprefix("### ").lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("### ")
    }
    assert headings == {rule.code for rule in RULES}
    assert all(rule.do for rule in RULES)
