"""Wear: how much may be written to flash, and how much was, over all lives of a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

AdmissionMode = Literal["always", "second_use"]
ADMISSIONS: tuple[AdmissionMode, ...] = ("always", "second_use")
DAY_S = 86400.0
# The burst when nothing is said: an hour's worth.
BURST_SHARE = 24
BOOK_NAME = "wear.json"
BOOK_S = 60.0


class WriteBudget:
    """A token bucket of bytes; full at the start.

    Args:
        bytes_per_day: how fast it fills; None is no limit.
        burst_bytes: how much it holds; None is an hour's worth.
        now: clock, seconds.
    """

    def __init__(
        self, bytes_per_day: int | None, burst_bytes: int | None, now: Callable[[], float]
    ) -> None:
        self.bytes_per_day = bytes_per_day
        self._rate = None if bytes_per_day is None else bytes_per_day / DAY_S
        self._burst = float(burst_bytes or (bytes_per_day or 0) // BURST_SHARE)
        self._now = now
        self._level = self._burst
        self._at_s = now()

    @property
    def left_bytes(self) -> int | None:
        """What may be written now; None without a limit."""
        if self._rate is None:
            return None
        now_s = self._now()
        self._level = min(self._burst, self._level + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        return int(self._level)

    def spend(self, count_bytes: int) -> None:
        """So much is being written; not more than left_bytes said."""
        if self._rate is not None:
            self._level -= count_bytes

    def start_with(self, left_bytes: int) -> None:
        """An earlier life had left so much; a restart is no new burst."""
        self._level = min(self._burst, float(left_bytes))


@dataclass(frozen=True, slots=True)
class Wear:
    """Bytes written to flash, whole slots.

    Attributes:
        written_bytes: in this life. folder_bytes: in all lives of the folder.
        left_bytes: what the budget allows now; None without a limit.
        bytes_per_day: that it allows; None without a limit.
    """

    written_bytes: int
    folder_bytes: int
    left_bytes: int | None
    bytes_per_day: int | None = None


class WearBook:
    """A small file in the flash folder. What it cannot read or write costs a figure, no more.

    Args:
        folder: of the flash tier.

    Attributes:
        earlier_bytes: written in earlier lives, 0 when the book is new or was not read.
        left_bytes: of the budget at the end of the life before; None when it had no limit.
    """

    def __init__(self, folder: Path) -> None:
        self.earlier_bytes = 0
        self.left_bytes: int | None = None
        self._path = folder / BOOK_NAME
        self._saved_bytes = 0
        self._due_s = 0.0
        self._is_read = False

    def read(self) -> None:
        """Read what is in it, once; before that, and so in a folder of others, none is saved."""
        if self._is_read:
            return
        self._is_read = True
        with suppress(OSError, ValueError, KeyError, TypeError):
            page = json.loads(self._path.read_text())
            left = page["budget_left_bytes"]
            self.earlier_bytes = int(page["written_bytes"])
            self.left_bytes = None if left is None else int(left)

    def is_due(self, now_s: float, written_bytes: int) -> bool:
        """Whether to save now: something was written, and the last time was a minute ago."""
        if written_bytes == self._saved_bytes or now_s < self._due_s:
            return False
        self._due_s = now_s + BOOK_S
        return True

    def save(self, written_bytes: int, left_bytes: int | None) -> None:
        """Write it anew; a crash leaves the old one or the new one.

        Args:
            written_bytes: in this life.
            left_bytes: of the budget.
        """
        if not self._is_read:
            return
        page = {
            "written_bytes": self.earlier_bytes + written_bytes,
            "budget_left_bytes": left_bytes,
        }
        fresh = self._path.with_suffix(".new")
        with suppress(OSError):
            fresh.write_text(json.dumps(page))
            os.replace(fresh, self._path)
            self._saved_bytes = written_bytes
