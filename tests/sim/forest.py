"""Blocks without bytes: a tree, a policy, one tier and a clock, driven by hand."""

from __future__ import annotations

import numpy as np

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.policy.eviction import History, PolicyName
from kvist.cachesvc.policy.rgg import make_policy
from kvist.cachesvc.policy.uses import Uses
from kvist.proto.hints import NO_HINT, Hint


class Forest:
    """A tier that holds every row added and not taken; what may go is what has no child left.

    Attributes:
        busy: rows that may not go now.
        clock_s: the time.
        hint: of requests that begin by storing first blocks.
    """

    def __init__(self, rows: int, policy: PolicyName, capacity: int = 16) -> None:
        self.parent = np.full(rows, NO_ROW, np.int32).data
        self.depth = np.zeros(rows, np.int32).data
        self.stored: set[int] = set()
        self.children = [0] * rows
        self.lives = [0] * rows
        self.busy: set[int] = set()
        self.clock_s = 0.0
        self.hint = NO_HINT
        self.history = History(rows)
        self.policy = make_policy(policy, self, self.history, capacity, seed=1)
        self.uses = Uses(self, self.history, (self.policy,), lambda: self.clock_s)
        self.order = self.policy.order(self.may_go, len, capacity)

    def name(self, row: int) -> int:
        return row * 1000 + self.lives[row]

    def may_go(self, row: int) -> bool:
        return row in self.stored and not self.children[row] and row not in self.busy

    def add(self, rows: list[int], parent: int = NO_ROW) -> None:
        """Store a chain on top of a row."""
        if parent == NO_ROW and self.hint != NO_HINT:
            self.uses.expected(self.name(rows[0]) + 1, self.hint)  # the name of its next life
        for row in rows:
            self.parent[row] = parent
            self.depth[row] = 0 if parent == NO_ROW else self.depth[parent] + 1
            self.stored.add(row)
            self.lives[row] += 1
            if parent != NO_ROW:
                self.children[parent] += 1
                self.order.offer(parent)
            self.uses.stored(row)
            parent = row
        self.uses.tell_stored()
        for row in rows:
            self.order.offer(row)

    def touch(self, row: int, hint: Hint = NO_HINT) -> None:
        self.uses.touched(1, row, hint)

    def drop(self, row: int) -> None:
        """By force or because it was taken."""
        assert not self.children[row]
        self.uses.removed(row)
        self.stored.remove(row)
        self.order.offer(row)
        parent = self.parent[row]
        if parent != NO_ROW:
            self.children[parent] -= 1
            self.order.offer(parent)

    def take(self, than: int = NO_ROW) -> int:
        row = self.order.take(self.uses.clock(), than)
        if row != NO_ROW:
            assert self.may_go(row), "only leaves go, and each once"
            self.drop(row)
        return row
