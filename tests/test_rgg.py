"""Run-ghost Gittins: what it remembers, what it learns, what it is compared with."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.forest import Forest
from sim.traces import chat_trace

from kvist.cachesvc.policy import rgg
from kvist.cachesvc.policy import shadow as shadow_module
from kvist.cachesvc.policy.ghosts import NO_GHOST, Ghosts
from kvist.cachesvc.policy.gittins import (
    BUCKETS,
    CLASSES,
    WIDTHS_S,
    Estimator,
    Table,
    hazards,
    worths,
)
from kvist.cachesvc.policy.rgg import Gittins
from kvist.cachesvc.policy.shadow import Shadow
from kvist.cachesvc.study.replay import PolicyCache, replay, replay_policy
from kvist.cachesvc.study.trace import Trace


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_ghosts_are_a_bounded_ring_that_is_found_by_name(data: st.DataObject) -> None:
    ghosts = Ghosts(8)
    model: OrderedDict[int, tuple[int, int]] = OrderedDict()  # ghost -> name, length
    names = iter(data.draw(st.permutations([value * 16 for value in range(200)])))
    for _ in range(100):
        live = [*model]
        step = data.draw(st.sampled_from(["open", "open", "grow", "drop"]))
        if step == "open":
            if ghosts.length[ghosts.next()]:
                assert ghosts.next() == live[0], "the oldest makes room"
                ghosts.drop(live[0])
                del model[live[0]]
            elif ghosts.next() in model:
                pytest.fail("a ghost of no length")
            name = next(names)
            model[ghosts.open(name)] = (name, 1)
        elif live:
            ghost = data.draw(st.sampled_from(live))
            if step == "grow":
                name = next(names)
                ghosts.grow(ghost, name)
                model[ghost] = (name, model[ghost][1] + 1)
            else:
                ghosts.drop(ghost)
                del model[ghost]
        for ghost, (name, length) in model.items():
            assert ghosts.find(name) == ghost
            assert ghosts.length[ghost] == length
        assert ghosts.find(10**9) == NO_GHOST
        assert np.count_nonzero(ghosts.lengths) == len(model) <= 8


def test_without_any_knowledge_the_oldest_is_worth_least() -> None:
    worth = Estimator().worth.reshape(CLASSES, BUCKETS)
    assert np.allclose(worth, worth[0])
    assert (np.diff(worth[0][: BUCKETS // 2]) < 0).all()


def test_worth_is_the_best_rate_of_reuse_over_all_horizons() -> None:
    chance = np.random.default_rng(3)
    hazard = chance.random((5, BUCKETS)) * chance.choice([0.01, 0.3, 0.9], (5, BUCKETS))
    found = worths(hazard)
    for kind, age in ((0, 0), (1, 7), (2, 30), (3, 46), (4, 47)):
        best, waits, hits, held_s = 0.0, 1.0, 0.0, 0.0
        for bucket in range(age, BUCKETS):
            hits += waits * hazard[kind, bucket]
            held_s += waits * WIDTHS_S[bucket] * (1 - hazard[kind, bucket] / 2)
            waits *= 1 - hazard[kind, bucket]
            best = max(best, hits / held_s)
        assert found[kind, age] == pytest.approx(best)


def test_hazard_is_reuses_over_blocks_at_risk() -> None:
    reused, lost, alive = (np.zeros((1, BUCKETS)) for _ in range(3))
    reused[0, 2], reused[0, 5], lost[0, 3], alive[0, 2] = 10, 20, 30, 40
    hazard = hazards((reused, lost, alive), 1e-9, np.full((1, BUCKETS), 0.5))
    # Of 100 blocks, 40 have come but half through bucket 2.
    assert hazard[0, 2] == pytest.approx(10 / (10 + 20 + 30 + 20))
    assert hazard[0, 5] == pytest.approx(20 / 20)
    assert hazard[0, 40] == pytest.approx(0.5), "nobody got there: the prior"


def test_kind_that_comes_back_is_kept_over_one_that_does_not() -> None:
    forest = Forest(4096, "rgg", capacity=64)
    rows = iter(range(4096))
    for _ in range(300):  # first blocks that come back every 50 s, and such that never do
        back, gone = next(rows), [next(rows) for _ in range(5)]
        forest.add([back])
        forest.add(gone)
        for _ in range(3):
            forest.clock_s += 50
            forest.touch(back)
        forest.drop(back)
        for row in reversed(gone):
            forest.drop(row)
    often, once = next(rows), next(rows)
    forest.add([often])
    for _ in range(3):
        forest.clock_s += 50
        forest.touch(often)
    forest.clock_s += 10
    forest.add([once])
    forest.clock_s += 20
    assert forest.take() == once, "used later, but its like does not return"


def test_short_and_long_chains_are_learned_from_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after the same uses, one row at a time or all together."""
    states = []
    for few in (0, 1000):
        monkeypatch.setattr(rgg, "_FEW", few)
        forest = Forest(64, "rgg")
        forest.add([*range(40)])
        forest.add([*range(40, 50)], 20)
        for gap_s in (0.01, 3.0, 700.0, 0.3, 10.0**6, 40.0):
            for row in (39, 49, 5):
                forest.clock_s += gap_s
                forest.touch(row)
        policy = forest.policy
        assert isinstance(policy, Gittins)
        states.append(
            (policy._uses, policy._rhythm, policy._tail, policy._kind, policy._estimator._events)
        )
    for one, other in zip(*states, strict=True):
        assert one.any()
        assert np.array_equal(one, other)


