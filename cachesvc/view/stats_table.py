"""`kvist cache stats`: what a running sidecar holds and serves, and from which length it pays."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.cachesvc.tools.door import SOCKET_HELP, Address, Door, short_words, socket_of
from kvist.cachesvc.tools.words import counted
from kvist.proto.errors import ConfigInvalid
from kvist.proto.shm import NEVER
from kvist.proto.sizes import format_bytes

TIMEOUT_S = 5.0
# Where kvistd shows its page when nothing else was said.
PAGE = "http://127.0.0.1:9401"
TENANTS_SHOWN = 10
_PREFILLS = ("512", "2048", "8192")


def add_stats_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache stats`."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--socket",
        "--address",
        dest="socket",
        metavar="WHERE",
        help=f"{SOCKET_HELP}; {PAGE} where there is none",
    )
    where.add_argument("--url", help="of its page")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run_stats(flags: argparse.Namespace) -> int:
    """Ask and print.

    Raises:
        ConfigInvalid: nobody answers there.
    """
    source = source_of(flags.url, flags.socket)
    document = source.ask()
    source.tell()
    print(json.dumps(document) if flags.json else as_tables(document))
    return 0


@dataclass(frozen=True, slots=True)
class Source:
    """A sidecar's figures.

    Attributes:
        where: they come from. socket: its address, None where only its page is known.
        ask: for them; raises ConfigInvalid when nobody answers.
        is_said: a flag or variable says which sidecar.
    """

    where: str
    socket: Address | None
    ask: Callable[[], dict[str, Any]]
    is_said: bool

    def tell(self) -> None:
        """Say which one it is, beside the output, where nobody said which one to take."""
        if not self.is_said:
            print(f"of the sidecar at {self.where}", file=sys.stderr)


def source_of(url: str | None, socket: str | None) -> Source:
    """The sidecar that was named; else this user's; else, where that has no socket, PAGE.

    Args:
        url, socket: as the flags say.
    """
    address = socket_of(socket)
    if url:
        return Source(url, address if socket else None, lambda: from_url(url), True)
    if address.said_by or Path(address.where).exists():
        return source_at(address)
    return Source(PAGE, None, lambda: _from_some_page(address.where), False)


def source_at(address: Address) -> Source:
    """The sidecar of a socket."""
    said = bool(address.said_by)
    return Source(address.where, address, lambda: from_socket(address), said)


def _from_some_page(socket: str) -> dict[str, Any]:
    try:
        return from_url(PAGE)
    except ConfigInvalid as error:
        raise ConfigInvalid(
            f"no sidecar answers: there is no socket {socket}, and at {PAGE}: "
            f"{short_words(str(error))}; say which one with --socket, KVIST_SOCKET or --url"
        ) from None


def from_url(url: str) -> dict[str, Any]:
    """What a sidecar's page says. Raises: ConfigInvalid."""
    if not url.startswith(("http://", "https://")):
        raise ConfigInvalid(f"--url: {url!r} does not begin with http://")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/stats.json", timeout=TIMEOUT_S) as answer:
            document = json.load(answer)
    except urllib.error.URLError as error:
        why = getattr(error.reason, "strerror", None) or error.reason
        raise ConfigInvalid(f"--url: no sidecar answers at {url}: {why}") from None
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"--url: no sidecar answers at {url}: {error}") from None
    if not isinstance(document, dict) or "tiers" not in document:
        raise ConfigInvalid(f"--url: what answers at {url} is no kvistd")
    return document


def from_socket(where: str | Address) -> dict[str, Any]:
    """What a sidecar says over gRPC, as its page does. Raises: ConfigInvalid."""
    from kvist.proto import cache_pb2

    with Door(where) as door:
        reply = door.call("Stats", cache_pb2.StatsRequest(document=True), TIMEOUT_S)
    if reply.document:
        document: dict[str, Any] = json.loads(reply.document)
        return document
    return {  # an older sidecar
        "boot_epoch": reply.boot_epoch.hex(),
        "uptime_s": reply.uptime_s,
        "tiers": [
            {field.name: getattr(tier, field.name) for field in tier.DESCRIPTOR.fields}
            for tier in reply.tiers
        ],
        "sessions": reply.sessions,
        "reserved_slots": reply.reserved_slots,
        "requested_tokens": reply.requested_tokens,
        "hit_tokens": dict(reply.hit_tokens),
        "miss_tokens": dict(reply.miss_tokens),
        "blocks": reply.blocks,
        "workers": [{"client": one.client, "rates": dict(one.rates)} for one in reply.workers],
    }


