"""The parser of every subcommand: it complains itself, and names the flag that was meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that does not leave what it does not know to the parser above it, which
    would show its own usage, without the subcommand's flags."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """See argparse; nothing is ever left over."""
        flags, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return flags, unknown

    def _meant(self, unknown: Sequence[str]) -> str:
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
        known = [flag for action in shown for flag in action.option_strings]
        meant = {
            flag: near
            for word in unknown
            if word.startswith("-")
            for flag in (word.partition("=")[0],)
            for near in difflib.get_close_matches(flag, known, n=1)
        }
        return "".join(f"; for {flag}, did you mean {near}?" for flag, near in meant.items())
