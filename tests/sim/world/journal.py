"""What happened in a world, for people who look into a seed."""

from __future__ import annotations

import io
from collections.abc import Callable

from kvist.cachesvc.log import Log


class Journal(Log):
    """Writes what happened for people who look into a seed; what the product logs, too."""

    def __init__(self, tell: Callable[[str], None] | None) -> None:
        super().__init__(io.StringIO())
        self._tell = tell

    def note(self, text: str) -> None:
        """A line of the world's own."""
        if self._tell is not None:
            self._tell(text)

    def _write(self, level: str, event: str, fields: dict[str, object]) -> None:
        if self._tell is not None:
            self._tell(f"    {level} {event} {fields}")
