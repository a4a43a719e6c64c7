"""What `kvist top` shows: lines of a screen, made from figures; no terminal is touched here."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.text import Text

from kvist.cachesvc.tools.listing import KEY_DIGITS
from kvist.cachesvc.tools.top.data import Now, TierNow, hit_ratio_of
from kvist.cachesvc.tools.words import count, counted, percent, span
from kvist.proto.shm import MOVED_TIERS, NEVER
from kvist.proto.sizes import format_bytes

Tab = Literal["prefixes", "workers", "eviction", "tenants", "health"]
TABS: tuple[Tab, ...] = ("prefixes", "workers", "eviction", "tenants", "health")
URGENT_FIRST: tuple[Tab, ...] = ("health", "tenants", "workers", "eviction", "prefixes")
SORTS = ("uses", "size", "recent")
MISSES_SHOWN = 4
# Below the first there are no empty lines, from the second on other views than the chosen one.
HEIGHT_ROOMY, HEIGHT_TALL = 24, 36
# Of the chosen view before others get a place, and of each of these.
CHOSEN_LINES, OTHER_LINES = 12, 8
HEALTH_LINES = 2
BAR_CELLS = 20
GOOD, FAIR, POOR, DIM, HEAD = "green", "yellow", "red", "dim", "bold"
_OLDER = "this kvistd is older than the tool: it says so on its page only; give --url"
_LEVELS = {"bad": POOR, "warn": FAIR, "note": DIM}
_STATES = {"ready": GOOD, "rebuilding": FAIR, "failed": POOR, "off": DIM}


@dataclass(frozen=True, slots=True)
class Shown:
    """What a person chose to see.

    Attributes:
        tab: below the tiers.
        sort: of the prefixes.
        paused: the figures stand still.
    """

    tab: Tab = "prefixes"
    sort: str = "uses"
    paused: bool = False

    def pressed(self, key: str) -> Shown:
        """After a key; others than those of the last line change nothing."""
        if key in ("\t", "l"):
            return Shown(TABS[(TABS.index(self.tab) + 1) % len(TABS)], self.sort, self.paused)
        if key in "12345":
            return Shown(TABS[int(key) - 1], self.sort, self.paused)
        if key == "s":
            at = (SORTS.index(self.sort) + 1) % len(SORTS)
            return Shown(self.tab, SORTS[at], self.paused)
        return Shown(self.tab, self.sort, not self.paused) if key in "p " else self


@dataclass(frozen=True, slots=True)
class Scene:
    """All there is to show.

    Attributes:
        where: the sidecar's address.
        now: None before the first answer.
        problem: why no answer comes any more; "" when they come.
        prefixes: runs as `kvist cache ls --json` has them; None when they cannot be had.
    """

    where: str
    now: Now | None
    problem: str = ""
    prefixes: Sequence[Mapping[str, Any]] | None = None


def screen(scene: Scene, shown: Shown, width: int, height: int) -> list[Text]:
    """The lines of a screen, height of them at most, each width cells at most.

    What is broken comes first and in words, then the figures, then the view that was chosen, and
    on a tall screen the others below it. A short one has no empty lines. Figures of a sidecar that
    answers no more are dim, and its health is not told: nobody knows it.
    """
    room = max(1, height - 1)
    lines = _lines(scene, shown, width, height, room)
    lines = lines[:room] + [Text()] * (room - len(lines))
    keys = " q quit   tab 1-5 view   s sort   p pause "
    lines.append(Text(keys.ljust(width), "reverse"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def _lines(scene: Scene, shown: Shown, width: int, height: int, room: int) -> list[Text]:
    lines, now = [_title(scene, shown)], scene.now
    problem = [Text(line, POOR) for line in _wrapped(scene.problem, width, "", "")]
    if now is not None:
        gap = [Text()] if height >= HEIGHT_ROOMY else []
        health = problem or _health_line(now.stats, width)
        lines += [*health, *gap, *_rates(now), *gap]
        lines += [*_tiers(now.tiers, now.stats, width), *gap]
        worth = [*_worth(now.stats), *_ttft(now.stats)]
        lines += [*worth, *gap] if worth else []
        lines.append(_tabs(shown))
        lines += _views(scene, now, shown, width, room - len(lines), height >= HEIGHT_TALL)
    if not problem:
        return lines
    told = len(problem) if now is not None else 0
    return [*problem, *(Text(line.plain, DIM) for line in (lines[0], *lines[1 + told :]))]


def _title(scene: Scene, shown: Shown) -> Text:
    title = Text("kvist top", HEAD)
    if shown.paused:
        title.append("  PAUSED", FAIR)
    if scene.now is not None:
        stats = scene.now.stats
        title.append(
            f"  up {span(stats['uptime_s'])}  {counted(stats['sessions'], 'worker')}  "
            f"{count(stats['blocks'])} block{'s' * (stats['blocks'] != 1)}",
            "not bold",
        )
    title.append(f"  {scene.where}", "not bold dim")
    return title


def _grade(ratio: float | None) -> str:
    return DIM if ratio is None else GOOD if ratio >= 0.5 else FAIR if ratio >= 0.2 else POOR


def _bar(share: float, style: str, cells: int = BAR_CELLS) -> Text:
    full = round(max(0.0, min(1.0, share)) * cells)
    return Text("[").append("|" * full, style).append(" " * (cells - full)).append("]")


def _rates(now: Now) -> list[Text]:
    ratio, ever = now.hit_ratio, hit_ratio_of(now.stats)
    window = f"last {now.seconds:.0f} s" if now.seconds else "since start"
    line = Text("hit rate ", HEAD).append_text(_bar(ratio or 0.0, _grade(ratio)))
    words = "no requests" if ratio is None else f"{100 * ratio:.1f} %"
    line.append(f" {words} {window}")
    if ever is not None:
        line.append(f", {100 * ever:.1f} % ever", DIM)
    if now.seconds:
        line.append(f", {count(now.requested / now.seconds)} tok/s")
    hits = "  ".join(f"{tier} {percent(n, now.requested)}" for tier, n in now.hits.items())
    shown = list(now.misses.items())[:MISSES_SHOWN]
    rest = sum(now.misses.values()) - sum(tokens for _, tokens in shown)
    shown += [("others", rest)] if rest else []
    misses = "  ".join(f"{why} {percent(tokens, now.requested)}" for why, tokens in shown)
    return [
        line,
        Text("hits     ", HEAD).append(hits or "none", "not bold"),
        Text("misses   ", HEAD).append(misses or "none", "not bold"),
    ]


def _tiers(tiers: Sequence[TierNow], stats: Mapping[str, Any], width: int) -> list[Text]:
    failures = {one["tier"]: one.get("failure", "") for one in stats["tiers"]}
    head = "tier   state      used                       size       in /s     out /s evict/s"
    lines = [Text(head, HEAD)]
    for tier in tiers:
        share = tier.used_slots / tier.slots if tier.slots else 0.0
        line = Text(f"{tier.tier:6} ").append(f"{tier.state:10} ", _STATES.get(tier.state, POOR))
        line.append_text(_bar(share, "cyan", 12))
        line.append(
            f" {100 * share:3.0f} % {format_bytes(tier.size_bytes):>8} "
            f"{_flow(tier.in_bytes_per_s)} {_flow(tier.out_bytes_per_s)} "
            f"{count(tier.evicted_per_s):>7}"
        )
        lines.append(line)
        if failures.get(tier.tier):
            lines += [
                Text(each, POOR) for each in _wrapped(failures[tier.tier], width, *2 * (" " * 7,))
            ]
    if not tiers:
        lines.append(Text("no worker has attached yet, so there are no tiers", DIM))
    return lines


def _flow(bytes_per_s: float) -> str:
    return f"{format_bytes(round(bytes_per_s)) if bytes_per_s >= 1 else '-':>10}"


def _worth(stats: Mapping[str, Any]) -> list[Text]:
    """Whether it pays."""
    tiers = [one for one in stats.get("worth", ()) if one["tier"] != "hbm"]
    if not tiers:
        return []
    line = Text("worth it ", HEAD)
    net = sum(float(one["net_s"]) for one in tiers)
    line.append(f"{net:+.1f} s", GOOD if net > 0 else FAIR)
    saved, moved = (
        sum(float(one[name]) for one in tiers for name in names)
        for names in (("saved_s",), ("load_s", "store_s"))
    )
    line.append(f" = {saved:.1f} s of prefill saved - {moved:.1f} s moving", "not bold")
    minute = stats.get("spans", {}).get("minute")
    if minute:
        line.append(f"; {float(minute['net_s']):+.1f} s last minute", "not bold")
    return [line]


def _ttft(stats: Mapping[str, Any]) -> list[Text]:
    """Mean time to the first token, as on the page: by where most of the prompt came from."""
    if not stats.get("ttft"):
        return []
    told = (
        f"{'nothing' if one['tier'] == 'none' else one['tier']} {float(one['mean_s']):.3f} s"
        for one in stats["ttft"]
    )
    return [
        Text("ttft     ", HEAD).append("  ".join(told) + "  cached, mean since start", "not bold")
    ]


def _health_line(stats: Mapping[str, Any], width: int) -> list[Text]:
    """How it is, and the worst thing to know; an older sidecar does not say it."""
    if "health" not in stats:
        return []
    advice = stats.get("advice", ())
    style = _LEVELS.get(advice[0]["level"], DIM) if advice else GOOD
    words = f"{stats['health']}: {advice[0]['what']}" if advice else str(stats["health"])
    first, *rest = _wrapped(words, width, "health   ", " " * 9)
    lines = [Text(first[:9], HEAD).append(first[9:], style), *(Text(each, style) for each in rest)]
    if len(lines) > HEALTH_LINES:
        lines = lines[:HEALTH_LINES]
        lines[-1].append(" …")
    return lines


def _wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    """Lines; first and rest is what they begin with."""
    return textwrap.wrap(text, max(20, width), initial_indent=first, subsequent_indent=rest)


def _tabs(shown: Shown) -> Text:
    line = Text()
    for number, tab in enumerate(TABS, 1):
        line.append(f" {number} {tab} ", "reverse" if tab == shown.tab else DIM).append(" ")
    if shown.tab == "prefixes":
        line.append(f" by {shown.sort}", DIM)
    return line


def _views(
    scene: Scene, now: Now, shown: Shown, width: int, room: int, is_tall: bool
) -> list[Text]:
    """The chosen view, and on a tall screen the beginnings of others, the urgent ones first."""
    chosen = _view(scene, now, shown.tab, shown.sort, width)
    left = room - min(len(chosen), CHOSEN_LINES)
    others: list[Text] = []
    for tab in URGENT_FIRST if is_tall else ():
        lines = _view(scene, now, tab, shown.sort, width)[:OTHER_LINES]
        if tab != shown.tab and len(lines) + 2 <= left:
            left -= len(lines) + 2
            others += [Text(), Text(f" {tab} ", "reverse dim"), *lines]
    return chosen[: max(0, room - len(others))] + others


def _view(scene: Scene, now: Now, tab: Tab, sort: str, width: int) -> list[Text]:
    if tab == "workers":
        return _workers(now.stats.get("workers", ()))
    if tab == "eviction":
        return _eviction(now.stats)
    if tab == "tenants":
        return _tenants(now.stats)
    if tab == "health":
        return _health(now.stats, width)
    return _prefixes(scene.prefixes, sort)


def _prefixes(runs: Sequence[Mapping[str, Any]] | None, sort: str) -> list[Text]:
    if runs is None:
        return [Text("its page does not list them; give --socket", DIM)]
    if not runs:
        return [Text("no prefix is stored, or none was used twice", DIM)]
    order = {
        "uses": lambda run: -run["uses"],
        "size": lambda run: -run["bytes"],
        "recent": lambda run: run["idle_s"],
    }[sort]
    lines = [
        Text("prefix         tokens  blocks   dram  flash      size   uses   used whose", HEAD)
    ]
    return [*lines, *(Text(_prefix_line(run)) for run in sorted(runs, key=order))]


def _prefix_line(run: Mapping[str, Any]) -> str:
    return (
        f"{run['key'][:KEY_DIGITS]:12} {count(run['prefix_tokens']):>8} "
        f"{count(run['blocks']):>7} {count(run['dram_blocks']):>6} "
        f"{count(run['flash_blocks']):>6} {format_bytes(run['bytes']):>9} "
        f"{count(run['uses']):>6} {span(run['idle_s']):>6} "
        f"{run['tenant'] or run['namespace'][:8]}"
    )


def _workers(workers: Sequence[Mapping[str, Any]]) -> list[Text]:
    if not workers:
        return [Text("no worker is attached", DIM)]
    head = "worker           load GB/s dram  flash  store   prefill tok/s  loading pays from"
    lines = [Text(head, HEAD)]
    for worker in workers:
        rates: Mapping[str, Any] = worker["rates"]
        giga = [
            f"{int(rates[name]) / 1e9:.2f}" if name in rates else "-"
            for name in (
                "load_bytes_per_s.dram",
                "load_bytes_per_s.flash",
                "store_bytes_per_s.dram",
            )
        ]
        prefill = rates.get("prefill_tokens_per_s.2048")
        pays = rates.get("break_even_tokens.dram")
        told = "-" if pays is None else "never" if int(pays) == NEVER else f"{pays} tokens"
        lines.append(
            Text(
                f"{worker['client'][:20]:20} {giga[0]:>10} {giga[1]:>6} {giga[2]:>6} "
                f"{'-' if prefill is None else count(int(prefill)):>15}  {told:>17}"
            )
        )
    return lines


def _eviction(stats: Mapping[str, Any]) -> list[Text]:
    lines = [Text("tier   held of asked   leaf-LRU would   points over leaf-LRU   decides", HEAD)]
    for use in stats.get("eviction", ()):
        asked = int(use["asked_blocks"])
        lines.append(
            Text(
                f"{use['tier']:6} {percent(int(use['hit_blocks']), asked):>13} "
                f"{percent(int(use['lru_hit_blocks']), asked):>16} "
                f"{float(use['points_over_lru']):+22.2f}   "
                f"{'leaf-LRU' if use['is_lru'] else 'the policy'}"
            )
        )
    what_if = stats.get("what_if") or {}
    if isinstance(what_if, Mapping):
        for tier, estimates in what_if.items():
            points = "  ".join(
                f"x{one['multiple']:g} {100 * one['hit_ratio']:.1f} %" for one in estimates
            )
            lines.append(Text(f"{tier:6} if its size were: {points}"))
    return lines


def _tenants(stats: Mapping[str, Any]) -> list[Text]:
    """Most asked first."""
    if "tenants" not in stats:
        return [Text(_OLDER, DIM)]
    tenants = stats["tenants"]
    head = "tenant            requests     tokens   hit %    dram   flash     saved      net"
    if not tenants:
        return [Text("no request yet", DIM)]
    return [Text(head, HEAD), *(Text(_tenant_line(one)) for one in tenants)]


def _tenant_line(one: Mapping[str, Any]) -> str:
    requested, held = int(one["requested_tokens"]), one["held_blocks"]
    hit = percent(sum(map(int, one["hit_tokens"].values())), requested)
    saved = sum(float(one["saved_s"].get(tier, 0.0)) for tier in MOVED_TIERS)
    return (
        f"{one['tenant'][:16]:16} {count(one['lookups']):>9} {count(requested):>10} {hit:>7}"
        f" {count(held.get('dram', 0)):>7} {count(held.get('flash', 0)):>7}"
        f" {saved:7.1f} s {float(one['net_s']):+6.1f} s"
    )


def _health(stats: Mapping[str, Any], width: int) -> list[Text]:
    """What to do about it, whole."""
    if "health" not in stats:
        return [Text(_OLDER, DIM)]
    lines = []
    for one in stats.get("advice", ()):
        style = _LEVELS.get(one["level"], DIM)
        text = f"{one['level']:5}{one['what']} {one['do']}"
        wrapped = textwrap.wrap(text, max(20, width), subsequent_indent=" " * 5)
        lines += [Text(line, style if not at else "") for at, line in enumerate(wrapped)]
    return lines or [Text("nothing to improve", DIM)]
