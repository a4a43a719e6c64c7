"""Advice: what the figures mean and what to do, in plain words, by rules that can be tested.

Each rule looks at the store's figures now, at the last ten minutes and at all since the start,
and says something, with the number that it goes by, or nothing. RULES has them all, with what to
do; the code of a rule is also the anchor of its section in docs/page.md. Rules are about what
an operator can change: that a prompt was never seen before is no one's fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kvist.cachesvc.core.report import StoreStats, TierUse
from kvist.cachesvc.view.history import Span

Level = Literal["bad", "warn", "note"]
LEVELS: Final[tuple[Level, ...]] = ("bad", "warn", "note")
"""Something is broken; it costs hits or time; good to know."""

RECENT_S = 600.0
# A share of fewer tokens or blocks than that says nothing.
TOKENS_MIN = 2000
BLOCKS_MIN = 50
# Points of hit rate, in percent, from which another size is worth a thought.
POINTS_MORE, POINTS_LESS = 3.0, 0.5
SHARE_MIN = 0.05
TAILS_MIN = 0.3
DROPPED_MIN = 0.1
NEARLY_FULL = 0.9


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to know.

    Attributes:
        level: see LEVELS.
        code: of the rule.
        what: is so.
        do: about it.
        doc: where there is more about it.
    """

    level: Level
    code: str
    what: str
    do: str
    doc: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What the rules look at.

    Attributes:
        stats: now.
        recent: the last RECENT_S. life: all since the start.
        saved_s: seconds of prefill saved less those spent moving, in this life; None: not known.
    """

    stats: StoreStats
    recent: Span
    life: Span
    saved_s: float | None = None

    def tier(self, name: str) -> TierUse | None:
        """A tier, if there is one."""
        return next((use for use in self.stats.tiers if use.tier == name), None)

    def is_full(self, name: str) -> bool:
        """Whether a tier is there and about full."""
        tier = self.tier(name)
        return tier is not None and tier.used_slots >= NEARLY_FULL * tier.slots > 0

    def missed(self, *reasons: str) -> float:
        """Share of the tokens asked for lately that missed for these reasons; 0 when few were."""
        asked = self.recent.requested
        missed = sum(self.recent.change[f"miss_tokens.{reason}"] for reason in reasons)
        return missed / asked if asked >= TOKENS_MIN else 0.0

    def lost(self, lost: Sequence[str], kept: str) -> float:
        """Share of blocks that were lost lately, of those and the ones kept; 0 when few were."""
        away = sum(self.recent.change[name] for name in lost)
        every = away + self.recent.change[kept]
        return away / every if every >= BLOCKS_MIN else 0.0

    def points(self, tier: str, multiple: float) -> float:
        """Points of hit ratio, in percent, that another size of a tier would win."""
        curve = {each.multiple: each.hit_ratio for each in self.stats.what_if.get(tier, ())}
        return 100 * (curve[multiple] - curve[1.0]) if {multiple, 1.0} <= set(curve) else 0.0


def advise(seen: Seen) -> tuple[Advice, ...]:
    """Everything that there is to say, the worst first."""
    said = []
    for rule in sorted(RULES, key=lambda rule: LEVELS.index(rule.level)):
        what = rule.look(seen)
        if what:
            doc = f"docs/page.md#{rule.code}"
            said.append(Advice(rule.level, rule.code, what, rule.do, doc))
    return tuple(said)


def in_words(advice: Sequence[Advice]) -> str:
    """Health in one line."""
    bad, warn = (sum(each.level == level for each in advice) for level in ("bad", "warn"))
    if bad:
        return f"{_things(bad).capitalize()} broken; requests are served all the same"
    return f"Working; {_things(warn)} to improve" if warn else "All is well"


def _things(count: int) -> str:
    return "one thing" if count == 1 else f"{count} things"


def _flash_off(seen: Seen) -> str:
    flash = seen.tier("flash")
    if flash is None or flash.state != "failed":
        return ""
    return f"The flash tier is off, DRAM goes on serving: {flash.failure or 'its device failed'}."


def _corrupt(seen: Seen) -> str:
    damaged = {tier: seen.life.change[f"{tier}_corrupt"] for tier in ("dram", "flash")}
    where = " and ".join(f"{count:.0f} in {tier}" for tier, count in damaged.items() if count)
    held = sum(use.quarantined_slots for use in seen.stats.tiers)
    return where and (
        f"Blocks failed their checksum: {where}. They were dropped, {held} slots are used no more, "
        "and no wrong token was served."
    )


def _self_test(seen: Seen) -> str:
    failed = seen.life.change["miss_tokens.self_test"]
    return "An engine's trial of the cache failed: it runs without the cache." if failed else ""


def _flash_write_bound(seen: Seen) -> str:
    share = seen.lost(("sinks_dropped",), "flash_written")
    if share < DROPPED_MIN:
        return ""
    return f"Flash is write-bound: admission drops {_percent(share)} of the blocks offered to it."


def _write_budget(seen: Seen) -> str:
    share = seen.lost(("sinks_over_budget",), "flash_written")
    if share < DROPPED_MIN:
        return ""
    return f"The write budget of flash is used up: {_percent(share)} of its blocks stay in DRAM."


def _dram_small(seen: Seen) -> str:
    gain = seen.points("dram", 2.0)
    if not seen.is_full("dram") or gain < POINTS_MORE:
        return ""
    return f"DRAM is small: twice the size would bring +{gain:.0f} points of block hits from DRAM."


def _evicted(seen: Seen) -> str:
    share = seen.missed("evicted", "not_admitted")
    if share < SHARE_MIN:
        return ""
    return f"{_percent(share)} of the tokens asked for had been here and had to go."


def _namespace(seen: Seen) -> str:
    share = seen.missed("namespace")
    if share < SHARE_MIN:
        return ""
    models = sorted({each.compute for each in seen.stats.attached})
    named = f" Attached are: {'; '.join(models[:3])}." if len(models) > 1 else ""
    return (
        f"{_percent(share)} of the tokens asked for are cached under another namespace: by engines "
        f"with another dtype, other threads or another version of the model.{named}"
    )


def _not_attached(seen: Seen) -> str:
    share = seen.missed("detached")
    if share < SHARE_MIN:
        return ""
    return f"{_percent(share)} of the tokens asked for came while their engine was not attached."


def _flash_late(seen: Seen) -> str:
    share = seen.missed("flash_late")
    if share < SHARE_MIN:
        return ""
    return f"{_percent(share)} of the tokens asked for lie on flash and did not rise in time."


def _no_room_to_rise(seen: Seen) -> str:
    share = seen.lost(("rises_refused",), "flash_read")
    if share < DROPPED_MIN:
        return ""
    return f"{_percent(share)} of the blocks wished from flash find no room in DRAM."


def _not_worth_it(seen: Seen) -> str:
    if seen.saved_s is None or seen.saved_s >= 0 or seen.life.requested < TOKENS_MIN:
        return ""
    return f"So far the cache has cost {-seen.saved_s:.1f} s more than it has saved."


def _ring_drops(seen: Seen) -> str:
    drops = seen.recent.change["ring_drops"]
    if drops < BLOCKS_MIN:
        return ""
    return f"{drops:.0f} reports of workers found their ring full, so eviction knows less."


def _refused(seen: Seen) -> str:
    refused = seen.recent.change["commits_refused"] + seen.recent.change["index_refused"]
    return f"{refused:.0f} blocks that workers stored were refused." if refused else ""


def _nobody(seen: Seen) -> str:
    return "" if seen.stats.sessions else "No engine is attached."


def _rebuilding(seen: Seen) -> str:
    flash = seen.tier("flash")
    if flash is None or flash.state != "rebuilding":
        return ""
    return "The index of flash is being made anew from its slots; blocks there miss meanwhile."


def _dram_large(seen: Seen) -> str:
    loss = -seen.points("dram", 0.5)
    if not seen.is_full("dram") or not seen.stats.what_if.get("dram") or loss >= POINTS_LESS:
        return ""
    return f"DRAM is ample: half the size would cost {max(0.0, loss):.1f} points of block hits."


def _policy_fell(seen: Seen) -> str:
    fallen = " and ".join(use.tier for use in seen.stats.eviction if use.is_lru)
    return fallen and f"Leaf-LRU decides for now in {fallen}: the learning policy had lost to it."


def _cheaper(seen: Seen) -> str:
    share = seen.missed("cheaper")
    if share < SHARE_MIN:
        return ""
    return f"{_percent(share)} of the tokens asked for are cached, but computed faster than loaded."


def _bypassed(seen: Seen) -> str:
    share = seen.missed("no_cache")
    if share < SHARE_MIN:
        return ""
    return f"{_percent(share)} of the tokens asked for came with the cache turned off."


def _short_prompts(seen: Seen) -> str:
    share, block = seen.missed("tail"), seen.stats.block_tokens
    if share < TAILS_MIN:
        return ""
    return (
        f"{_percent(share)} of the tokens asked for are ends of less than a block ({block} tokens)."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


@dataclass(frozen=True, slots=True)
class Rule:
    """What may be said.

    Attributes:
        level, code: of what it says.
        look: says what is so; "" when it is not.
        do: about it.
    """

    level: Level
    code: str
    look: Callable[[Seen], str]
    do: str


RULES: Final = (
    Rule(
        "bad", "flash-off", _flash_off,
        "Mend the disk, the mount or the folder; flash is tried again every 30 s and comes back by "
        "itself.",
    ),
    Rule(
        "bad", "checksum-failures", _corrupt,
        "Look for memory and disk errors in the kernel's log and in SMART; replace what fails.",
    ),
    Rule(
        "bad", "self-test", _self_test,
        "Its log says what came back otherwise; run one version of Kvist on both sides.",
    ),
    Rule(
        "warn", "not-worth-it", _not_worth_it,
        "A young cache has only stored yet. If it stays so, prompts share too little to be cached.",
    ),
    Rule(
        "warn", "dram-small", _dram_small,
        "Raise dram_bytes if the node has memory; the what-if curve says what each size brings.",
    ),
    Rule(
        "warn", "evicted", _evicted,
        "Give flash (flash_path), more of it (flash_bytes), or more DRAM (dram_bytes).",
    ),
    Rule(
        "warn", "namespace-mismatch", _namespace,
        "Start engines that should share with the same model files, dtype, block size and threads.",
    ),
    Rule(
        "warn", "flash-write-bound", _flash_write_bound,
        "Raise flash_queue_blocks for bursts, io_threads if the disk has rate left; "
        "flash_admission = second_use writes less.",
    ),
    Rule(
        "warn", "write-budget", _write_budget,
        "Raise flash_write_bytes_per_day if the endurance of the device allows it.",
    ),
    Rule(
        "warn", "not-attached", _not_attached,
        "After a restart of kvistd this passes; else compare --cache of the engines with socket.",
    ),
    Rule(
        "warn", "flash-late", _flash_late,
        "Raise io_threads, give a faster disk, or more DRAM.",
    ),
    Rule(
        "warn", "no-room-to-rise", _no_room_to_rise,
        "Raise dram_bytes: prompts in use at a time are larger than DRAM.",
    ),
    Rule(
        "warn", "ring-drops", _ring_drops,
        "The sidecar lacks processor time: give it a core, or nice the engines.",
    ),
    Rule(
        "warn", "refused-blocks", _refused,
        "Look into the log of kvistd; a worker of another version writes records that do not fit.",
    ),
    Rule(
        "note", "nobody-attached", _nobody,
        "Start an engine with --cache and the path of this sidecar's socket.",
    ),
    Rule(
        "note", "flash-rebuilding", _rebuilding,
        "Nothing; it takes as long as reading the headers of the folder.",
    ),
    Rule(
        "note", "dram-large", _dram_large,
        "Lower dram_bytes if the memory is wanted elsewhere.",
    ),
    Rule(
        "note", "policy-fell-back", _policy_fell,
        "Nothing; it tries again by itself. Where it is so for days, set eviction = lru.",
    ),
    Rule(
        "note", "cheaper-to-compute", _cheaper,
        "Nothing; kvist cache stats shows from which length loading pays.",
    ),
    Rule(
        "note", "cache-bypassed", _bypassed,
        "Nothing if it is meant: requests with kv_cache = bypass, or engines with --cache off.",
    ),
    Rule(
        "note", "short-prompts", _short_prompts,
        "Nothing if prompts are short; smaller blocks (--block-size of the engine) cache more.",
    ),
)  # fmt: skip
"""In the order in which things of one level are said."""
