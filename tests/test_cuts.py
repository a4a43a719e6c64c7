"""Damage and TTL: what stands on a block goes at once for all who look, then piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from sim.blocks import NAMESPACE, Block
from sim.flash import flip
from sim.stores import (
    Bench,
    Worker,
    chain,
    check,
    in_pieces,
    keys_of,
    store_settled,
    tree_block,
)

from kvist.cachesvc.catalog import trees
from kvist.cachesvc.catalog.blocks import Blocks
from kvist.cachesvc.catalog.index import IndexWriter, Location
from kvist.cachesvc.placing.tenancy import Limits
from kvist.proto.errors import BlockMissing
from kvist.proto.keys import BlockKey
from kvist.proto.shm import CORRUPT, PREFETCH

OTHER = b"another namespace".ljust(32)
TTL = {f"ns:{NAMESPACE.hex()[:8]}": Limits(ttl=60)}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=64)
    yield made
    check(made)
    made.close()


def damage(bench: Bench, worker: Worker, block: Block) -> None:
    """A block's bytes in DRAM change, and a worker says so."""
    location = worker.index.find(block.header.key)
    assert location is not None
    assert location.dram is not None
    bench.parts.dram.slot_view(location.dram)[4096 + 99] ^= 1
    worker.ring.push(CORRUPT, block.header.depth + 1, block.header.key)


def drop_the_rest(bench: Bench) -> int:
    """Tick until nothing that was cut is left; the pieces that it took."""
    pieces = 0
    while bench.parts.moves.clearing.busy:
        bench.store.tick()
        check(bench)
        pieces += 1
    return pieces


