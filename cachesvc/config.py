"""Settings of the sidecar: one table, read from a file, the environment and flags."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from kvist.cachesvc.events.settings import KvEventsConfig, parse_kv_events
from kvist.cachesvc.flash.budget import ADMISSIONS, AdmissionMode
from kvist.cachesvc.folders import home_folders
from kvist.cachesvc.log import FORMATS, LEVELS, Format, Level
from kvist.cachesvc.placing.tenancy import Limits, check_floors, parse_tenants
from kvist.cachesvc.policy.eviction import POLICIES, PolicyName
from kvist.cachesvc.setting_sources import VARIABLE_PREFIX, from_environment, from_file
from kvist.proto import numa
from kvist.proto.errors import ConfigInvalid
from kvist.proto.record import PAGE_BYTES
from kvist.proto.sizes import format_bytes, parse_bytes
from kvist.proto.verify import VERIFY, Verify, checked_dram_verify

DEFAULT_FILE = Path("/etc/kvist/kvistd.toml")
# sockaddr_un holds 108 bytes with the zero at its end.
SOCKET_PATH_BYTES = 107
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing a person can set; the field of SidecarConfig has the same name.

    Attributes:
        key: name in the file; KVIST_<KEY> in the environment, --<key> as a flag.
        default: as a person would write it.
        help: what it does, one sentence, for `--help` and the documentation.
        parse: from text to the field's value; raises ValueError that says what is accepted.
    """

    key: str
    default: str
    help: str
    parse: Callable[[str], object]

    @property
    def variable(self) -> str:
        """Name in the environment."""
        return VARIABLE_PREFIX + self.key.upper()

    @property
    def flag(self) -> str:
        """Name on the command line."""
        return "--" + self.key.replace("_", "-")


