"""Uses: what workers do becomes requests, each use counted once; in the real store."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sim.blocks import Block
from sim.forest import Forest
from sim.stores import Bench, Worker, chain, check, keys_of, store_settled, tree_block
from sim.traces import chat_lines, write_trace

from kvist.cachesvc.policy.eviction import PolicyName
from kvist.cachesvc.policy.uses import JOIN_S
from kvist.cachesvc.study.replay import PolicyCache, replay
from kvist.cachesvc.study.trace import read_trace
from kvist.proto.keys import BlockKey
from kvist.proto.shm import PREFETCH, TOUCH


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=8, flash_slots=24)
    yield made
    check(made)
    made.close()


def touch(bench: Bench, worker: Worker, keys: list[BlockKey], kind: int = TOUCH) -> None:
    worker.ring.push(kind, len(keys), keys[-1])
    bench.store.tick()


def request_of(bench: Bench, key: BlockKey) -> int:
    row = bench.parts.index.locate(key)
    assert row is not None
    request: int = bench.parts.placement.uses._history.request_of[row]
    return request


def test_wishes_and_the_touch_of_a_request_are_one_use(bench: Bench) -> None:
    bench.open()
    worker = bench.worker()
    keys = store_settled(bench, worker, 0, 4)
    uses = bench.parts.placement.uses
    before, found = uses.requests, uses.found_blocks
    for kind in (PREFETCH, PREFETCH, TOUCH):
        touch(bench, worker, keys, kind)
    assert (uses.requests, uses.found_blocks) == (before + 1, found + 4)
    touch(bench, worker, keys)
    assert uses.requests == before + 2, "the next request"
    touch(bench, worker, keys, PREFETCH)
    bench.clock_s += JOIN_S + 1
    touch(bench, worker, keys)
    assert uses.requests == before + 4, "that wish was of a request that never came"


def test_commit_goes_on_with_the_touch_that_was_pushed_before_it(bench: Bench) -> None:
    bench.open()
    worker = bench.worker()
    keys = store_settled(bench, worker, 0, 2)
    bench.clock_s += JOIN_S + 1
    worker.ring.push(TOUCH, 2, keys[-1])  # no tick in between
    blocks = chain(0, 4)
    worker.put(blocks[2:])
    assert {request_of(bench, key) for key in keys_of(blocks)} == {request_of(bench, keys[0])}
    bench.clock_s += JOIN_S + 1
    worker.put([tree_block(70, blocks[-1])])
    assert request_of(bench, keys_of([tree_block(70)])[0]) > request_of(bench, keys[0])


def test_blocks_of_two_prompts_in_one_commit_are_two_requests(bench: Bench) -> None:
    bench.open()
    worker = bench.worker()
    one, other = chain(0, 2), chain(100, 2)
    worker.put([*one, *other])
    of_one = {request_of(bench, key) for key in keys_of(one)}
    of_other = {request_of(bench, key) for key in keys_of(other)}
    assert len(of_one) == len(of_other) == 1
    assert of_one != of_other


def test_prompt_read_block_by_block_is_one_request() -> None:
    forest = Forest(8, "rgg")
    forest.add([0, 1, 2, 3])
    requests = forest.uses.requests
    for _ in range(2):
        forest.clock_s += 5
        for row in range(4):
            forest.uses.used(row)
    assert forest.uses.requests == requests + 2
    assert forest.uses.found_blocks == 2 * 4
    forest.clock_s += 5
    forest.uses.used(2)
    assert forest.uses.found_blocks == 2 * 4 + 3, "begun amid a prompt: what is before it as well"


def test_what_a_restart_finds_belongs_to_no_request_of_this_life(bench: Bench) -> None:
    bench.open()
    keys = store_settled(bench, bench.worker(), 0, 6)
    bench.close()
    bench.open()
    worker = bench.worker()
    assert [request_of(bench, key) for key in keys] == [0] * 6
    store_settled(bench, worker, 100, 20)
    assert bench.tiers(chain(0, 6)) == ["flash"] * 4, "it goes first, from its end"


def test_figures_of_eviction_are_of_each_tier_and_none_beside_leaf_lru(bench: Bench) -> None:
    bench.open()
    worker = bench.worker()
    keys = store_settled(bench, worker, 0, 4)
    store_settled(bench, worker, 100, 8)
    touch(bench, worker, keys)
    uses = {use.tier: use for use in bench.store.stats().eviction}
    assert uses["dram"].asked_blocks == uses["flash"].asked_blocks == 16
    assert (uses["dram"].hit_blocks, uses["flash"].hit_blocks) == (0, 4)
    assert (uses["dram"].lru_hit_blocks, uses["flash"].lru_hit_blocks) == (0, 4)
    bench.close()
    bench.open(eviction="lru")
    assert bench.store.stats().eviction == ()


@pytest.mark.parametrize(("policy", "apart"), [("lru", 0.0), ("rgg", 0.05)])
def test_store_hits_what_a_replay_says(tmp_path: Path, policy: PolicyName, apart: float) -> None:
    """rgg: the store makes room before a prompt is stored and not after it, and samples other
    leaves.
    """
    slots = 120
    lines = chat_lines(400, seed=3, sessions=12)
    trace = read_trace(write_trace(tmp_path / "trace.jsonl", lines), False, lambda _: None)
    replayed, _ = replay(trace, PolicyCache(trace, slots, policy, seed=0), lambda _: None)
    bench = Bench(tmp_path, dram_slots=slots)
    bench.open(eviction=policy)
    worker = bench.worker()
    start_s, hits = bench.clock_s, []
    for number in range(trace.requests):
        bench.clock_s = start_s + float(trace.times_s[number])
        blocks = chain_of(trace.prompt(number).tolist())
        found = len(bench.tiers(blocks))
        if found:
            touch(bench, worker, keys_of(blocks[:found]))
        worker.put(blocks[found:])
        hits.append(found)
    counts = bench.parts.placement.counts
    assert counts.index_refused == 0
    assert sum(hits) == pytest.approx(replayed.sum(), rel=apart)
    assert sum(hits) > 0.3 * len(trace.blocks)
    check(bench)
    bench.close()


def chain_of(numbers: list[int]) -> list[Block]:
    """Keys all over the index: those of sim.blocks share one of their two buckets."""
    blocks: list[Block] = []
    for number in numbers:
        block = tree_block(number, blocks[-1] if blocks else None)
        key = BlockKey(random.Random(number).randbytes(16))
        blocks.append(Block(replace(block.header, key=key), block.payload))
    return blocks
