"""`kvist cache doctor`: looks at the host and at a running kvistd, and says what to change."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from kvist.cachesvc.config import SETTINGS, SHOWN_SETTINGS, Loaded, SidecarConfig, load_config
from kvist.cachesvc.tools.doctor.disk import access, check_flash
from kvist.cachesvc.tools.doctor.findings import Finding, Host, Level
from kvist.cachesvc.tools.doctor.host import check_host
from kvist.cachesvc.tools.door import Address
from kvist.cachesvc.tools.words import counted
from kvist.cachesvc.view.stats_table import Source, source_at, source_of
from kvist.proto.errors import ConfigInvalid
from kvist.proto.sizes import format_bytes

EXIT_WELL, EXIT_BAD = 0, 1
# Settings of kvistd that say what the host must bear.
_SETTINGS = ("socket", "http_listen", "shm_dir", "dram_bytes", "flash_path", "flash_bytes")
SMALL_ARENA_BYTES = 256 << 20  # copies from less are not what anybody waits for
_MARKS = {"ok": "ok  ", "warn": "warn", "bad": "BAD "}


def add_doctor_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache doctor`."""
    parser.add_argument("--config", metavar="FILE", help="of kvistd, as for kvistd itself")
    for setting in SETTINGS:
        if setting.key in _SETTINGS:
            text = f"what kvistd is told: {setting.help}"
            parser.add_argument(setting.flag, dest=setting.key, metavar="VALUE", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run_doctor(flags: argparse.Namespace) -> int:
    """Check and print.

    Returns: 1 when something is bad, else 0.

    Raises: ConfigInvalid: a setting of kvistd is wrong.
    """
    findings = list(examine(Host(environment=os.environ), _load(flags, os.environ)))
    if flags.json:
        print(json.dumps({"findings": [dataclasses.asdict(one) for one in findings]}))
    else:
        print(as_table(findings, sys.stdout.isatty()))
    return EXIT_BAD if any(one.level == "bad" for one in findings) else EXIT_WELL


def _load(flags: argparse.Namespace, environment: Mapping[str, str]) -> Loaded:
    given = {setting.key: getattr(flags, setting.key, None) for setting in SETTINGS}
    return load_config(argparse.Namespace(config=flags.config, **given), environment)


def examine(host: Host, loaded: Loaded) -> Iterator[Finding]:
    """Every check, the running kvistd last. Its own settings are looked at, unless a flag says
    otherwise; those of file and environment are of the next one."""
    source = running(loaded)
    stats, problem = _answer(source)
    arena = (
        next((tier for tier in stats["tiers"] if tier["tier"] == "dram"), None) if stats else None
    )
    held = int(arena["slots"]) * int(arena["slot_bytes"]) if arena else 0
    config = _config_of(stats, loaded) if stats else loaded.config
    yield from check_host(host, held or config.dram_bytes, held)
    yield from check_flash(host, config.flash_path, config.flash_bytes)
    yield access("run folder", config.socket.parent, "folder")
    yield access("socket", config.socket, "socket")
    yield access("shm folder", config.shm_dir, "folder")
    if stats is None:
        yield Finding("kvistd", "ok", f"{problem}; these are the checks before a start")
    else:
        yield from check_sidecar(stats, source.where)


def running(loaded: Loaded) -> Source:
    """The kvistd that was named by its socket or its page; else this user's."""
    said = {key for key, source in loaded.sources.items() if source != "default"}
    config, by = loaded.config, loaded.sources["socket"]
    if "socket" not in said and "http_listen" not in said:
        return source_of(None, None)
    if "socket" in said or not config.http_listen:
        return source_at(Address(str(config.socket), by.rpartition(" ")[2]))
    return source_of(f"http://{config.http_listen}", None)


def _answer(source: Source) -> tuple[dict[str, Any] | None, str]:
    """What it says, or why there is nothing."""
    try:
        return source.ask(), ""
    except ConfigInvalid as error:
        return None, str(error)


def _config_of(stats: Mapping[str, Any], loaded: Loaded) -> SidecarConfig:
    """The settings of a running kvistd, as far as it tells them; flags come first."""
    told = {
        key: text
        for key, text in stats.get("settings", {}).items()
        if key in SHOWN_SETTINGS and not loaded.sources[key].startswith("flag ")
    }
    parsed: dict[str, Any] = {
        setting.key: setting.parse(told[setting.key]) for setting in SETTINGS if setting.key in told
    }
    return dataclasses.replace(loaded.config, **parsed)


def check_sidecar(stats: Mapping[str, Any], where: str) -> Iterator[Finding]:
    """Version and tiers of a running kvistd.

    Args:
        stats: as /stats.json has them, or fewer of them.
        where: they come from.
    """
    own, its = version("kvist"), stats.get("version", "")
    workers, blocks = counted(stats["sessions"], "worker"), counted(stats["blocks"], "block")
    up = f"up {stats['uptime_s']:.0f} s, {workers}, {blocks}, at {where}"
    if its in ("", own):
        yield Finding("kvistd", "ok", f"{its or 'of an older version'}, {up}")
    else:
        found = f"{its} runs, this is {own}; {up}"
        yield Finding("kvistd", "warn", found, "restart kvistd and the engines with one version")
    for tier in stats["tiers"]:
        yield check_tier(tier)
        quarantined = int(tier.get("quarantined_slots", 0))
        if quarantined:
            name, found = f"{tier['tier']} damage", f"{quarantined} slots gave wrong bytes"
            test = "memtester 1G 1" if tier["tier"] == "dram" else "sudo smartctl -a /dev/nvme0"
            yield Finding(name, "warn", found, f"test the device: {test}; kvist cache verify PATH")
    # What its page says of the figures; see view/advice.
    for one in stats.get("advice", ()):
        level: Level = "ok" if one["level"] == "note" else one["level"]
        yield Finding(str(one["code"]), level, str(one["what"]), str(one["do"]))


def check_tier(tier: Mapping[str, Any]) -> Finding:
    """State of a tier, and whether its memory is huge."""
    name, state = str(tier["tier"]), str(tier["state"])
    size = int(tier["slots"]) * int(tier["slot_bytes"])
    found = f"{state}, {tier['used_slots']} of {tier['slots']} slots used, {format_bytes(size)}"
    if state == "failed":
        why = tier.get("failure") or "see its log"
        fix = "mend the folder or the disk; kvistd takes it up again by itself"
        return Finding(f"tier {name}", "bad", f"failed: {why}", fix)
    if state == "rebuilding":
        fix = "nothing: it is being read, misses say flash_rebuilding meanwhile"
        return Finding(f"tier {name}", "warn", found, fix)
    huge = int(tier.get("huge_bytes", size))
    if name == "dram" and size >= SMALL_ARENA_BYTES and huge < size // 2:
        fix = "free memory before kvistd starts, or echo 1 | sudo tee /proc/sys/vm/compact_memory"
        return Finding(f"tier {name}", "warn", f"{found}, {format_bytes(huge)} in huge pages", fix)
    return Finding(f"tier {name}", "ok", found)


def as_table(findings: Sequence[Finding], in_colour: bool = False) -> str:
    """For people: a line each, and what to change under it."""
    colours = {"ok": "32", "warn": "33", "bad": "31;1"}
    lines = []
    for one in findings:
        mark = _MARKS[one.level]
        mark = f"\x1b[{colours[one.level]}m{mark}\x1b[0m" if in_colour else mark
        lines.append(f"{mark} {one.name:18} {one.found}")
        if one.fix:
            lines.append(f"{'':23} -> {one.fix}")
    counts = {level: sum(one.level == level for one in findings) for level in _MARKS}
    lines.append(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['bad']} bad")
    return "\n".join(lines)
