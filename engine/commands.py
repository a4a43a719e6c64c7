"""What a subcommand of `kvist` is."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand.

    Attributes:
        name: as typed.
        text: one line of help.
        add_flags: adds its arguments to a parser.
        run: does it, returns the exit code; may raise KvistError.
    """

    name: str
    text: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


@dataclass(frozen=True, slots=True)
class Group:
    """Subcommands with a name before theirs; the fields are as in Command."""

    name: str
    text: str
    commands: tuple[Command, ...]


def later(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A run that imports what it needs only when it is called."""

    def run(flags: argparse.Namespace) -> int:
        code: int = getattr(importlib.import_module(module), function)(flags)
        return code

    return run
