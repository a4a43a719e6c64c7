"""Wards: who may be evicted for whom. Quotas, floors and pins, around whatever ranks the blocks.

    quota    a group that fills its quota makes room among its own blocks, its oldest leaf first
    floor    while a group holds no more than its floor, others take nothing from it. A candidate
             that comes up for another group is parked; when the group grows over its floor, as
             many are candidates again, the first that came up first
    pin      a candidate that is pinned (placing/pins) is put aside until half of the tier has
             been evicted, or until there is no other

Usage is counted in slots: a block is in DRAM, on flash, or in both and counts in both, and a
reserved slot counts as if it were filled. Without rules and pins all of this costs a comparison.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.blocks import NO_ROW, Blocks
from kvist.cachesvc.placing.pins import Pins
from kvist.cachesvc.placing.tenancy import Group, Limits, Tenancy

# Candidates that one look over a group's blocks finds, as it costs 1 to 5 ms a million rows.
VICTIMS_MAX = 256

Limit = Callable[[Limits], int | None]
_QUOTAS: dict[str, Limit] = {"dram": lambda x: x.quota, "flash": lambda x: x.flash_quota}
_FLOORS: dict[str, Limit] = {"dram": lambda x: x.floor, "flash": lambda x: x.flash_floor}


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for all tiers."""

    tenancy: Tenancy
    pins: Pins


class Wards:
    """The rules of one tier. One thread.

    Attributes:
        spared: how often a pinned block was passed over.

    Args:
        tier: "dram" or "flash".
        blocks: of both tiers.
        rules: whose are limited, and which are pinned.
        slot_bytes: of the tier.
        may_go: whether a row's copy may go now.
        last_use: of rows, shape (n,), anything that grows with each use.
        slots: of the tier.
    """

    def __init__(  # noqa: PLR0913 - a filter between five others
        self,
        tier: Literal["dram", "flash"],
        blocks: Blocks,
        rules: Rules,
        slots: int,
        slot_bytes: int,
        may_go: Callable[[int], bool],
        last_use: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    ) -> None:
        self.spared = 0
        self._tier = tier
        self._blocks = blocks
        self._tenancy = rules.tenancy
        self._pins = rules.pins
        self._aside_for = max(1, slots // 2)
        self._aside: deque[tuple[int, int]] = deque()
        self._taken = 0
        self._slot_bytes = slot_bytes
        self._may_go = may_go
        self._last_use = last_use
        self._version = (-1, -1)
        self._by_group: dict[Group, list[int]] = {}
        self._victims: dict[Group, list[tuple[int, int]]] = {}
        self._parked: dict[Group, deque[int]] = {}

    def _slots(self, limit: int | None) -> int | None:
        return None if limit is None else limit // self._slot_bytes

    def used(self, group: Group) -> int:
        """Slots that a group fills, those that it has reserved included."""
        reserved = group.reserved if self._tier == "dram" else 0
        copies = self._blocks.copies[self._tier]
        return reserved + sum(copies.get(space, 0) for space in self._spaces(group))

    def _spaces(self, group: Group) -> list[int]:
        """Numbers of a group's namespaces that have blocks."""
        version = self._blocks.spaces_version, self._tenancy.version
        if version != self._version:
            self._version = version
            self._by_group = {}
            for space, namespace in self._blocks.spaces.items():
                owner = self._tenancy.group(namespace)
                if owner is not None:
                    self._by_group.setdefault(owner, []).append(space)
        return self._by_group.get(group, [])

    def is_full(self, group: Group | None) -> bool:
        """Whether a group may have another slot only in place of one of its own."""
        quota = None if group is None else self._slots(_QUOTAS[self._tier](group.limits))
        if group is None or quota is None:
            return False
        # A block on its way to flash counts there already, one on its way into DRAM does not.
        return self.used(group) + (self._tier == "dram") > quota

    def take(
        self,
        group: Group | None,
        candidate: Callable[[], int],
        offer: Callable[[int], None],
    ) -> int:
        """The block that goes for another one of a group.

        Args:
            group: that needs the room; None has no limits.
            candidate: takes out what the policy would drop next; NO_ROW when there is nothing.
            offer: puts a candidate back.

        Returns: its row; NO_ROW when nothing may go.
        """
        self._taken += 1
        if not self._tenancy.rules and not self._pins.count and not self._aside:
            return candidate()
        if group is not None and self.is_full(group):
            return self._own(group)
        self._unpark(group, offer)
        while self._aside and self._aside[0][0] <= self._taken:
            offer(self._aside.popleft()[1])
        row = self._unprotected(group, candidate, self._pins)
        if row == NO_ROW and self._aside:  # nothing else may go: a pin is no promise
            while self._aside:
                offer(self._aside.popleft()[1])
            row = self._unprotected(group, candidate, None)
        return row

    def _unprotected(
        self, group: Group | None, candidate: Callable[[], int], pins: Pins | None
    ) -> int:
        while (row := candidate()) != NO_ROW:
            owner = self._tenancy.group(self._blocks.namespace(row))
            if owner is not None and owner is not group and self._is_protected(owner):
                self._parked.setdefault(owner, deque()).append(row)
            elif pins is not None and pins.spares(self._tier, row):
                self.spared += 1
                self._aside.append((self._taken + self._aside_for, row))
            else:
                return row
        return NO_ROW

    def _is_protected(self, owner: Group) -> bool:
        floor = self._slots(_FLOORS[self._tier](owner.limits))
        return floor is not None and self.used(owner) <= floor

    def _unpark(self, group: Group | None, offer: Callable[[int], None]) -> None:
        """What came up for others is a candidate again: for its own group, or over the floor."""
        for owner, rows in self._parked.items():
            floor = self._slots(_FLOORS[self._tier](owner.limits)) or 0
            excess = len(rows) if owner is group else self.used(owner) - floor
            for _ in range(min(excess, len(rows))):
                offer(rows.popleft())  # nothing becomes of one that may not go any more

    def _own(self, group: Group) -> int:
        """A leaf of a group's own, the one used longest ago; the policy will find it gone."""
        victims = self._victims.setdefault(group, [])
        for fresh in (False, True):
            if fresh:
                victims += self._oldest_leaves(group)
            while victims:
                used_at, row = heapq.heappop(victims)
                if not self._is_own(row, group) or used_at != self._used_at(row):
                    continue  # gone, no leaf, or used since: the next look puts it in its place
                parent = self._blocks.parent[row]
                if parent != NO_ROW:  # a leaf itself, perhaps, as soon as this one went
                    heapq.heappush(victims, (self._used_at(parent), parent))
                return row
        return NO_ROW

    def _used_at(self, row: int) -> int:
        return int(self._last_use(np.array([row], np.int64))[0])

    def _is_own(self, row: int, group: Group) -> bool:
        if self._blocks.index.is_free(row) or not self._may_go(row):
            return False
        return self._tenancy.group(self._blocks.namespace(row)) is group

    def _oldest_leaves(self, group: Group) -> list[tuple[int, int]]:
        """(last use, row), the oldest first."""
        mine = self._blocks.in_spaces(self._spaces(group))
        leaves = np.array([row for row in mine.tolist() if self._may_go(row)], np.int64)
        uses = self._last_use(leaves)
        order = np.argsort(uses, kind="stable")[:VICTIMS_MAX]
        return list(zip(uses[order].tolist(), leaves[order].tolist(), strict=True))
