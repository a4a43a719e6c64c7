"""docs/cli.md, made from the parsers: `python -m kvist.engine.cli_page docs/cli.md`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

from kvist.engine.cli import build_parser

_INTRODUCTION = """# The command line

Made by `python -m kvist.engine.cli_page docs/cli.md` from the parsers; a test keeps it fresh.

`pip install .` in a checkout brings `kvistd` and of `kvist` what an operator needs: `kvist cache
...` and `kvist top`. `serve`, `chat`, `demo`, `eval` and `bench` need the engine, `'.[engine]'`,
and say so.

## Which tool for what

| question | command |
|---|---|
| is it worth it, and why do requests miss? | `kvist top`, `kvist cache stats` |
| what is stored, and what of it is used? | `kvist cache ls`, then `kvist cache show KEY` |
| what would more memory bring? | `kvist top`, tab 3; `kvist cache replay TRACE` offline |
| is this host set up well? | `kvist cache doctor` |
| is the flash folder sound? | `kvist cache verify PATH`, while no `kvistd` uses it |
| a deployment begins, and its prompts shall be fast at once | `kvist cache warm FILE`, `pin` |
| a tenant leaves, a prompt must go | `kvist cache clear --tenant NAME`, `evict KEY` |

A KEY names a block and with it the whole prefix up to there; its first hex digits are enough where
no other key begins so. `ls` shows runs: blocks of a prompt between two forks of the tree of
prompts. `prefix` is the tokens up to the end of the run, `blocks` those of the run alone, `size`
that of one copy, `uses` the requests that found it since it was stored, `whose`
the tenant or the first digits of the namespace. A listing of millions of blocks comes in pages,
between which the sidecar serves its workers; what comes, goes or forks meanwhile may be listed
twice or not at all.

`warm` sends each prompt to an engine with `max_tokens: 1` and `priority: batch` (vLLM wants a
number there: `--priority 1`, or an empty one), so that the engine computes and stores it, and asks
the sidecar in the end what it has. A line of its file is text, a list of token ids, or the body of
an OpenAI request. With `--prefetch` nothing is computed: what is on flash rises to DRAM.

`doctor` reads files below /proc and /sys, writes and reads 64 MiB in the flash folder for a second
each, and asks a running `kvistd`. It changes nothing. Each finding is ok, warn (slower or riskier
than need be) or bad (will not work), with the command that mends it.

`evict` and `clear` drop from every tier and take no notice of pins; misses of what went say
`cleared`. They forget, and do not erase: when they have answered nobody finds the blocks, also
after a restart, but a slot keeps its bytes until another block is written into it, in DRAM as on
flash. (Slots of a tenant with a `ttl` are overwritten, and are never on flash.) If the index of a
flash folder is lost or damaged, it is made anew from the slots: then cleared blocks whose slots
were not used again are back, for whoever sends the same prompt in the same namespace. To be rid of
what is on flash, stop `kvistd` and run `kvistd --clear-flash`. Whose blocks on flash are is known
after a restart of `kvistd` as soon as their tenant's next prompt begins, and not before:
`--namespace` works at once, `--tenant` from then on. Over TCP whoever reaches the sidecar may do
all of this, as with every other call: see `listen` in `kvistd --help`.

## For scripts

`--json` prints one object (`top`: one a line), on stdout; progress and errors go to stderr, and
progress only to a terminal. Fields may be added, none changes its meaning. Exit codes:

| code | meaning |
|---|---|
| 0 | done, and all is well |
| 1 | something is wrong or not there: a damaged copy, no such key, a bad finding |
| 2 | a flag is wrong, or nobody answers |
| 130 | interrupted by Ctrl-C; what was done is said before |
| 141 | whoever read the output went away, as in `kvist cache ls \\| head` |

"""
# Defaults that follow from the machine or the user.
_OWN = {
    "threads": "the cores that may be used",
    "cache_flash_path": "~/.cache/kvist/flash",
    "api_key": "$KVIST_API_KEY",
}
_LEFT_OUT = ("help", "version")


def page() -> str:
    """The page's text."""
    parser = build_parser()
    serve = {_row(action) for action in _shown(_subparsers(parser)["serve"])}
    return _INTRODUCTION + "\n".join(_commands(parser, (), serve))


def _subparsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action
        for action in parser._actions
        if action.dest not in _LEFT_OUT and action.help != argparse.SUPPRESS
    ]


def _commands(
    parser: argparse.ArgumentParser, words: Sequence[str], serve: Set[str]
) -> Iterator[str]:
    below = _subparsers(parser)
    for name, sub in below.items():
        if not words:
            yield f"## kvist {name}\n"
        yield from _commands(sub, [*words, name], serve)
    if below:
        return
    title = " ".join(["kvist", *words])
    if len(words) > 1:
        yield f"### {title}\n"
    text = parser.description or ""
    yield f"{text[:1].upper()}{text[1:]}.\n"
    yield f"    {_usage(parser, title)}\n"
    rows = [_row(action) for action in _shown(parser)]
    # The engine's own flags once, not with each command that has an engine in it.
    has_engine = words[0] == "bench" and len(serve & set(rows)) > len(serve) // 2
    own = [row for row in rows if row not in serve] if has_engine else rows
    if own:
        yield "| argument | meaning |\n|---|---|"
        yield from own
        yield ""
    if has_engine:
        yield "And those of `kvist serve` that say how the engine computes.\n"


def _usage(parser: argparse.ArgumentParser, title: str) -> str:
    places = [action for action in parser._actions if not action.option_strings]
    words = [
        f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar) for action in places
    ]
    return " ".join([title, *words, "[flags]"])


def _row(action: argparse.Action) -> str:
    return f"| {_name(action)} | {_help(action)} |"


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    value = ""
    if action.nargs != 0:
        choices = "\\|".join(map(str, action.choices)) if action.choices else ""
        value = f" {action.metavar or choices or action.dest.upper()}"
    return ", ".join(f"`{flag}`" for flag in action.option_strings) + value


def _help(action: argparse.Action) -> str:
    default = _OWN.get(action.dest, action.default)
    # Some releases of Python add this to the help of --x, --no-x.
    text = (action.help or "").removesuffix(" (default: %(default)s)")
    return text.replace("%(default)s", str(default)).replace("%%", "%").replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
