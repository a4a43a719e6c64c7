"""What if: the curve that is estimated while it runs, against replays of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from sim.stores import Bench, chain, store_settled
from sim.traces import chat_trace

from kvist.cachesvc.study.replay import PolicyCache, replay, replay_policy
from kvist.cachesvc.study.whatif import MULTIPLES, Curve
from kvist.proto.shm import TOUCH


def quiet(_: int) -> None:
    """Progress, for nobody."""


@pytest.mark.parametrize("policy", ["rgg", "lru"])
def test_with_every_block_watched_the_curve_is_leaf_lru(tmp_path: Path, policy: str) -> None:
    trace = chat_trace(tmp_path, requests=1000, seed=7)
    score = replay_policy(trace, 200, policy, 512, 0, quiet)  # type: ignore[arg-type]
    for point, multiple in zip(score.what_if, MULTIPLES, strict=True):
        assert point.capacity_blocks == 200 * multiple
        full = replay_policy(trace, point.capacity_blocks, "lru", 512, 0, quiet)
        # A prompt that is larger than the cache is all of the difference.
        assert 100 * point.hit_ratio == pytest.approx(full.blocks, abs=0.2)


def test_sampled_curve_is_within_two_points(tmp_path: Path) -> None:
    trace = chat_trace(tmp_path, requests=3000, seed=9, sessions=100)
    cache = PolicyCache(trace, 800, "rgg", seed=0)
    curve = Curve(800, sample=1600)  # one block of four
    cache.what_if.curves[0] = curve
    replay(trace, cache, quiet)
    assert len(curve._last) <= 1601
    for point in curve.estimates():
        full = replay_policy(trace, point.capacity_blocks, "lru", 512, 0, quiet)
        assert 100 * point.hit_ratio == pytest.approx(full.blocks, abs=2.0)


def test_memory_is_bounded_and_positions_are_used_again() -> None:
    curve = Curve(capacity=4, sample=32)
    tree_bytes = len(curve._tree)
    for request in range(5000):  # more requests than positions
        curve.count(2)
        curve.use([request % 7, 1000 + request], request)
        assert len(curve._last) <= 33
    assert len(curve._tree) == tree_bytes
    assert curve._upto(curve._position) == len(curve._last)
    # Between two uses of a block come 6 others of the seven and 7 new ones: 14 with itself.
    assert [point.hit_ratio for point in curve.estimates()] == pytest.approx(
        [0.0, 0.0, 0.0, 0.5, 0.5], abs=0.01
    )


def test_nothing_asked_for_is_no_curve() -> None:
    assert Curve(capacity=4).estimates() == ()


def test_store_tells_the_curve_of_each_tier_and_a_restart_knows_what_is_on_flash(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, dram_slots=8, flash_slots=32)
    bench.open()
    keys = store_settled(bench, bench.worker(), 0, 12)
    bench.close()
    bench.open()
    assert bench.store.stats().what_if == {"dram": (), "flash": ()}
    worker = bench.worker()
    worker.ring.push(TOUCH, 12, keys[-1])
    bench.store.tick()
    worker.put(chain(50, 4))
    points = bench.store.stats().what_if
    assert [point.hit_ratio for point in points["dram"]] == [0.25, 0.5, 0.75, 0.75, 0.75]
    assert [point.capacity_blocks for point in points["flash"]] == [16, 32, 64, 128, 256]
    assert [point.hit_ratio for point in points["flash"]] == [0.75] * 5
    bench.close()