def trace_of(folder: Path) -> Trace:
    return chat_trace(folder, requests=2500, seed=5)


def test_shadow_is_within_three_tenths_of_a_point_of_leaf_lru(tmp_path: Path) -> None:
    trace = trace_of(tmp_path)
    for capacity in (150, 600):
        lru = replay_policy(trace, capacity, "lru", 512, 0, lambda _: None)
        rgg = replay_policy(trace, capacity, "rgg", 512, 0, lambda _: None)
        assert rgg.shadow == pytest.approx(lru.blocks, abs=0.3)


def test_points_over_leaf_lru_are_what_the_hits_say(tmp_path: Path) -> None:
    trace = trace_of(tmp_path)
    cache = PolicyCache(trace, 300, "rgg", seed=0)
    hits, _ = replay(trace, cache, lambda _: None)
    (shadow,) = cache.policy.shadows
    assert shadow.own_hits == hits.sum()
    assert shadow.asked == len(trace.blocks)
    won = 100 * (shadow.own_hits - shadow.hits) / shadow.asked
    assert shadow.points == pytest.approx(won, abs=2.0), "the last few thousand requests"


class Perverse(Estimator):
    """What is worth most goes first."""

    def rebuild(self, alive: Table) -> None:
        super().rebuild(alive)
        self.worth[:] = -self.worth


@pytest.mark.parametrize("is_guarded", [True, False])
def test_policy_that_is_always_wrong_falls_back_to_leaf_lru(
    tmp_path: Path, is_guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = chat_trace(tmp_path, requests=5000, seed=5)
    cache = PolicyCache(trace, 300, "rgg", seed=0)
    policy, shadow = cache.policy, cache.policy.shadows[0]
    assert isinstance(policy, Gittins)
    policy._estimator = Perverse()
    if not is_guarded:
        monkeypatch.setattr(Shadow, "_judge", lambda *_: None)
        monkeypatch.setattr(Shadow, "is_cautious", False)
    hits, _ = replay(trace, cache, lambda _: None)
    lru_hits, _ = replay(trace, PolicyCache(trace, 300, "lru", 0), lambda _: None)
    lost = 100 * (lru_hits.sum() - hits.sum()) / len(trace.blocks)
    assert is_guarded or not shadow.falls
    if is_guarded:
        assert lost < 1
    else:
        assert lost > 10


def test_policy_that_loses_for_long_is_overruled_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_module, "_ALLOWED_REQUESTS", 10**9)
    trace = chat_trace(tmp_path, requests=2500, seed=5)
    cache = PolicyCache(trace, 300, "rgg", seed=0)
    policy, shadow = cache.policy, cache.policy.shadows[0]
    assert isinstance(policy, Gittins)
    policy._estimator = Perverse()
    replay(trace, cache, lambda _: None)
    assert shadow.falls == 1
