"""`kvist cache ls` and `kvist cache show`: which prefixes are stored, and all about a block."""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kvist.cachesvc.tools.door import Door, add_door_flags, checked_namespace
from kvist.cachesvc.tools.progress import Bar
from kvist.cachesvc.tools.words import count, counted, day, span
from kvist.proto.errors import ConfigInvalid
from kvist.proto.sizes import format_bytes

if TYPE_CHECKING:
    from kvist.proto import cache_pb2

LIMIT = 40
KEY_DIGITS = 12
TOKENS_SHOWN = 16

# Column -> what to sort by; the largest comes first.
SORTS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "uses": lambda run: (run["uses"], -run["idle_s"]),
    "recent": lambda run: -run["idle_s"],
    "tokens": lambda run: run["prefix_tokens"] or run["depth"],
    "size": lambda run: run["bytes"],
    "key": lambda run: [-digit for digit in bytes.fromhex(run["key"])],
}


def add_ls_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache ls`."""
    add_door_flags(parser)
    parser.add_argument(
        "--sort", choices=tuple(SORTS), default="uses", help="largest first (%(default)s)"
    )
    parser.add_argument("--reverse", action="store_true", help="smallest first")
    parser.add_argument(
        "--limit", type=int, default=LIMIT, metavar="N", help="lines, 0: all (%(default)s)"
    )
    parser.add_argument("--namespace", metavar="HEX", help="only of namespaces that begin so")
    parser.add_argument("--tenant", metavar="NAME", help="only of this tenant")
    parser.add_argument("--tier", choices=("dram", "flash"), help="only with a copy there")
    parser.add_argument("--pinned", action="store_true", help="only with pinned blocks")
    parser.add_argument(
        "--min-uses", type=int, default=0, metavar="N", help="only used so often (%(default)s)"
    )
    parser.add_argument(
        "--min-tokens", type=int, default=0, metavar="N", help="only prefixes so long (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run_ls(flags: argparse.Namespace) -> int:
    """List and print. Raises: ConfigInvalid."""
    for flag, most in (("limit", 1 << 32), ("min_uses", (1 << 31) - 1), ("min_tokens", 1 << 32)):
        if not 0 <= getattr(flags, flag) <= most:
            raise ConfigInvalid(f"--{flag.replace('_', '-')}: give 0 to {most}")
    listing = Listing()
    with Door(flags.socket) as door:
        kept, matched = _best(_wanted(listing.read(door, flags), flags), flags)
    document = {
        "runs": kept,
        "matched": matched,
        "namespaces": [namespace_document(one) for one in listing.spaces.values()],
    }
    print(json.dumps(document) if flags.json else as_table(document))
    return 0


class Listing:
    """Pages of a sidecar, as documents.

    Attributes:
        spaces: digest -> what the sidecar says of the namespace.
    """

    def __init__(self) -> None:
        self.spaces: dict[bytes, cache_pb2.NamespaceInfo] = {}

    def read(self, door: Door, flags: argparse.Namespace) -> Iterable[dict[str, Any]]:
        """Every run that the sidecar lists; a bar shows how far."""
        bar = Bar(sys.stderr, "rows")
        asked = {
            "namespace": checked_namespace(flags.namespace),
            "tenant": flags.tenant or "",
            "min_uses": flags.min_uses,
        }
        try:
            for page in door.pages(**asked):
                self.spaces |= {one.namespace: one for one in page.namespaces}
                for run in page.runs:
                    yield run_document(run, self.spaces.get(run.namespace), page.slot_bytes)
                bar.show(page.next_page_token or page.rows, page.rows)
        finally:
            bar.clear()


def run_document(
    run: cache_pb2.Run, space: cache_pb2.NamespaceInfo | None, slot_bytes: int
) -> dict[str, Any]:
    """A run with its tokens and bytes; tokens are 0 where the length of a block is not known."""
    block_tokens = space.block_tokens if space else 0
    return {
        "key": run.key.hex(),
        "namespace": run.namespace.hex(),
        "tenant": space.tenant if space else "",
        "depth": run.depth,
        "prefix_tokens": run.depth * block_tokens,
        "blocks": run.blocks,
        "tokens": run.blocks * block_tokens,
        "bytes": run.blocks * slot_bytes,
        "dram_blocks": run.dram_blocks,
        "flash_blocks": run.flash_blocks,
        "pinned_blocks": run.pinned_blocks,
        "uses": run.uses,
        "idle_s": run.idle_s,
        "branches": run.branches,
    }


def namespace_document(space: cache_pb2.NamespaceInfo) -> dict[str, Any]:
    """The fields of NamespaceInfo, the digest in hex."""
    fields = {field.name: getattr(space, field.name) for field in space.DESCRIPTOR.fields}
    return {**fields, "namespace": space.namespace.hex()}


def _wanted(runs: Iterable[dict[str, Any]], flags: argparse.Namespace) -> Iterable[dict[str, Any]]:
    for run in runs:
        has_tier = not flags.tier or run[f"{flags.tier}_blocks"]
        has_pin = not flags.pinned or run["pinned_blocks"]
        if has_tier and has_pin and run["prefix_tokens"] >= flags.min_tokens:
            yield run


def _best(
    runs: Iterable[dict[str, Any]], flags: argparse.Namespace
) -> tuple[list[dict[str, Any]], int]:
    """The first ones in order, and how many there are; keeps no more than it shows."""
    seen = 0

    def counted() -> Iterable[dict[str, Any]]:
        nonlocal seen
        for run in runs:
            seen += 1
            yield run

    key = SORTS[flags.sort]
    if not flags.limit:
        return sorted(counted(), key=key, reverse=not flags.reverse), seen
    choose = heapq.nsmallest if flags.reverse else heapq.nlargest
    return choose(flags.limit, counted(), key=key), seen


def as_table(document: Mapping[str, Any]) -> str:
    """For people, 80 columns."""
    runs = document["runs"]
    if not runs:
        return "no prefix is stored that fits"
    lines = ["key            prefix  blocks   dram  flash      size   uses   used pin whose"]
    for run in runs:
        prefix = count(run["prefix_tokens"]) if run["prefix_tokens"] else "-"
        whose = run["tenant"] or run["namespace"][:8]
        lines.append(
            f"{run['key'][:KEY_DIGITS]:12} {prefix:>8} {count(run['blocks']):>7}"
            f" {_copies(run, 'dram'):>6} {_copies(run, 'flash'):>6}"
            f" {format_bytes(run['bytes']):>9} {count(run['uses']):>6} {span(run['idle_s']):>6}"
            f" {'yes' if run['pinned_blocks'] else '-':3} {whose[:10]}"
        )
    unsaid = document["matched"] - len(runs)
    if unsaid:
        lines.append(f"and {unsaid} more; --limit 0 shows all, other flags choose")
    return "\n".join(lines)


def _copies(run: Mapping[str, Any], tier: str) -> str:
    copies = run[f"{tier}_blocks"]
    return "all" if copies == run["blocks"] else count(copies) if copies else "-"


def add_show_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache show`."""
    parser.add_argument("key", metavar="KEY", help="of a block, or its first hex digits")
    add_door_flags(parser)
    parser.add_argument("--tokens", action="store_true", help="show its token ids")
    parser.add_argument(
        "--verify", action="store_true", help="read its copy on flash, too, and compare checksums"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run_show(flags: argparse.Namespace) -> int:
    """Ask and print.

    Returns: 0; 1 when a copy is damaged.

    Raises: ConfigInvalid. BlockMissing: no such block.
    """
    from kvist.proto import cache_pb2

    with Door(flags.socket) as door:
        request = cache_pb2.ShowRequest(
            key=door.key(flags.key), tokens=flags.tokens, verify=flags.verify
        )
        reply = door.call("Show", request, timeout_s=60.0)
    document = show_document(reply)
    print(json.dumps(document) if flags.json else as_text(document))
    return int(any(copy["checksum"] == "wrong" for copy in document["copies"]))


def show_document(reply: cache_pb2.ShowReply) -> dict[str, Any]:
    """The fields of ShowReply, keys in hex; null where something is not known."""
    return {
        "key": reply.name.key.hex(),
        "parent": reply.name.parent.hex() if reply.depth else None,
        "namespace": namespace_document(reply.namespace),
        "depth": reply.depth,
        "first_token": reply.depth * reply.namespace.block_tokens,
        "chain": [key.hex() for key in reply.chain],
        "copies": [
            {
                "tier": copy.tier,
                "slot": copy.slot,
                "state": copy.state,
                "generation": copy.generation if copy.HasField("generation") else None,
                "checksum": copy.checksum,
            }
            for copy in reply.copies
        ],
        "uses": reply.uses,
        "idle_s": reply.idle_s,
        "children": reply.children,
        "pinned_s": reply.pinned_s,
        "pin_lives": dict(reply.pin_lives),
        "expires_s": reply.expires_s if reply.HasField("expires_s") else None,
        "created_s": reply.created_s or None,
        "payload_bytes": reply.payload_bytes or None,
        "tokens": list(reply.tokens) or None,
    }


def as_text(document: Mapping[str, Any]) -> str:
    """For people."""
    space, first = document["namespace"], document["first_token"]
    last = first + space["block_tokens"]
    chain = [key[:KEY_DIGITS] for key in document["chain"][:-1]]
    before = ", ".join(chain) if len(chain) <= 6 else f"{', '.join(chain[:5])} ... {chain[-1]}"
    lives = ", ".join(f"{tier} {left}" for tier, left in sorted(document["pin_lives"].items()))
    pinned = f"{span(document['pinned_s'])} more, passed over: {lives}"
    lines = [
        f"key         {document['key']}",
        f"namespace   {space['namespace']}",
        f"tenant      {space['tenant'] or 'none, the common pool'}",
        f"position    block {document['depth']} of its prompt, tokens {first} to {last - 1}",
        f"before it   {before or 'nothing, it is a first block'}",
        f"after it    {counted(document['children'], 'block')}",
    ]
    for copy in document["copies"]:
        generation = "" if copy["generation"] is None else f", generation {copy['generation']}"
        lines.append(
            f"{copy['tier']:11} slot {copy['slot']}, {copy['state']}{generation}, checksum "
            f"{copy['checksum']}"
        )
    lines += [
        f"used        {counted(document['uses'], 'time')} since it was stored, last "
        f"{span(document['idle_s'])} ago",
        f"pinned      {pinned if document['pinned_s'] else 'no'}",
        "expires     "
        + ("never" if document["expires_s"] is None else f"in {span(document['expires_s'])}"),
    ]
    if document["created_s"]:
        size = format_bytes(document["payload_bytes"])
        lines.append(f"stored      {day(document['created_s'])}, {size} of KV")
    if document["tokens"] is not None:
        lines.append(f"tokens      {' '.join(map(str, document['tokens']))}")
    return "\n".join(lines)
