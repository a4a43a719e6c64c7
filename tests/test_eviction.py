"""Eviction: the order in which leaves go."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cachesvc.eviction import LeafLru, Leaves


class Tree:
    """Blocks with a parent; what may go is what has no child left."""

    def __init__(self, rows: int) -> None:
        self.policy = LeafLru(rows)
        self.children = [0] * rows
        self.parent: dict[int, int | None] = {}
        self.last_use: dict[int, int] = {}
        self.depth: dict[int, int] = {}
        self.busy: set[int] = set()
        self.leaves = Leaves(self.policy, rows, self.may_go)
        self.tick = 0

    def may_go(self, row: int) -> bool:
        return row in self.parent and not self.children[row] and row not in self.busy

    def add(self, row: int, parent: int | None) -> None:
        self.tick += 1
        self.parent[row] = parent
        self.depth[row] = 0 if parent is None else self.depth[parent] + 1
        self.last_use[row] = self.tick
        if parent is not None:
            self.children[parent] += 1
        self.policy.inserted(row, self.depth[row], self.tick)
        self.leaves.offer(row)

    def touch(self, row: int) -> None:
        self.tick += 1
        each: int | None = row
        while each is not None:
            self.last_use[each] = self.tick
            self.policy.touched([each], self.tick)
            each = self.parent[each]

    def take(self) -> int | None:
        row = self.leaves.take()
        if row is not None:
            parent = self.parent.pop(row)
            self.policy.removed(row)
            if parent is not None:
                self.children[parent] -= 1
                self.leaves.offer(parent)
        return row

    def expected(self) -> int | None:
        candidates = [row for row in self.parent if self.may_go(row)]
        return min(candidates, key=lambda row: (self.last_use[row], -self.depth[row]), default=None)


def test_leaf_used_longest_ago_goes_first() -> None:
    tree = Tree(8)
    for row in range(4):
        tree.add(row, None)
    tree.touch(0)
    assert [tree.take() for _ in range(5)] == [1, 2, 3, 0, None]


def test_chain_used_together_goes_from_its_end() -> None:
    tree = Tree(8)
    for row in range(4):
        tree.add(row, row - 1 if row else None)
    tree.add(7, None)
    tree.touch(3)
    assert [tree.take() for _ in range(5)] == [7, 3, 2, 1, 0]


def test_of_leaves_used_together_the_deepest_goes_first() -> None:
    policy = LeafLru(4)
    leaves = Leaves(policy, 4, lambda row: row < 4)
    for row, depth in enumerate((1, 3, 0, 2)):
        policy.inserted(row, depth, tick=5)
        leaves.offer(row)
    assert [leaves.take() for _ in range(4)] == [1, 3, 0, 2]


def test_block_that_cannot_go_now_is_passed_over_until_it_is_offered_again() -> None:
    tree = Tree(4)
    tree.add(0, None)
    tree.add(1, None)
    tree.busy.add(0)
    assert tree.take() == 1
    tree.busy.clear()
    assert tree.take() is None
    tree.leaves.offer(0)
    assert tree.take() == 0


def test_nothing_of_a_rank_or_above_is_taken() -> None:
    tree = Tree(4)
    for row in range(3):
        tree.add(row, None)
    limit = tree.policy.rank(1)
    assert tree.leaves.take(below=limit) == 0
    assert tree.leaves.take(below=limit) is None
    assert tree.leaves.take() == 1


def test_row_given_to_another_block_keeps_no_place_in_the_order() -> None:
    tree = Tree(4)
    for row in range(2):
        tree.add(row, None)
    del tree.parent[0]  # dropped by force
    tree.policy.removed(0)
    tree.add(0, None)
    assert [tree.take() for _ in range(3)] == [1, 0, None]


def test_each_row_is_in_the_order_once_however_often_it_is_used() -> None:
    tree = Tree(8)
    for row in range(8):
        tree.add(row, None)
    for _ in range(100):
        for row in range(8):
            tree.touch(row)
            tree.leaves.offer(row)
    assert len(tree.leaves) == 8


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_order_is_that_of_a_search_through_all_leaves(data: st.DataObject) -> None:
    tree = Tree(64)
    for row in range(64):
        draw = data.draw(st.integers(0, 9))
        if draw < 7 or not tree.parent:
            stored = [*tree.parent]
            parent = data.draw(st.sampled_from([None, *stored]))
            tree.add(row, parent)
        elif draw < 9:
            tree.touch(data.draw(st.sampled_from([*tree.parent])))
        else:
            assert tree.expected() == tree.take()
    while tree.parent:
        assert tree.expected() == tree.take()
    assert tree.take() is None
