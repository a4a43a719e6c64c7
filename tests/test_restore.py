"""The flash tier's life in a store: restart, lost index, failing device."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.blocks import make_block
from sim.disk import FaultyDisk
from sim.flash import filled
from sim.stores import Bench, chain, check, keys_of, store_settled, tree_block, worker_of


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=8, flash_slots=24)
    yield made
    check(made)
    made.close()


def test_restart_finds_again_what_was_on_flash(bench: Bench) -> None:
    worker = worker_of(bench)
    store_settled(bench, worker, 0, 8)
    worker.put(chain(100, 8)[:2])  # still on their way to flash
    bench.close()
    worker = worker_of(bench)
    assert bench.tiers(chain(0, 8)) == ["flash"] * 8
    assert bench.tiers(chain(100, 2)) == ["flash"] * 2
    assert bench.parts.placement.counts.orphans_dropped == 0
    bench.store.prefetch(keys_of(chain(0, 8)))
    bench.settle()
    assert all(worker.reads(block) for block in chain(0, 8))


def test_orphans_on_flash_are_dropped_at_the_start_and_their_slots_are_free(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=8, flash_slots=24)
    filled(tmp_path / "flash", blocks=8)
    bench.open()
    flash = bench.parts.flash
    assert flash is not None
    row = bench.parts.index.locate(make_block(3).header.key)
    assert row is not None
    bench.parts.placement.unlisted.append(make_block(3).header.key)  # as if it had been lost
    bench.close()
    bench.open()
    assert bench.store.stats().blocks == 3
    assert bench.parts.placement.counts.orphans_dropped == 4
    assert bench.parts.flash is not None
    assert bench.parts.flash.free_slots == 21
    check(bench)
    bench.close()
    bench.open()
    assert bench.parts.placement.counts.orphans_dropped == 0
    bench.close()


def test_lost_index_is_rebuilt_in_the_background_while_stores_go_on(bench: Bench) -> None:
    worker = worker_of(bench)
    store_settled(bench, worker, 0, 8)
    bench.close()
    assert bench.config.flash_path is not None
    (bench.config.flash_path / "index.mdb").unlink()
    worker = worker_of(bench)
    assert bench.store.stats().tiers[1].state == "rebuilding"
    assert worker.put([tree_block(0)]) == ["stored"]
    assert bench.store.lookup(keys_of(chain(0, 8)))[1] == "flash_rebuilding"
    check(bench)
    bench.run_until(lambda: bench.parts.moves.state == "ready")
    assert bench.tiers(chain(0, 8)) == ["dram"] + ["flash"] * 7
    bench.store.prefetch(keys_of(chain(0, 8)))
    bench.settle()
    assert all(worker.reads(block) for block in chain(0, 8))


def test_what_is_cleared_during_a_rebuild_stays_away(bench: Bench) -> None:
    store_settled(bench, worker_of(bench), 0, 8)
    bench.close()
    assert bench.config.flash_path is not None
    (bench.config.flash_path / "index.mdb").unlink()
    worker_of(bench)
    bench.store.clear(None)
    bench.run_until(lambda: bench.parts.moves.state == "ready")
    assert bench.store.stats().blocks == 0
    bench.close()
    worker_of(bench)
    assert bench.store.stats().blocks == 0


def test_failed_device_ends_the_moves_and_dram_goes_on_and_comes_back(bench: Bench) -> None:
    disk = FaultyDisk()
    bench.open(disk)
    worker = bench.worker()
    keys = store_settled(bench, worker, 0, 4)
    store_settled(bench, worker, 100, 8)
    disk.broken = {"pwrite": errno.EIO, "pread": errno.EIO, "sync": errno.EIO}
    assert bench.store.prefetch(keys) == 4
    bench.settle()
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    assert bench.store.lookup(keys) == ([], "flash_off")
    check(bench)
    assert worker.put(chain(200, 4)) == ["stored"] * 4
    assert worker.put(chain(0, 2)) == ["stored"] * 2, "worth having in DRAM again"
    assert bench.tiers(chain(0, 2)) == ["dram"] * 2
    counts = bench.parts.placement.counts
    assert (counts.sinks_dropped, counts.sinks_failed) == (0, 4), "the device, not the queue"
    disk.broken = {}
    bench.clock_s += 1.1
    bench.run_until(lambda: bench.parts.moves.state == "ready")
    assert bench.tiers(chain(0, 4)) == ["dram"] * 2 + ["flash"] * 2
    bench.store.prefetch(keys)
    bench.settle()
    assert all(worker.reads(block) for block in chain(0, 4))


def test_device_that_fails_amid_sinks_leaves_no_slot_behind(bench: Bench) -> None:
    disk = FaultyDisk()
    bench.open(disk)
    worker = bench.worker()
    disk.broken = {"pwrite": errno.ENOSPC}
    worker.put(chain(0, 8))
    bench.settle()
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    assert bench.parts.flash is not None
    assert bench.parts.flash.free_slots == 24
    assert bench.tiers(chain(0, 8)) == ["dram"] * 8
    assert worker.put(chain(100, 8)) == ["stored"] * 8, "eviction still works"


def test_device_that_cannot_be_opened_leaves_a_store_without_flash(bench: Bench) -> None:
    disk = FaultyDisk()
    disk.broken = {"fallocate": errno.ENOSPC}
    bench.open(disk)
    worker = bench.worker()
    assert worker.put(chain(0, 2)) == ["stored"] * 2
    assert bench.store.stats().tiers[1].state == "failed"
    assert bench.tiers(chain(0, 2)) == ["dram"] * 2
