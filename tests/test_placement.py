"""Placement and moves: what stays, what sinks, what rises, and what damage takes with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.blocks import SLOT_BYTES, make_block
from sim.flash import flip
from sim.stores import Bench, chain, check, keys_of, store_settled, tree_block, worker_of

from kvist.proto.errors import BlockMissing
from kvist.proto.keys import BlockKey
from kvist.proto.shm import CORRUPT, PREFETCH, TOUCH


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=8, flash_slots=24)
    yield made
    check(made)
    made.close()


def damage_flash(bench: Bench, key: BlockKey) -> None:
    location = bench.parts.index.find(key)
    assert location is not None
    assert location.flash is not None
    assert bench.config.flash_path is not None
    flip(bench.config.flash_path / "segment-00000", location.flash * SLOT_BYTES + 5000)


def damage_dram(bench: Bench, key: BlockKey) -> None:
    location = bench.parts.index.find(key)
    assert location is not None
    assert location.dram is not None
    bench.parts.dram.slot_view(location.dram)[5000] ^= 0xFF


def test_what_is_stored_sinks_and_then_leaves_dram_at_no_cost(bench: Bench) -> None:
    worker = worker_of(bench)
    store_settled(bench, worker, 0, 8)
    assert bench.parts.placement.counts.flash_written == 8
    store_settled(bench, worker, 100, 8)
    assert bench.tiers(chain(0, 8)) == ["flash"] * 8
    assert bench.tiers(chain(100, 8)) == ["dram"] * 8
    assert bench.parts.placement.counts.dram_evicted == 8


def test_prefetch_brings_a_prompt_back_first_block_first_and_right(bench: Bench) -> None:
    worker = worker_of(bench)
    keys = store_settled(bench, worker, 0, 6)
    store_settled(bench, worker, 100, 8)
    order: list[int] = []
    rise, owner = bench.parts.moves._io, bench.parts.moves
    assert rise is not None
    queue = rise.rise
    rise.rise = lambda job: (order.append(keys.index(job.key)), queue(job))[1]  # type: ignore
    assert bench.store.prefetch(keys) == 6
    assert bench.store.prefetch(keys) >= 0
    bench.settle()
    assert order == list(range(6)), "each once, in order"
    assert bench.tiers(chain(0, 6)) == ["dram"] * 6
    assert all(worker.reads(block) for block in chain(0, 6))
    assert owner.state == "ready"


def test_prefetch_through_the_ring_needs_no_call(bench: Bench) -> None:
    worker = worker_of(bench)
    keys = store_settled(bench, worker, 0, 4)
    store_settled(bench, worker, 100, 8)
    worker.ring.push(PREFETCH, 4, keys[-1])
    bench.run_until(lambda: bench.tiers(chain(0, 4)) == ["dram"] * 4)
    worker.ring.push(PREFETCH, 4, BlockKey(b"never heard of.."))
    assert bench.store.tick()


def test_prompt_larger_than_dram_rises_as_far_as_it_fits_and_keeps_its_beginning(
    bench: Bench,
) -> None:
    worker = worker_of(bench)
    keys = store_settled(bench, worker, 0, 14)
    store_settled(bench, worker, 100, 8)
    bench.store.prefetch(keys)
    bench.settle()
    assert bench.tiers(chain(0, 14)) == ["dram"] * 8 + ["flash"] * 6


def test_block_rises_into_no_room_of_what_is_more_worth_keeping(bench: Bench) -> None:
    worker = worker_of(bench)
    old = store_settled(bench, worker, 0, 4)
    store_settled(bench, worker, 100, 8)
    row = bench.parts.index.locate(old[-1])
    assert row is not None
    bench.parts.moves.rise_chain(row)  # without the touch that a prefetch is
    bench.settle()
    assert bench.tiers(chain(0, 4)) == ["flash"] * 4
    assert bench.tiers(chain(100, 8)) == ["dram"] * 8
    assert bench.parts.placement.counts.rises_refused == 4


def test_use_keeps_a_prompt_and_the_unused_goes(bench: Bench) -> None:
    worker = worker_of(bench)
    old = store_settled(bench, worker, 0, 4)
    store_settled(bench, worker, 100, 4)
    worker.ring.push(TOUCH, 4, old[-1])
    bench.store.tick()
    store_settled(bench, worker, 200, 4)
    assert bench.tiers(chain(0, 4)) == ["dram"] * 4
    assert bench.tiers(chain(100, 4)) == ["flash"] * 4


def test_full_queue_drops_sinks_counts_them_and_use_gives_them_another_chance(
    bench: Bench,
) -> None:
    bench.open(flash_queue_blocks=2)
    worker = bench.worker()
    blocks = chain(0, 6)
    worker.put(blocks)
    counts = bench.parts.placement.counts
    assert counts.sinks_dropped == 4
    bench.settle()
    assert counts.flash_written == 2
    for _ in range(2):
        worker.ring.push(TOUCH, 6, keys_of(blocks)[-1])
        bench.store.tick()
        check(bench)
        bench.settle()
    assert counts.flash_written == 6


def test_flash_that_is_full_drops_its_oldest_leaves(bench: Bench) -> None:
    worker = worker_of(bench)
    for first in range(0, 500, 100):
        store_settled(bench, worker, first, 8)
        check(bench)
    assert bench.tiers(chain(0, 8)) == []
    assert bench.tiers(chain(200, 8)) == ["flash"] * 8
    assert bench.parts.placement.counts.flash_evicted == 16
    store_settled(bench, worker, 900, 4)
    assert bench.tiers(chain(200, 8)) == ["flash"] * 4, "from its end"


def test_without_flash_the_oldest_leaf_goes_for_good(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=8)
    bench.open()
    worker = bench.worker()
    worker.put(chain(0, 8))
    worker.put(chain(100, 3))
    assert bench.tiers(chain(0, 8)) == ["dram"] * 5
    worker.reserve(chain(200, 6))
    assert bench.worker().put(chain(300, 4)) == ["stored"] * 2 + ["full"] + ["no_parent"]
    check(bench)
    bench.close()


def test_block_whose_child_is_reserved_is_not_evicted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=4)
    bench.open()
    worker = bench.worker()
    blocks = chain(0, 2)
    worker.put(blocks[:1])
    (child,) = worker.reserve(blocks[1:])
    worker.put(chain(100, 4))
    assert bench.tiers(blocks[:1]) == ["dram"]
    assert child.slot is not None
    worker.store.abort(worker.info.session, [child.slot])
    worker.put(chain(200, 4))
    assert bench.tiers(blocks[:1]) == []
    check(bench)
    bench.close()


def test_report_about_a_sound_block_drops_nothing(bench: Bench) -> None:
    worker = worker_of(bench)
    keys = store_settled(bench, worker, 0, 4)
    worker.ring.push(CORRUPT, 1, keys[1])
    bench.store.tick()
    assert bench.tiers(chain(0, 4)) == ["dram"] * 4


def test_damaged_copy_in_dram_goes_and_the_one_on_flash_rises_for_it(bench: Bench) -> None:
    worker = worker_of(bench)
    keys = store_settled(bench, worker, 0, 4)
    damage_dram(bench, keys[1])
    worker.ring.push(CORRUPT, 1, keys[1])
    bench.store.tick()
    assert bench.tiers(chain(0, 4)) == ["dram", "flash", "dram", "dram"]
    check(bench)
    bench.store.prefetch(keys)
    bench.settle()
    assert all(worker.reads(block) for block in chain(0, 4))


def test_damaged_last_copy_takes_all_that_stand_on_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=8)
    bench.open()
    worker = bench.worker()
    trunk = chain(0, 4)
    worker.put([*trunk, tree_block(50, trunk[1]), tree_block(60, trunk[0])])
    damage_dram(bench, keys_of(trunk)[1])
    worker.ring.push(CORRUPT, 1, keys_of(trunk)[1])
    bench.store.tick()
    assert bench.tiers(trunk) == ["dram"]
    assert bench.store.stats().blocks == 2
    assert bench.parts.placement.counts.dram_corrupt == 1
    check(bench)
    bench.close()


def test_damage_on_flash_is_found_as_the_block_rises_and_takes_what_stands_on_it(
    bench: Bench,
) -> None:
    worker = worker_of(bench)
    keys = store_settled(bench, worker, 0, 6)
    store_settled(bench, worker, 100, 8)
    damage_flash(bench, keys[2])
    bench.store.prefetch(keys)
    bench.settle()
    assert bench.tiers(chain(0, 6)) == ["dram"] * 2
    assert bench.parts.placement.counts.flash_corrupt == 1
    assert worker.put(chain(0, 6)) == ["present"] * 2 + ["stored"] * 4
    bench.settle()


def test_damage_on_flash_takes_even_what_stands_on_it_in_dram(bench: Bench) -> None:
    worker = worker_of(bench)
    keys = store_settled(bench, worker, 0, 2)
    store_settled(bench, worker, 100, 8)
    assert worker.put(chain(0, 3)) == ["present", "present", "stored"]
    bench.settle()
    assert bench.tiers(chain(0, 3)) == ["flash", "flash", "dram"]
    damage_flash(bench, keys[1])
    bench.store.prefetch(keys)
    bench.settle()
    assert bench.tiers(chain(0, 3)) == ["dram"]
    assert worker.index.find(chain(0, 3)[2].header.key) is None


def test_other_block_in_a_flash_slot_is_never_served(bench: Bench) -> None:
    worker = worker_of(bench)
    parent = tree_block(0)
    siblings = [tree_block(1, parent), tree_block(2, parent)]
    worker.put([parent, *siblings])
    bench.settle()
    store_settled(bench, worker, 100, 8)
    index = bench.parts.index
    rows = [index.locate(key) for key in keys_of(siblings)]
    first, second = (row for row in rows if row is not None)
    slots = index.flash(first), index.flash(second)
    index.set_location(first, None, slots[1])
    index.set_location(second, None, slots[0])
    for key in keys_of(siblings):
        bench.store.prefetch([parent.header.key, key])
    bench.settle()
    assert bench.tiers([parent]) == ["dram"]
    assert [worker.index.find(key) for key in keys_of(siblings)] == [None, None]


def test_clear_drops_one_namespace_or_all_even_what_is_moving(bench: Bench) -> None:
    worker = worker_of(bench)
    mine, others = tree_block(0), tree_block(1, namespace=b"other namespace.".ljust(32))
    assert worker.put([mine, others, tree_block(2, mine)]) == ["stored"] * 3
    assert bench.store.clear(others.header.namespace) == 1
    assert bench.tiers([mine, tree_block(2, mine)]) == ["dram"] * 2
    assert bench.store.clear(b"no such".ljust(32)) == 0
    check(bench)
    assert bench.store.clear(None) == 2
    check(bench)
    bench.settle()
    assert bench.store.stats().blocks == 0
    assert bench.parts.flash is not None
    bench.run_until(lambda: bench.parts.flash.free_slots == 24)
    bench.close()
    worker_of(bench)
    assert bench.store.stats().blocks == 0, "not on flash either"


def test_record_is_read_from_either_tier(bench: Bench) -> None:
    worker = worker_of(bench)
    keys = store_settled(bench, worker, 0, 4)
    store_settled(bench, worker, 100, 8)
    moves = bench.parts.moves
    futures = [moves.read(key) for key in (*keys, keys_of(chain(100, 1))[0], keys[0])]
    lost = moves.read(BlockKey(b"never heard of.."))
    bench.run_until(lambda: all(future.done() for future in futures))
    for future, number in zip(futures, (0, 1, 2, 3, 100, 0), strict=True):
        block = make_block(number)
        assert bytes(future.result()[4096 : 4096 + 4800]) == block.payload.tobytes()
    with pytest.raises(BlockMissing):
        lost.result(0)
