"""Clear: nothing is found from the first moment on, and no piece of the work holds anybody up."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.blocks import NAMESPACE
from sim.disk import FaultyDisk
from sim.flash import flip
from sim.stores import (
    Bench,
    chain,
    check,
    comes_back,
    in_pieces,
    keys_of,
    store_settled,
    tree_block,
    worker_of,
)

from kvist.cachesvc.catalog.hidden import masked
from kvist.cachesvc.core.browse import Asked, Browser
from kvist.cachesvc.events.journal import Journal
from kvist.cachesvc.placing.clearing import STEP_BLOCKS
from kvist.proto.errors import BlockMissing
from kvist.proto.keys import BlockKey
from kvist.proto.shm import TOUCH

OTHER = b"another namespace".ljust(32)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=16, flash_slots=24)
    yield made
    check(made)
    made.close()


def test_no_piece_of_a_clear_is_longer_than_the_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=1000)
    worker = worker_of(bench)
    for first in range(0, 1000, 100):
        assert set(worker.put(chain(first, 100))) == {"stored"}
    assert bench.store.clear(None) == 1000
    clearing, pieces = bench.parts.moves.clearing, 1
    assert bench.parts.dram.free_slots == STEP_BLOCKS
    while clearing.busy:
        check(bench)
        assert bench.store.tick() is clearing.busy, "while there is more, the next tick comes soon"
        pieces += 1
    assert pieces == -(-1000 // STEP_BLOCKS)
    assert clearing.longest_step == STEP_BLOCKS
    assert bench.parts.dram.free_slots == 1000
    bench.close()


def test_a_cleared_block_is_found_by_nobody_though_it_is_not_dropped_yet(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=2)
    keys = store_settled(bench, worker, 0, 8)
    bench.store.clear(None)
    assert bench.parts.index.used_rows == 6
    assert bench.store.stats().blocks == 0
    assert bench.store.lookup(keys) == ([], "cleared")
    assert [worker.index.miss_reason(key) for key in keys] == ["cleared"] * 8
    assert worker.index.longest_prefix(keys) == 0
    assert not any(worker.reads(block) for block in chain(0, 8))
    assert bench.store.prefetch(keys) == 0
    assert bench.store.pin(keys, 60, 1) == 0
    browser = Browser(bench.parts)
    assert browser.page(Asked()).runs == []
    assert browser.page(Asked()).spaces == []
    assert browser.page(Asked(key=masked(keys[0], 1).hex())).runs == []
    with pytest.raises(BlockMissing, match="cleared"):
        browser.evict(keys[0], descendants=True)
    check(bench)
    bench.settle()
    assert bench.store.lookup(keys) == ([], "cleared")


def test_what_is_stored_meanwhile_stays_also_under_a_cleared_key(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=2)
    keys = store_settled(bench, worker, 0, 8)
    bench.store.clear(NAMESPACE)
    assert set(worker.put(chain(0, 4))) == {"stored"}
    assert bench.tiers(chain(0, 8)) == ["dram"] * 4
    assert bench.store.lookup(keys)[1] == "cleared"
    check(bench)
    bench.settle()
    assert bench.tiers(chain(0, 8)) == ["dram"] * 4
    assert all(worker.reads(block) for block in chain(0, 4))
    bench.close()
    in_pieces(bench, blocks=2)
    assert bench.tiers(chain(0, 8)) == ["flash"] * 4, "they sank after their keys had left flash"


def test_a_block_whose_parent_was_cleared_is_refused(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=2)
    blocks = chain(0, 6)
    worker.put(blocks[:4])
    (reserved,) = worker.reserve(blocks[4:5])
    assert reserved.slot is not None
    worker.fill(reserved.slot, blocks[4])
    bench.store.clear(None)
    (answer,) = worker.reserve(blocks[3:4])
    assert answer.reason == "no_parent"
    assert worker.commit([reserved.slot]) == [False]
    assert bench.store.stats().blocks == 0


def test_cleared_blocks_make_room_before_others_are_evicted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=12)
    worker = in_pieces(bench, blocks=1)
    mine = [tree_block(number) for number in range(6)]
    others = [tree_block(number, namespace=OTHER) for number in range(100, 106)]
    assert set(worker.put([*mine, *others])) == {"stored"}
    bench.store.clear(OTHER)
    assert set(worker.put([tree_block(number) for number in range(6, 12)])) == {"stored"}
    assert bench.parts.placement.counts.dram_evicted == 0
    assert all(worker.reads(block) for block in mine)
    check(bench)
    bench.close()


def test_a_second_clear_meanwhile_drops_what_was_stored_since_the_first(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=2)
    worker.put([*chain(0, 4), tree_block(50, namespace=OTHER)])
    bench.store.clear(NAMESPACE)
    worker.put(chain(0, 3))
    assert bench.store.clear(NAMESPACE) == 3
    check(bench)
    assert bench.store.clear(None) == 1
    worker.put(chain(0, 2))
    bench.settle()
    assert bench.store.stats().blocks == 2
    assert bench.tiers(chain(0, 4)) == ["dram"] * 2


def test_reads_of_cleared_blocks_and_what_was_sinking_end(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=2)
    store_settled(bench, worker, 0, 4)
    bench.close()
    worker = in_pieces(bench, blocks=1)
    key = keys_of(chain(0, 1))[0]
    record = bench.parts.moves.read(key)
    worker.put(chain(100, 4))
    assert bench.parts.placement.jobs
    bench.store.clear(None)
    assert not bench.parts.placement.jobs
    check(bench)
    bench.settle()
    with pytest.raises(BlockMissing):
        record.result(0)
    assert bench.parts.flash is not None
    bench.run_until(lambda: not bench.parts.moves._sinking)
    assert bench.parts.flash.free_slots == 24


def test_a_sidecar_that_closes_amid_a_clear_finds_nothing_again(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=2)
    keys = store_settled(bench, worker, 0, 8)
    worker.put(chain(100, 4))  # on their way to flash
    waiting = bench.parts.moves.cleared
    bench.store.clear(None)
    answer = waiting()
    assert not answer.done()
    bench.close()
    assert answer.done()
    in_pieces(bench, blocks=2)
    assert bench.store.lookup(keys)[0] == []
    assert bench.store.stats().blocks == 0


def test_a_clear_is_answered_when_flash_has_forgotten_too(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=2)
    store_settled(bench, worker, 0, 8)
    bench.store.clear(None)
    gone_early, gone = bench.parts.moves.cleared(), bench.parts.moves.cleared()
    gone_early.cancel()  # its client went away
    assert not gone.done()
    bench.run_until(gone.done)
    io = bench.parts.moves._io
    assert io is not None
    assert io.deletes_done == io.deletes_asked
    assert not bench.parts.moves.clearing.busy


def test_a_clear_while_a_failed_folder_is_let_go_holds_for_what_is_on_it(bench: Bench) -> None:
    disk = FaultyDisk()
    bench.open(disk)
    worker = bench.worker()
    bench.parts.moves.clearing.step_blocks = 1
    keys = store_settled(bench, worker, 0, 8)
    disk.broken = {"pwrite": errno.EIO, "sync": errno.EIO}
    worker.put(chain(100, 2))
    watch = bench.parts.moves._watch
    assert watch is not None

    def leaves() -> bool:
        bench.clock_s += 2.0
        return watch._leaving is not None

    bench.run_until(leaves)
    bench.store.clear(None)
    bench.settle()
    disk.broken.clear()
    comes_back(bench)
    bench.settle()
    assert bench.store.lookup(keys)[0] == []
    assert bench.store.stats().blocks == 0


def test_a_damaged_copy_of_a_cleared_block_is_nobodys_business(bench: Bench) -> None:
    worker = in_pieces(bench, blocks=1)
    keys = store_settled(bench, worker, 0, 4)
    location = worker.index.find(keys[0])
    assert location is not None
    assert location.flash is not None
    assert bench.config.flash_path is not None
    flip(bench.config.flash_path / "segment-00000", location.flash * bench.parts.dram.slot_bytes)
    bench.store.clear(None)
    worker.ring.push(TOUCH, 1, keys[-1])
    bench.settle()
    assert bench.parts.placement.counts.flash_corrupt == 0
    assert bench.parts.placement.uses.found_blocks == 0, "a touch of what is gone is no use"


def test_routers_hear_of_a_clear_but_not_of_one_of_what_is_there_again(tmp_path: Path) -> None:
    journal = Journal()
    bench = Bench(tmp_path, dram_slots=16)
    bench.open(journal=journal)
    worker = bench.worker()
    bench.parts.moves.clearing.step_blocks = 1
    worker.put(chain(0, 6))
    journal.take()
    bench.store.clear(None)
    worker.put(chain(0, 2))
    bench.settle()
    told: dict[BlockKey, bool] = {
        key: facts is not None for (key, _), facts in journal.take().items()
    }
    assert [told[key] for key in keys_of(chain(0, 6))] == [True] * 2 + [False] * 4
    bench.close()