def as_tables(document: Mapping[str, Any]) -> str:
    """For people, 80 columns."""
    return "\n".join(
        [
            f"up {document['uptime_s']:.0f} s, {counted(document['sessions'], 'worker')}, "
            f"{counted(document['blocks'], 'block')}, "
            f"{counted(document['reserved_slots'], 'slot')} being filled",
            "",
            *_tiers(document["tiers"]),
            "",
            *_tokens(document),
            "",
            *_workers(document["workers"]),
            *_worth(document.get("worth", ())),
            *_tenants(document.get("tenants", ())),
            *_advice(document),
        ]
    )


def _tiers(tiers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["tier   state          slots      used  used %      size  evicted  written"]
    for tier in tiers:
        slots, used = int(tier["slots"]), int(tier["used_slots"])
        size = format_bytes(slots * int(tier["slot_bytes"]))
        lines.append(
            f"{tier['tier']:6} {tier['state']:10} {slots:9} {used:9} {_percent(used, slots):>7}"
            f" {size:>9} {tier['evicted_blocks']:8} {tier['written_blocks']:8}"
        )
    return lines


def _tokens(document: Mapping[str, Any]) -> list[str]:
    requested = int(document["requested_tokens"])
    lines = [f"{requested} prompt tokens asked for"]
    for what, counts in (("hit", document["hit_tokens"]), ("miss", document["miss_tokens"])):
        for name, tokens in sorted(counts.items(), key=lambda item: -int(item[1])):
            if int(tokens):
                share = _percent(int(tokens), requested)
                lines.append(f"  {what:5} {name:18} {int(tokens):14} {share:>7}")
    return lines


def _workers(workers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rates and break-even lengths, as each worker measured them."""
    if not workers:
        return ["no worker is attached, so there are no rates"]
    lines = ["measured by      load GB/s  store  prefill tokens/s at  loading pays from"]
    lines.append("                dram  flash   dram    512   2048   8192     dram    flash")
    for worker in workers:
        rates: Mapping[str, int] = {name: int(value) for name, value in worker["rates"].items()}
        dram, flash, store = (
            _giga(rates.get(name))
            for name in (
                "load_bytes_per_s.dram",
                "load_bytes_per_s.flash",
                "store_bytes_per_s.dram",
            )
        )
        prefill = "".join(f"{rates.get(f'prefill_tokens_per_s.{n}', '-'):>7}" for n in _PREFILLS)
        pays = [_length(rates.get(f"break_even_tokens.{tier}")) for tier in ("dram", "flash")]
        lines.append(
            f"{worker['client'][:13]:13}{dram:>7}{flash:>7}{store:>7}{prefill}"
            f"{pays[0]:>9}{pays[1]:>9}"
        )
    return lines


def _worth(tiers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each tier saved and cost."""
    if not tiers:
        return []
    lines = ["", "worth it       saved tokens   prefill saved - loading - storing =     net"]
    for tier in tiers:
        saved, load, store, net = (float(tier[f"{x}_s"]) for x in ("saved", "load", "store", "net"))
        lines.append(
            f"{tier['tier']:12} {int(tier['saved_tokens']):14} {saved:13.1f} s {load:9.1f}"
            f" {store:9.1f} {net:9.1f} s"
        )
    return lines


def _tenants(tenants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Most asked first."""
    if not tenants:
        return []
    head = "tenant                requests      tokens  hit %  dram blocks  flash       net"
    lines = ["", head]
    for one in tenants[:TENANTS_SHOWN]:
        requested, held = int(one["requested_tokens"]), one["held_blocks"]
        hit = _percent(sum(map(int, one["hit_tokens"].values())), requested)
        lines.append(
            f"{one['tenant'][:20]:20} {int(one['lookups']):9} {requested:11} {hit:>7}"
            f" {int(held.get('dram', 0)):11} {int(held.get('flash', 0)):6}"
            f" {float(one['net_s']):7.0f} s"
        )
    if len(tenants) > TENANTS_SHOWN:
        lines.append(f"and {len(tenants) - TENANTS_SHOWN} more; --json has all")
    return lines


def _advice(document: Mapping[str, Any]) -> list[str]:
    """The page's health, and what to do."""
    if "health" not in document:
        return []
    lines = ["", str(document["health"])]
    for one in document.get("advice", ()):
        text = f"{one['level']:5} {one['what']} {one['do']}"
        lines += textwrap.wrap(text, 80, subsequent_indent=" " * 6)
    return lines


def _giga(bytes_per_s: int | None) -> str:
    return "-" if bytes_per_s is None else f"{bytes_per_s / 1e9:.2f}"


def _length(tokens: int | None) -> str:
    return "-" if tokens is None else "never" if tokens == NEVER else str(tokens)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
