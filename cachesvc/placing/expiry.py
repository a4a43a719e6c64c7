"""Expiry: blocks of a tenant with a TTL are dropped when their time is over.

The time runs from when a block was stored, whatever it was used for since. When a block goes, so
do those that stand on it, though they may be younger. The slots are overwritten as they are freed
(placing/placement), and blocks with a TTL are never written to flash (placing/admission),
where nothing can promise that they are gone: an overwritten page of a disk lives on in it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvist.cachesvc.placing.placement import Placement

LOOK_S = 1.0
# Dropped in one look: 256 slots of 1 MiB are 30 ms of overwriting.
EXPIRED_MAX = 256


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
        """Once a second, drop what is over its time, at most EXPIRED_MAX blocks and their trees."""
        if not len(self._stored_s) or now_s < self._look_at_s:
            return
        placement, blocks = self._placement, self._placement.blocks
        age_s = int(now_s - self._began_s)
        budget = EXPIRED_MAX
        for namespace in blocks.namespaces():
            group = placement.tenancy.group(namespace)
            if group is None or group.limits.ttl is None:
                continue
            rows = np.array(blocks.in_namespace(namespace)[::-1], np.int64)  # parents first
            old = rows[age_s - self._stored_s[rows].astype(np.int64) >= group.limits.ttl]
            for row in old[:budget].tolist():
                if not placement.index.is_free(row):  # it did not go with its parent
                    placement.counts.expired += placement.drop_tree(row, "expired")
            budget -= min(budget, len(old))
        self._look_at_s = now_s + (LOOK_S if budget else 0.0)
