"""A progress bar on stderr, and only on a terminal."""

from __future__ import annotations

import time
from typing import TextIO

_WIDTH = 32
_EVERY_S = 0.1


class Bar:
    """A progress bar on a terminal; nothing elsewhere.

    Args:
        stream: of the terminal.
        unit: what is counted, in the plural.
    """

    def __init__(self, stream: TextIO, unit: str) -> None:
        self._stream = stream
        self._unit = unit
        self._shows = stream.isatty()
        self._shown_s = 0.0

    def show(self, done: int, total: int) -> None:
        """So far."""
        now_s = time.monotonic()
        if self._shows and (now_s - self._shown_s >= _EVERY_S or done == total):
            self._shown_s = now_s
            full = _WIDTH * min(done, total) // max(1, total)
            bar = "#" * full + "." * (_WIDTH - full)
            self._stream.write(f"\r[{bar}] {done}/{total} {self._unit}\x1b[K")
            self._stream.flush()

    def clear(self) -> None:
        """Take it away."""
        if self._shows and self._shown_s:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
