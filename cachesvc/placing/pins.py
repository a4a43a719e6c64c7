"""Pins: blocks that are passed over when room is made, for a while and within a budget.

A pin is a priority, never a promise: a hard one wedges a cache that is full of them. It has

    strength   how often the block is passed over. Each time it comes up for eviction one is used
               up, and it comes up again when half of the tier has been evicted meanwhile; so a pin
               decays with what goes on around it
    TTL        after which it is as if it had never been
    budget     blocks that are pinned at once; what is over it is not pinned

Where nothing else may go, pinned blocks go. Damage, Clear, a tenant's TTL and his own quota take
no notice of pins. 6 bytes a row, from the first pin on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

TTL_DEFAULT_S = 3600
TTL_MAX_S = 30 * 86400
STRENGTH_DEFAULT = 4
STRENGTH_MAX = 100
BUDGET_SHARE = 4
TIERS = ("dram", "flash")


class Pins:
    """Which rows are pinned. One thread.

    Attributes:
        count: blocks pinned now; those whose TTL is over count until they are looked at.

    Args:
        rows: row numbers are below this.
        budget: blocks pinned at once.
        now: clock, seconds.
    """

    def __init__(self, rows: int, budget: int, now: Callable[[], float]) -> None:
        self.count = 0
        self._rows = rows
        self._budget = budget
        self._now = now
        self._began_s = now()
        self._until_s = np.zeros(0, np.uint32)  # since _began_s, rounded up; 0 is not pinned
        self._lives: dict[str, bytearray] = {}

    def pin(self, rows: Iterable[int], ttl_s: int, strength: int) -> int:
        """Pin blocks, or pin them anew.

        Args:
            rows: first blocks first, as the budget may end before they do.
            ttl_s: 1 to TTL_MAX_S. strength: 1 to STRENGTH_MAX.

        Returns: how many are pinned of them.
        """
        if not len(self._until_s):
            self._until_s = np.zeros(self._rows, np.uint32)
            self._lives = {tier: bytearray(self._rows) for tier in TIERS}
        until_s = self._elapsed_s() + ttl_s + 1
        self._forget_expired()
        pinned = 0
        for row in rows:
            if not self._until_s[row]:
                if self.count >= self._budget:
                    break
                self.count += 1
            self._until_s[row] = until_s
            for lives in self._lives.values():
                lives[row] = strength
            pinned += 1
        return pinned

    def unpin(self, rows: Iterable[int]) -> int:
        """End pins; how many there were."""
        before = self.count
        for row in rows:
            self.forget(row)
        return before - self.count

    def forget(self, row: int) -> None:
        """The block is gone, or its pin is over."""
        if self.count and self._until_s[row]:
            self._until_s[row] = 0
            self.count -= 1

    def spares(self, tier: str, row: int) -> bool:
        """Whether a block that comes up for eviction is passed over once more."""
        if not self.count or not self._until_s[row]:
            return False
        if self._until_s[row] <= self._elapsed_s():
            self.forget(row)
            return False
        lives = self._lives[tier]
        if not lives[row]:
            return False
        lives[row] -= 1
        return True

    def are_pinned(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows are pinned now."""
        if not self.count:
            return np.zeros(len(rows), np.bool_)
        return self._until_s[rows] > self._elapsed_s()

    def pin_of(self, row: int) -> tuple[float, dict[str, int]]:
        """Seconds that a block's pin still holds, 0 without one; and its lives left, by tier."""
        left_s = int(self._until_s[row]) - self._elapsed_s() if self.count else 0
        if left_s <= 0:
            return 0.0, {}
        return float(left_s), {tier: lives[row] for tier, lives in self._lives.items()}

    def _elapsed_s(self) -> int:
        return int(self._now() - self._began_s)

    def _forget_expired(self) -> None:
        over = (self._until_s > 0) & (self._until_s <= self._elapsed_s())
        self.count -= int(np.count_nonzero(over))
        self._until_s[over] = 0