def test_what_stands_on_a_damaged_block_is_found_by_nobody_and_dropped_in_pieces(
    bench: Bench,
) -> None:
    worker = in_pieces(bench, blocks=4)
    stem = chain(0, 6)
    branches = [chain(100 * number, 8, stem[3]) for number in range(1, 4)]
    beside = chain(900, 5, stem[2])
    for blocks in (stem, *branches, beside):
        assert set(worker.put(blocks)) == {"stored"}
    damage(bench, worker, stem[3])
    bench.store.tick()
    check(bench)
    clearing = bench.parts.moves.clearing
    assert clearing.busy
    assert bench.store.stats().blocks == 3 + 5
    assert worker.index.longest_prefix(keys_of([*stem[:4], *branches[0]])) == 3
    gone = [*stem[3:], *branches[0], *branches[1], *branches[2]]
    assert {worker.index.miss_reason(key) for key in keys_of(gone)} == {"corrupt"}
    assert not any(worker.reads(block) for block in gone)
    assert all(worker.reads(block) for block in (*stem[:3], *beside))
    (answer,) = worker.reserve([tree_block(950, branches[1][-1])])
    assert answer.reason == "no_parent"
    assert drop_the_rest(bench) == -(-len(gone) // 4) - 1, "the tick of the damage did one"
    assert clearing.longest_step == 4
    assert bench.parts.dram.free_slots == 64 - 8 - 1, "one slot is not used again"
    assert {worker.index.miss_reason(key) for key in keys_of(gone)} == {"corrupt"}


def test_what_a_cut_tree_stood_on_may_be_evicted_and_built_upon(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=2)
    blocks = chain(0, 12)
    worker.put(blocks)
    damage(bench, worker, blocks[4])
    bench.store.tick()
    placement = bench.parts.placement
    row = bench.parts.index.locate(blocks[3].header.key)
    assert row is not None
    assert placement.may_leave_dram(row)
    assert set(worker.put(blocks[4:8])) == {"stored"}, "the same blocks, sound ones"
    check(bench)
    drop_the_rest(bench)
    assert all(worker.reads(block) for block in blocks[:8])
    assert bench.store.lookup(keys_of(blocks)) == (["dram"] * 8, "corrupt")
    others = [tree_block(number) for number in range(1000, 1060)]
    for at in range(0, 60, 10):
        assert set(worker.put(others[at : at + 10])) == {"stored"}


def test_a_slot_that_is_wanted_comes_from_what_was_cut(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=1)
    worker.put(chain(0, 32))
    keep = chain(500, 32)
    worker.put(keep)
    damage(bench, worker, chain(0, 1)[0])
    bench.store.tick()
    assert set(worker.put(chain(700, 16))) == {"stored"}
    assert bench.parts.placement.counts.dram_evicted == 0
    assert all(worker.reads(block) for block in keep)


def test_damage_on_flash_takes_all_that_stand_on_it_out_of_the_flash_index(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=16, flash_slots=24)
    worker = in_pieces(bench, blocks=3)
    blocks = chain(0, 12)
    keys = store_settled(bench, worker, 0, 12)
    location = worker.index.find(keys[2])
    assert location is not None
    assert location.flash is not None
    assert bench.config.flash_path is not None
    slot_bytes = bench.parts.dram.slot_bytes
    bench.close()
    flip(bench.config.flash_path / "segment-00000", location.flash * slot_bytes + 4096 + 7)
    worker = in_pieces(bench, blocks=3)
    record = bench.parts.moves.read(keys[8])
    worker.ring.push(PREFETCH, 12, keys[-1])
    bench.run_until(lambda: bench.parts.placement.counts.flash_corrupt == 1)
    assert bench.parts.moves.clearing.busy
    check(bench)
    assert len(bench.store.lookup(keys)[0]) == 2
    assert {worker.index.miss_reason(key) for key in keys[2:]} == {"corrupt"}
    assert set(worker.put(blocks[2:4])) == {"stored"}
    drop_the_rest(bench)
    bench.settle()
    if not record.exception():
        assert len(record.result()) > 0, "it had risen before"
    assert bench.tiers(blocks) == ["dram"] * 4
    bench.close()
    in_pieces(bench, blocks=4)
    assert bench.tiers(blocks) == ["flash"] * 4, "what sank since then, and nothing from before"
    check(bench)
    bench.close()


def test_a_read_of_what_is_cut_ends(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=16, flash_slots=24)
    worker = in_pieces(bench, blocks=1)
    keys = store_settled(bench, worker, 0, 6)
    bench.close()
    in_pieces(bench, blocks=1)
    record = bench.parts.moves.read(keys[4])
    row = bench.parts.index.locate(keys[1])
    assert row is not None
    assert bench.parts.placement.jobs
    assert bench.parts.placement.drop_tree(row, "corrupt") == 5
    assert not bench.parts.placement.jobs
    check(bench)
    bench.settle()
    with pytest.raises(BlockMissing):
        record.result(0)
    bench.close()


def test_all_that_is_over_its_time_is_found_by_nobody_after_one_look(bench: Bench) -> None:
    bench.open(tenants=TTL)
    worker = bench.worker()
    bench.parts.moves.clearing.step_blocks = 4
    stem, other = chain(0, 5), tree_block(5000, namespace=OTHER)
    old = [*stem, *chain(100, 10, stem[4]), *chain(200, 10)]
    assert set(worker.put([*old, other])) == {"stored"}
    bench.clock_s += 40
    young = [*chain(300, 6, stem[2]), *chain(400, 5)]
    assert set(worker.put(young)) == {"stored"}
    bench.clock_s += 21
    bench.store.tick()
    check(bench)
    counts = bench.parts.placement.counts
    assert counts.expired == len(old) + 6, "with those that stand on them"
    assert bench.store.stats().blocks == 5 + 1
    gone = keys_of([*old, *young[:6]])
    assert {worker.index.miss_reason(key) for key in gone} == {"expired"}
    assert set(worker.put(stem)) == {"stored"}, "stored anew, it has its time"
    drop_the_rest(bench)
    assert counts.slots_wiped == len(gone)
    assert bench.parts.moves.clearing.longest_step == 4
    assert all(worker.reads(block) for block in (*stem, *young[6:], other))
    bench.clock_s += 61
    bench.store.tick()
    drop_the_rest(bench)
    assert bench.store.stats().blocks == 1
    assert (counts.expired, counts.slots_wiped) == (len(gone) + 10, len(gone) + 10)


def test_no_piece_overwrites_more_than_it_may(bench: Bench) -> None:
    bench.open(tenants=TTL)
    worker = bench.worker()
    clearing = bench.parts.moves.clearing
    clearing._wiped = 3
    worker.put(chain(0, 20))
    worker.put([tree_block(number, namespace=OTHER) for number in range(100, 120)])
    bench.clock_s += 61
    bench.store.tick()
    assert drop_the_rest(bench) == 6
    assert clearing.longest_step == 3
    worker.put(chain(0, 20))
    bench.store.clear(None)
    drop_the_rest(bench)
    assert bench.parts.placement.counts.slots_wiped == 40


def test_a_clear_amid_the_pieces_of_another_cut_drops_the_rest_once(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=2)
    blocks = chain(0, 20)
    worker.put(blocks)
    damage(bench, worker, blocks[5])
    bench.store.tick()
    assert bench.store.clear(None) == 5
    check(bench)
    drop_the_rest(bench)
    assert bench.store.stats().blocks == 0
    assert bench.parts.dram.free_slots == 64 - 1
    reasons = [worker.index.miss_reason(key) for key in keys_of(blocks)]
    assert reasons == ["cleared"] * 5 + ["corrupt"] * 15


@pytest.mark.parametrize("spaces", [1, 3])
def test_trees_found_by_arrays_are_those_found_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spaces: int
) -> None:
    random, index = Random(7), IndexWriter(tmp_path / "index", 3000, 0, 8192, bytes(16))
    blocks, rows = Blocks(index), list[int]()
    for number in range(3000):
        parent = -1
        if rows and random.random() < 0.97:
            parent = rows[-1] if random.random() < 0.7 else random.choice(rows)
        space = random.randrange(spaces).to_bytes(32) if parent < 0 else blocks.namespace(parent)
        key = BlockKey(random.randbytes(16))
        rows.append(blocks.add(key, parent, space, Location(number, None)))
    for root in random.sample(rows, 60):
        walked = trees.tree(blocks, root)
        with monkeypatch.context() as patch:
            patch.setattr(trees, "_WALK_BLOCKS", 0)
            found = trees.tree(blocks, root)
        assert sorted(found.tolist()) == sorted(walked.tolist())
        place = {row: at for at, row in enumerate(found.tolist())}
        assert all(place[row] < place.get(blocks.parent[row], 3000) for row in place)
    roots = np.array(random.sample(rows, 40), np.int64)
    each = {row for root in roots.tolist() for row in trees.tree(blocks, root).tolist()}
    assert set(trees.trees(blocks, roots).tolist()) == each
    index.close()