def _path(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not an absolute path; write one, like /run/kvist")
    if not text.isprintable():
        raise ValueError(f"{text!r} has a character that cannot be printed; give another path")
    return Path(text)


def _socket(text: str) -> Path:
    path = _path(text.removeprefix("unix:"))
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise ValueError(f"{text!r} is longer than {SOCKET_PATH_BYTES} bytes; use a shorter path")
    return path


def _path_or_off(text: str) -> Path | None:
    return _path(text) if text else None


def _address(text: str) -> str:
    match = _HOST_PORT.fullmatch(text)
    if text and (match is None or int(match.group(2)) > 65535):
        raise ValueError(f"{text!r} is not an address; write host:port, like 127.0.0.1:9400")
    return text


def _bytes_at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        count = parse_bytes(text)
        if count < low:
            raise ValueError(f"{text} is too small; give {format_bytes(low)} or more")
        return count

    return parse


def bytes_or(word: str) -> Callable[[str], int | None]:
    """A parser of sizes of 1 MiB and more, or of a word for None."""
    size = _bytes_at_least(1 << 20)
    return lambda text: None if text == word else size(text)


def _slot_bytes(text: str) -> int | None:
    if text == "auto":
        return None
    count = parse_bytes(text)
    if count < 2 * PAGE_BYTES or count % PAGE_BYTES:
        raise ValueError(f"{text} must be a multiple of 4KiB and 8KiB or more, or auto")
    return count


def _number_in(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{text!r} is not a share; write a number over 0 and up to 1, like 0.25")
    return share


def _numa(text: str) -> str:
    if text not in (numa.AUTO, numa.INTERLEAVE, numa.OFF) and not text.isdecimal():
        raise ValueError(f"{text!r} is no node; give its number, auto, interleave or off")
    return text


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


_RUN_DIR, _SHM_DIR = home_folders(os.geteuid(), os.environ)

SETTINGS: tuple[Setting, ...] = (
    Setting("socket", f"{_RUN_DIR}/kvistd.sock", "Unix socket of the gRPC service.", _socket),
    Setting(
        "listen",
        "",
        "TCP address of the gRPC service for other hosts, like 0.0.0.0:9400; empty: none. It asks "
        "nobody who they are: open it to trusted networks only.",
        _address,
    ),
    Setting(
        "http_listen",
        "127.0.0.1:9401",
        "Address of the page, /metrics, /stats.json and /healthz; empty: none.",
        _address,
    ),
    Setting("page_tokens", "hidden", "Token ids on the page.", _one_of(("hidden", "shown"))),
    Setting("run_dir", _RUN_DIR, "Folder of the lock and the bell.", _path),
    Setting("shm_dir", _SHM_DIR, "Folder of arena, index and rings, in memory.", _path),
    Setting("dram_bytes", "1GiB", "Size of the DRAM tier.", _bytes_at_least(1 << 20)),
    Setting(
        "dram_numa",
        numa.AUTO,
        "NUMA node of the DRAM tier's memory: auto: the one whose cores kvistd may use, or spread "
        "over these if there are several; interleave: spread over all that have cores; a node's "
        "number; off: where each page is first touched.",
        _numa,
    ),
    Setting("flash_path", "", "Folder of the flash tier; empty: no flash tier.", _path_or_off),
    Setting("flash_bytes", "8GiB", "Size of the flash tier.", _bytes_at_least(1 << 20)),
    Setting(
        "slot_bytes",
        "auto",
        "Size of a slot, the largest block it can hold; auto: that of the flash folder, or of the "
        "first worker that attaches.",
        _slot_bytes,
    ),
    Setting(
        "flash_admission",
        "second_use",
        "Which blocks are written to flash: always: all; second_use: those used again, and others "
        "as long as flash has free slots.",
        _one_of(ADMISSIONS),
    ),
    Setting(
        "flash_write_bytes_per_day",
        "unlimited",
        "Bytes that may be written to flash in a day; what is over it is not written.",
        bytes_or("unlimited"),
    ),
    Setting(
        "flash_write_burst_bytes",
        "auto",
        "Bytes of that which may be written at once; auto: those of an hour.",
        bytes_or("auto"),
    ),
    Setting("io_threads", "2", "Threads that read and write flash.", _number_in(1, 64)),
    Setting(
        "flash_queue_blocks",
        "256",
        "Blocks that may wait to be written to flash; more are dropped and counted.",
        _number_in(1, 1 << 20),
    ),
    Setting(
        "reservation_share",
        "0.25",
        "Share of the DRAM slots that one worker may hold reserved at once.",
        _share,
    ),
    Setting(
        "eviction",
        "rgg",
        "Which blocks go first: rgg learns what comes back and stays close to lru, which drops "
        "what was used longest ago; cost is rgg for long prompts, see docs/architecture.md.",
        _one_of(POLICIES),
    ),
    Setting(
        "tenants",
        "",
        "What tenants may have, like: acme quota=4GiB floor=1GiB ttl=24h; * quota=1GiB. Also "
        "flash_quota, flash_floor; cachesvc/placing/tenancy.py says it all.",
        parse_tenants,
    ),
    Setting(
        "pin_bytes",
        "auto",
        "Bytes of blocks that may be pinned at once; auto: a quarter of dram_bytes.",
        bytes_or("auto"),
    ),
    Setting(
        "dram_verify",
        "always",
        f"Whether the checksum of a block read from DRAM is compared: {', '.join(VERIFY)}.",
        _one_of(VERIFY),
    ),
    Setting("flash_verify", "always", "The same for a block read from flash.", _one_of(VERIFY)),
    Setting(
        "kv_events_config",
        "",
        "KV events for routers over ZMQ: a JSON object with vLLM's keys, like "
        '{"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}; empty: none. See '
        "docs/events.md.",
        parse_kv_events,
    ),
    Setting(
        "otlp_endpoint",
        "",
        "Collector of OpenTelemetry traces, like http://localhost:4317; empty: none. See "
        "docs/tracing.md.",
        str,
    ),
    Setting("log_level", "info", f"Least level to log: {', '.join(LEVELS)}.", _one_of(LEVELS)),
    Setting("log_format", "text", f"Form of a log line: {', '.join(FORMATS)}.", _one_of(FORMATS)),
)
"""Every setting, in the order of `--print-config` and of the documentation."""

SHOWN_SETTINGS = ("socket", "shm_dir", "dram_bytes", "flash_path", "flash_bytes")
"""What a running kvistd tells in /stats.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarConfig:
    """What kvistd was told; SETTINGS says what each field means.

    Made by load_config, which checks every field by itself; here is checked what only holds
    between fields.

    Attributes:
        listen: "" is no TCP service. http_listen: "" is no page.
        flash_path: None is no flash tier.
        slot_bytes: None is "auto".
        kv_events_config: None is no events. otlp_endpoint: "" is no traces.
        flash_write_bytes_per_day: None is "unlimited". flash_write_burst_bytes: None is "auto".

    Raises:
        ConfigInvalid: two settings contradict each other; the message names both and the fix.
    """

    socket: Path
    listen: str
    http_listen: str
    page_tokens: str
    run_dir: Path
    shm_dir: Path
    dram_bytes: int
    dram_numa: str
    flash_path: Path | None
    flash_bytes: int
    slot_bytes: int | None
    flash_admission: AdmissionMode
    flash_write_bytes_per_day: int | None
    flash_write_burst_bytes: int | None
    io_threads: int
    flash_queue_blocks: int
    reservation_share: float
    eviction: PolicyName
    tenants: Mapping[str, Limits]
    pin_bytes: int | None
    dram_verify: Verify
    flash_verify: Verify
    kv_events_config: KvEventsConfig | None
    otlp_endpoint: str
    log_level: Level
    log_format: Format

    def __post_init__(self) -> None:
        checked_dram_verify(self.dram_verify)
        if self.slot_bytes is not None and self.slot_bytes > self.dram_bytes:
            raise ConfigInvalid(
                f"slot_bytes: {format_bytes(self.slot_bytes)} is more than dram_bytes, "
                f"{format_bytes(self.dram_bytes)}; raise dram_bytes"
            )
        check_floors(self.tenants, self.dram_bytes, self.flash_bytes)
        taken = self.listen and not self.listen.endswith(":0")  # any free port, each its own
        if taken and self.listen == self.http_listen:
            raise ConfigInvalid(f"http_listen: {self.listen} is also listen; give it another port")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings and where each came from.

    Attributes:
        config: checked.
        texts: key -> the value as it was written.
        sources: key -> "default", "file PATH", "environment NAME" or "flag --NAME".
    """

    config: SidecarConfig
    texts: Mapping[str, str]
    sources: Mapping[str, str]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --config and one flag per setting."""
    parser.add_argument("--config", metavar="FILE", help=f"TOML file ({DEFAULT_FILE} if there)")
    for setting in SETTINGS:
        shown = f"{setting.help} ({setting.default or 'empty'})"
        parser.add_argument(setting.flag, dest=setting.key, metavar="VALUE", help=shown)


def load_config(
    flags: argparse.Namespace, environment: Mapping[str, str], default_file: Path = DEFAULT_FILE
) -> Loaded:
    """Put the settings together: defaults, then the file, the environment, the flags.

    Args:
        flags: parsed by a parser that add_flags has filled.
        environment: the process's variables.
        default_file: read when --config is not given and it exists.

    Raises:
        ConfigInvalid: a setting is unknown or wrong; the message names it, where it came from
            and the fix.
    """
    texts = {setting.key: setting.default for setting in SETTINGS}
    sources = dict.fromkeys(texts, "default")

    def take(layer: Mapping[str, tuple[str, str]]) -> None:
        for key, (text, source) in layer.items():
            texts[key], sources[key] = text, source

    if flags.config is not None:
        take(from_file(Path(flags.config), list(texts)))
    elif default_file.exists():
        take(from_file(default_file, list(texts)))
    take(from_environment(environment, {each.variable: each.key for each in SETTINGS}))
    given = {setting.key: getattr(flags, setting.key) for setting in SETTINGS}
    take({k: (v, f"flag --{k.replace('_', '-')}") for k, v in given.items() if v is not None})
    values: dict[str, object] = {}
    for setting in SETTINGS:
        try:
            values[setting.key] = setting.parse(texts[setting.key])
        except ValueError as error:
            raise ConfigInvalid(f"{setting.key} (from {sources[setting.key]}): {error}") from None
    assert values.keys() == {field.name for field in fields(SidecarConfig)}
    return Loaded(SidecarConfig(**values), texts, sources)  # type: ignore[arg-type]


def as_toml(loaded: Loaded) -> str:
    """The settings as a file that load_config takes, each with where it came from."""
    lines = ["# The settings of kvistd in force, and where each came from."]
    for setting in SETTINGS:
        lines.append(f"\n# {setting.help}")
        # A JSON string of printable text is also a TOML basic string.
        value = json.dumps(loaded.texts[setting.key], ensure_ascii=False)
        lines.append(f"{setting.key} = {value}  # {loaded.sources[setting.key]}")
    return "\n".join(lines) + "\n"
