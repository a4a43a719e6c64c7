"""`kvist cache stats`: what a running sidecar holds and serves, and from which length it pays."""

from __future__ import annotations

import argparse
import json
import textwrap
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

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
        help="of the sidecar: its socket's path, or host:port",
    )
    where.add_argument("--url", default=PAGE, help="of its page (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run_stats(flags: argparse.Namespace) -> int:
    """Ask and print.

    Raises:
        ConfigInvalid: nobody answers there.
    """
    document = from_socket(flags.socket) if flags.socket else from_url(flags.url)
    print(json.dumps(document) if flags.json else as_tables(document))
    return 0


def from_url(url: str) -> dict[str, Any]:
    """What a sidecar's page says. Raises: ConfigInvalid."""
    if not url.startswith(("http://", "https://")):
        raise ConfigInvalid(f"--url: {url!r} does not begin with http://")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/stats.json", timeout=TIMEOUT_S) as answer:
            document = json.load(answer)
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"--url: no sidecar answers at {url}: {error}") from None
    if not isinstance(document, dict) or "tiers" not in document:
        raise ConfigInvalid(f"--url: what answers at {url} is no kvistd")
    return document


def from_socket(where: str) -> dict[str, Any]:
    """What a sidecar says over gRPC, as its page does. Raises: ConfigInvalid."""
    # Here: the other subcommands need no gRPC, which takes 0.2 s to import.
    import grpc

    from kvist.proto import cache_pb2, cache_pb2_grpc

    address = f"unix:{where}" if where.startswith("/") else where
    # A pool of its own: the next channel does not wait out the pause after this one's failure.
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            reply = cache_pb2_grpc.CacheStub(channel).Stats(
                cache_pb2.StatsRequest(document=True), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise ConfigInvalid(
                f"--socket: no sidecar answers at {where}: {error.details()}"
            ) from None
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
            f"up {document['uptime_s']:.0f} s, {document['sessions']} workers, "
            f"{document['blocks']} blocks, {document['reserved_slots']} slots being filled",
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
