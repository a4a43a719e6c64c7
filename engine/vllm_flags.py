"""Flags of vLLM that people paste: without meaning here they are noted, or refused with a reason.

A flag whose effect would be missed is refused: an answer or a figure that is silently another
one than asked for is worse than no start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple


class Foreign(NamedTuple):
    """A flag of vLLM's.

    Attributes:
        flags: its names.
        why: it has no effect, or is refused; for people.
        only: the values that are fine; () is any.
        takes_value: whether a value follows.
        refused: whether it is an error whatever its value.
    """

    flags: tuple[str, ...]
    why: str
    only: tuple[str, ...] = ()
    takes_value: bool = False
    refused: bool = False


def _word(flag: str, why: str) -> Foreign:
    return Foreign((flag,), why)


def _valued(flags: str, why: str, *only: str) -> Foreign:
    return Foreign(tuple(flags.split()), why, only, takes_value=True)


def _refused(flag: str, why: str, takes_value: bool = False) -> Foreign:
    return Foreign((flag,), why, (), takes_value, refused=True)


_TRUST = _word("--trust-remote-code", "no code that comes with a model is ever run")
_TOKENIZER_MODE = _valued("--tokenizer-mode", "there is one way to tokenize", "auto")
_ONE_DEVICE = "an engine computes on one device; start several behind a router, with one sidecar"
_ENGINE = (
    _TRUST,
    _TOKENIZER_MODE,
    _valued("--tensor-parallel-size -tp", _ONE_DEVICE, "1"),
    _valued("--pipeline-parallel-size -pp", _ONE_DEVICE, "1"),
    _valued("--data-parallel-size -dp", _ONE_DEVICE, "1"),
    _word("--disable-log-requests", "requests are logged with --log-level debug only"),
    _word("--enable-chunked-prefill", "prompts are always computed in chunks"),
    _refused(
        "--no-enable-chunked-prefill",
        "prompts are always computed in chunks; --max-num-batched-tokens says how long these are",
    ),
)
SERVE = (
    *_ENGINE,
    _refused("--tokenizer", "the one among the model's files is used", takes_value=True),
)
_OFFLINE = (
    *_ENGINE,
    _valued("--n", "one answer to each prompt is measured", "1"),
    _word("--disable-detokenize", "nothing is detokenized here"),
)
THROUGHPUT = (
    *_OFFLINE,
    _valued("--backend", "the engine in this process is measured, under vllm's name too", "vllm"),
    _valued("--tokenizer", "the one among the model's files is used"),
    _word("--async-engine", "the engine always runs on a thread of its own"),
)
LATENCY = _OFFLINE
BENCH_SERVE = (
    _TRUST,
    _TOKENIZER_MODE,
    _refused("--profile", "it starts a profiler in vLLM's server; profile the server by itself"),
    _valued("--request-id-prefix", "requests are sent without ids"),
    _word("--disable-shuffle", "the order follows from --seed, and is the same in every run"),
    _word(
        "--skip-chat-template", "the benchmark applies no template, it sends prompts as they are"
    ),
    _valued("--n", "one answer to each prompt is measured", "1"),
)


def add_foreign_flags(parser: argparse.ArgumentParser, table: Sequence[Foreign]) -> None:
    """Have a parser answer to flags that it does not have; --help does not show them."""
    for row in table:
        parser.add_argument(
            *row.flags,
            action=_Answer,
            nargs=None if row.takes_value else 0,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
            row=row,
        )


class _Answer(argparse.Action):
    """Notes or refuses; leaves nothing in the namespace."""

    def __init__(self, *args: Any, row: Foreign, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._row = row

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        row = self._row
        given = f"{option_string} {values}" if row.takes_value else option_string
        if row.refused or (row.only and values not in row.only):
            parser.error(f"{given} is not supported: {row.why}")
        print(f"{parser.prog}: note: {given} has no effect: {row.why}", file=sys.stderr)
