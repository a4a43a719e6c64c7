"""Eviction: the contract, for every policy; and leaf-LRU against a search through all leaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.forest import Forest

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.policy.eviction import POLICIES, PolicyName
from kvist.cachesvc.policy.rgg import Gittins
from kvist.cachesvc.policy.uses import JOIN_S

each_policy = pytest.mark.parametrize("policy", POLICIES)


def forest_of(policy: PolicyName, *chains: list[int]) -> Forest:
    """Each chain stored as a request of its own, a while after the one before."""
    forest = Forest(64, policy)
    for rows in chains:
        forest.clock_s += 10
        forest.add(rows)
    return forest


@each_policy
def test_what_nothing_is_known_of_goes_by_age(policy: PolicyName) -> None:
    forest = forest_of(policy, [0], [1], [2], [3])
    forest.clock_s += 10
    forest.touch(0)
    assert [forest.take() for _ in range(5)] == [1, 2, 3, 0, NO_ROW]


@each_policy
def test_chain_used_together_goes_from_its_end(policy: PolicyName) -> None:
    forest = forest_of(policy, [7], [0, 1, 2, 3])
    assert [forest.take() for _ in range(5)] == [7, 3, 2, 1, 0]


@each_policy
def test_of_leaves_used_together_the_deepest_goes_first(policy: PolicyName) -> None:
    forest = forest_of(policy, [0])
    forest.add([1, 2], 0)
    forest.add([3], 0)
    if policy == "cost":  # but what is cheaper to compute again
        assert [forest.take() for _ in range(4)] == [3, 2, 1, 0]
    else:
        assert [forest.take() for _ in range(4)] == [2, 1, 3, 0]


@each_policy
def test_block_that_cannot_go_now_is_passed_over_until_it_is_offered_again(
    policy: PolicyName,
) -> None:
    forest = forest_of(policy, [0], [1])
    forest.busy.add(0)
    assert forest.take() == 1
    forest.busy.clear()
    assert forest.take() == NO_ROW
    forest.order.offer(0)
    assert forest.take() == 0


@each_policy
def test_nothing_used_after_a_row_is_taken_for_it(policy: PolicyName) -> None:
    forest = forest_of(policy, [0], [1], [2])
    assert forest.take(than=1) == 0
    assert forest.take(than=1) == NO_ROW
    assert forest.take() == 1


@each_policy
def test_of_one_prompt_nothing_goes_for_what_comes_after_it(policy: PolicyName) -> None:
    forest = forest_of(policy, [0, 1, 2], [5])
    forest.clock_s += 10
    forest.touch(2)
    forest.busy.add(2)
    forest.children[1] = 0  # as if 2 were in the other tier only
    forest.order.offer(1)
    assert forest.take(than=2) == 5
    assert forest.take(than=2) == NO_ROW


@each_policy
def test_row_given_to_another_block_keeps_no_place_in_the_order(policy: PolicyName) -> None:
    forest = forest_of(policy, [0], [1])
    forest.drop(0)
    forest.clock_s += 10
    forest.add([0])
    assert [forest.take() for _ in range(3)] == [1, 0, NO_ROW]


@each_policy
def test_each_row_is_in_the_order_once_however_often_it_is_used(policy: PolicyName) -> None:
    forest = forest_of(policy, *([row] for row in range(8)))
    for _ in range(100):
        for row in range(8):
            forest.touch(row)
            forest.order.offer(row)
    assert len(forest.order) == 8


@each_policy
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_only_leaves_go_and_each_row_once(policy: PolicyName, data: st.DataObject) -> None:
    forest = Forest(64, policy, capacity=8)
    for _ in range(60):
        forest.clock_s += data.draw(st.sampled_from([0.0, 0.1, 5.0, 1000.0]))
        free = sorted(set(range(64)) - forest.stored)
        step = data.draw(st.sampled_from(["add", "add", "touch", "take", "drop"]))
        if step == "add" and free:
            parent = data.draw(st.sampled_from([NO_ROW, *sorted(forest.stored)]))
            forest.add(free[: data.draw(st.integers(1, 6))], parent)
        elif step == "touch" and forest.stored:
            forest.touch(data.draw(st.sampled_from(sorted(forest.stored))))
        elif step == "drop" and (leaves := [row for row in forest.stored if forest.may_go(row)]):
            forest.drop(data.draw(st.sampled_from(sorted(leaves))))
        elif step == "take":
            was_empty = not forest.stored
            assert (forest.take() == NO_ROW) == was_empty
    taken = [forest.take() for _ in range(len(forest.stored))]
    assert NO_ROW not in taken
    assert not forest.stored


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_leaf_lru_is_a_search_through_all_leaves(data: st.DataObject) -> None:
    forest = Forest(64, "lru")
    last_use: dict[int, int] = {}

    def expected() -> int:
        leaves = [row for row in forest.stored if forest.may_go(row)]
        return min(leaves, key=lambda row: (last_use[row], -forest.depth[row]))

    for row in range(64):
        forest.clock_s += JOIN_S + 1  # so that what is stored is used later than its parent
        draw = data.draw(st.integers(0, 9))
        if draw < 7 or not forest.stored:
            forest.add([row], data.draw(st.sampled_from([NO_ROW, *forest.stored])))
            last_use[row] = row
        elif draw < 9:
            each = data.draw(st.sampled_from([*forest.stored]))
            forest.touch(each)
            while each != NO_ROW:
                last_use[each] = row
                each = forest.parent[each]
        else:
            assert expected() == forest.take()
    while forest.stored:
        assert expected() == forest.take()


def test_what_somebody_waits_for_goes_before_what_is_only_likely_to_be_used() -> None:
    """rgg learns that blocks come back after a minute and never at once; still one rises now."""
    forest = Forest(512, "rgg", capacity=64)
    rows = iter(range(512))
    for _ in range(140):
        row = next(rows)
        forest.add([row])
        for _ in range(3):
            forest.clock_s += 60
            forest.touch(row)
        forest.drop(row)
    likely, wanted = next(rows), next(rows)
    forest.add([likely])
    forest.clock_s += 50
    forest.add([wanted])
    assert isinstance(forest.policy, Gittins)
    at = forest.uses.clock()
    assert forest.policy.worth(wanted, at) < forest.policy.worth(likely, at)
    assert forest.take(than=wanted) == likely


def test_beginning_of_a_prompt_may_displace_its_end() -> None:
    for policy in POLICIES:
        forest = forest_of(policy, [0, 1, 2, 3])
        forest.busy.add(0)
        assert forest.take(than=0) == 3
        assert forest.take(than=2) == NO_ROW
