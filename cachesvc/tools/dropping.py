"""`kvist cache evict`, `clear`, `pin` and `unpin`: what an operator wants gone, or kept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvist.cachesvc.tools.door import CLEAR_TIMEOUT_S, Door, add_door_flags, checked_namespace
from kvist.cachesvc.tools.progress import Bar
from kvist.cachesvc.tools.prompts import read_prompts
from kvist.cachesvc.tools.words import counted, parse_span
from kvist.proto.errors import ConfigInvalid
from kvist.proto.keys import BlockKey, block_keys

if TYPE_CHECKING:
    from kvist.proto import cache_pb2

EXIT_DONE, EXIT_NOTHING = 0, 1
STRENGTH_MAX = 100
TTL_MAX_S = 30 * 86400


def add_evict_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache evict`."""
    parser.add_argument("key", metavar="KEY", help="of a block, or its first hex digits")
    add_door_flags(parser)
    parser.add_argument(
        "--descendants", action="store_true", help="and what stands on it: longer prompts"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run_evict(flags: argparse.Namespace) -> int:
    """Drop and say how many. Raises: ConfigInvalid. BlockMissing: no such block."""
    from kvist.proto import cache_pb2

    dropped = 0
    bar = Bar(sys.stderr, "blocks")
    with Door(flags.socket) as door:
        request = cache_pb2.EvictRequest(key=door.key(flags.key), descendants=flags.descendants)
        try:
            more = True
            while more:
                reply = door.call("Evict", request)
                dropped, more = dropped + reply.dropped_blocks, reply.more
                bar.show(dropped, dropped + int(more))
        except KeyboardInterrupt:
            bar.clear()
            _say(flags.json, "dropped", dropped, "dropped, then interrupted: some are left")
            raise
        finally:
            bar.clear()
    _say(flags.json, "dropped", dropped, "dropped")
    return EXIT_DONE


def add_clear_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache clear`."""
    add_door_flags(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--namespace", metavar="HEX", help="only those that begin so")
    which.add_argument("--tenant", metavar="NAME", help="only this tenant's")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run_clear(flags: argparse.Namespace, ask: Callable[[str], str] = input) -> int:
    """Ask, drop and say how many.

    Returns: 0; 1 when the answer was no, or nothing fits.

    Raises: ConfigInvalid.
    """
    from kvist.proto import cache_pb2

    with Door(flags.socket) as door:
        spaces = _chosen(door.namespaces(), flags)
        blocks = sum(one.blocks for one in spaces)
        if not flags.yes:
            what = f"drop {counted(blocks, 'block')} of {counted(len(spaces), 'namespace')}"
            if not _is_agreed(f"{what} from every tier?", ask):
                return EXIT_NOTHING
        if not flags.namespace and not flags.tenant:
            wanted = [cache_pb2.ClearRequest()]
        else:
            wanted = [cache_pb2.ClearRequest(namespace=one.namespace) for one in spaces]
        dropped, bar = 0, Bar(sys.stderr, "namespaces")
        try:
            for done, request in enumerate(wanted):
                bar.show(done, len(wanted))
                dropped += door.call("Clear", request, CLEAR_TIMEOUT_S).dropped_blocks
        except KeyboardInterrupt:
            bar.clear()
            _say(flags.json, "dropped", dropped, f"dropped of {blocks}, then interrupted")
            raise
        finally:
            bar.clear()
    _say(flags.json, "dropped", dropped, "dropped")
    return EXIT_DONE if wanted else EXIT_NOTHING


def _chosen(
    spaces: Iterable[cache_pb2.NamespaceInfo], flags: argparse.Namespace
) -> list[cache_pb2.NamespaceInfo]:
    digits = checked_namespace(flags.namespace)
    return [
        one
        for one in spaces
        if one.namespace.hex().startswith(digits)
        and (not flags.tenant or one.tenant == flags.tenant)
    ]


def _is_agreed(what: str, ask: Callable[[str], str]) -> bool:
    if not sys.stdin.isatty():
        raise ConfigInvalid("--yes: say it, as there is no terminal to ask")
    return ask(f"{what} [y/N] ").strip().lower() in ("y", "yes")


def add_pin_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache pin`."""
    add_unpin_flags(parser)
    parser.add_argument(
        "--ttl", default="1h", metavar="TIME", help="after which it ends, at most 30d (%(default)s)"
    )
    parser.add_argument(
        "--strength",
        type=int,
        default=4,
        metavar="N",
        help=f"how often each block is passed over, 1 to {STRENGTH_MAX} (%(default)s)",
    )


def add_unpin_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache unpin`."""
    parser.add_argument(
        "key",
        metavar="KEY",
        nargs="?",
        help="of a block, or its first hex digits: it and the blocks before it",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines of token ids, instead of KEY: the blocks of these prompts",
    )
    parser.add_argument("--namespace", metavar="HEX", help="of the prompts; default: the only one")
    add_door_flags(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run_pin(flags: argparse.Namespace) -> int:
    """Pin and say how many blocks. Returns: 0; 1 when none is pinned. Raises: ConfigInvalid."""
    from kvist.proto import cache_pb2

    ttl_s = parse_span("--ttl", flags.ttl)
    if not 1 <= ttl_s <= TTL_MAX_S:
        raise ConfigInvalid(f"--ttl: {flags.ttl} is out of range; give 1s to 30d")
    if not 1 <= flags.strength <= STRENGTH_MAX:
        raise ConfigInvalid(f"--strength: {flags.strength}; give 1 to {STRENGTH_MAX}")
    pinned = wanted = 0
    with Door(flags.socket) as door:
        for keys in _chains(door, flags):
            request = cache_pb2.PinRequest(keys=keys, ttl_s=ttl_s, strength=flags.strength)
            pinned += door.call("Pin", request).pinned
            wanted += len(keys)
    _say(
        flags.json, "pinned", pinned,
        f"pinned for {flags.ttl}, of {wanted}; what is not stored, or over the budget "
        "(pin_bytes), is not" if pinned < wanted else f"pinned for {flags.ttl}",
    )  # fmt: skip
    return EXIT_DONE if pinned else EXIT_NOTHING


def run_unpin(flags: argparse.Namespace) -> int:
    """End pins and say how many. Raises: ConfigInvalid. BlockMissing."""
    from kvist.proto import cache_pb2

    with Door(flags.socket) as door:
        unpinned = sum(
            door.call("Unpin", cache_pb2.UnpinRequest(keys=keys)).unpinned
            for keys in _chains(door, flags)
        )
    _say(flags.json, "unpinned", unpinned, "unpinned")
    return EXIT_DONE


def _chains(door: Door, flags: argparse.Namespace) -> list[list[BlockKey]]:
    """Keys of the prompts that are named, first block first."""
    from kvist.proto import cache_pb2

    if (flags.key is None) == (flags.prompts is None):
        raise ConfigInvalid("KEY: give a key, or --prompts FILE, and not both")
    if flags.key is not None:
        reply = door.call("Show", cache_pb2.ShowRequest(key=door.key(flags.key)))
        return [[BlockKey(key) for key in reply.chain]]
    return keys_of_file(door, Path(flags.prompts), flags.namespace)


def keys_of_file(door: Door, path: Path, namespace: str | None) -> list[list[BlockKey]]:
    """Keys of each prompt of token ids in a file. Raises: ConfigInvalid."""
    space = door.namespace(namespace)
    chains = []
    for line in read_prompts(path):
        if line.tokens is None:
            raise ConfigInvalid(
                f"FILE: {path}, line {line.number} has no token ids; /tokenize of a server "
                "makes them"
            )
        chains.append(block_keys(space.namespace, line.tokens, space.block_tokens))
    return chains


def _say(as_json: bool, name: str, number: int, words: str) -> None:
    print(json.dumps({name: number}) if as_json else f"{counted(number, 'block')} {words}")
