"""Expiry: blocks of a tenant with a TTL are dropped when their time is over.

The time runs from when a block was stored, whatever it was used for since. When a block goes, so
do those that stand on it, though they may be younger. From one look to the next nobody finds them
any more; where they are many they are dropped piece by piece (placing/clearing). The slots are
overwritten as they are freed (placing/placement), and blocks with a TTL are never written to flash
(placing/admission), where nothing can promise that they are gone: an overwritten page of a disk
lives on in it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvist.cachesvc.catalog.trees import Rows, trees
from kvist.cachesvc.placing.placement import Placement

LOOK_S = 1.0


class Expiry:
    """When each block was stored, 4 bytes a row. One thread.

    Args:
        placement: the blocks.
        now: clock, seconds.
    """

    def __init__(self, placement: Placement, now: Callable[[], float]) -> None:
        self._placement = placement
        self._now = now
        self._began_s = now()
        self._look_at_s = self._began_s + LOOK_S
        has_ttl = any(limits.ttl is not None for limits in placement.tenancy.rules.values())
        self._stored_s = np.zeros(placement.index.rows if has_ttl else 0, np.uint32)

    def stored(self, row: int) -> None:
        """A block's time begins."""
        if len(self._stored_s):
            self._stored_s[row] = int(self._now() - self._began_s)

    def left_s(self, row: int) -> float | None:
        """Seconds until a block is dropped; None: its tenant has no TTL."""
        group = self._placement.group(row)
        if group is None or group.limits.ttl is None or not len(self._stored_s):
            return None
        age_s = self._now() - self._began_s - float(self._stored_s[row])
        return max(0.0, group.limits.ttl - age_s)

    def tick(self, now_s: float) -> None:
        """Once a second, what is over its time, and what stands on it, is found no more."""
        if not len(self._stored_s) or now_s < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_S
        old = self._old(int(now_s - self._began_s))
        if len(old):
            rows = trees(self._placement.blocks, old)
            self._placement.counts.expired += len(rows)
            self._placement.drop_trees(rows, "expired")

    def _old(self, age_s: int) -> Rows:
        """Blocks that are over their time; age_s is that of the first ones."""
        blocks, tenancy = self._placement.blocks, self._placement.tenancy
        ttls = {
            number: group.limits.ttl
            for number, namespace in blocks.spaces.items()
            if (group := tenancy.group(namespace)) is not None and group.limits.ttl is not None
        }
        least = min(ttls.values(), default=age_s + 1)
        if least > age_s:
            return np.zeros(0, np.int64)
        is_stored = blocks.spaces_of(slice(None)) >= 0
        rows = np.flatnonzero(is_stored & (self._stored_s <= age_s - least))
        numbers = np.array(sorted(ttls), np.int64)
        spaces = blocks.spaces_of(rows)
        at = np.searchsorted(numbers, spaces).clip(max=len(numbers) - 1)
        limits = np.array([ttls[number] for number in numbers.tolist()], np.int64)
        is_old = (numbers[at] == spaces) & (self._stored_s[rows] <= age_s - limits[at])
        old: Rows = rows[is_old]
        return old
