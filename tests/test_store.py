"""The store as its callers see it: opening and closing, attaching, storing, reading, figures."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sim.blocks import NAMESPACE, SHAPE, SLOT_BYTES, Block, make_block
from sim.stores import Bench, Worker, chain, check, keys_of, tree_block

from kvist.cachesvc.catalog.index import IndexReader
from kvist.proto.errors import BlockCorrupt, BlockMissing, ConfigInvalid, FormatRefused
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.record import RecordShape, pack_header
from kvist.proto.shm import BUCKET_ROWS, CORRUPT, MISS_REASONS, PREFETCH, TIERS, TOUCH
from kvist.proto.slot import fill_slot


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def worker(bench: Bench) -> Worker:
    bench.open()
    return bench.worker()


def record_of(block: Block) -> memoryview:
    record = memoryview(bytearray(block.header.shape.record_bytes))
    fill_slot(record, block.header, block.payload)
    return record


def read_back(bench: Bench, block: Block) -> None:
    record = asyncio.run(bench.store.read_record(block.header.key))
    assert bytes(record[8:4096]) == bytes(record_of(block)[8:4096])
    assert np.array_equal(np.frombuffer(record[4096 : 4096 + 4800], np.uint8), block.payload)


def test_stored_blocks_are_found_and_right_and_nothing_is_before_commit(
    bench: Bench, worker: Worker
) -> None:
    blocks = chain(0, 4)
    slots = [answer.slot for answer in worker.reserve(blocks)]
    for slot, block in zip(slots, blocks, strict=True):
        assert slot is not None
        worker.fill(slot, block)
    assert worker.index.longest_prefix(keys_of(blocks)) == 0
    assert bench.store.lookup(keys_of(blocks)) == ([], "never_stored")
    assert worker.commit([slot for slot in slots if slot is not None]) == [True] * 4
    assert worker.index.longest_prefix(keys_of(blocks)) == 4
    assert bench.store.lookup(keys_of(blocks)) == (["dram"] * 4, "")
    assert bench.store.lookup(keys_of(chain(0, 6))) == (["dram"] * 4, "never_stored")
    assert all(worker.reads(block) for block in blocks)
    check(bench)


def test_commit_of_a_child_whose_parent_was_not_committed_is_refused(
    bench: Bench, worker: Worker
) -> None:
    parent, child = chain(0, 2)
    first, second = (answer.slot for answer in worker.reserve([parent, child]))
    assert first is not None
    assert second is not None
    worker.fill(second, child)
    assert worker.commit([second]) == [False]
    assert worker.commit([first]) == [False], "never filled"
    check(bench)
    assert bench.parts.dram.free_slots == 16
    assert bench.parts.placement.counts.commits_refused == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"key": BlockKey(b"another block...")},
        {"parent": BlockKey(b"another parent..")},
        {"depth": 7},
        {"namespace": b"another namespace".ljust(32)},
        {"payload_bytes": 1 << 40},
    ],
    ids=str,
)
def test_commit_of_another_record_than_was_reserved_is_refused(
    bench: Bench, worker: Worker, changes: dict[str, object]
) -> None:
    parent, child = chain(0, 2)
    assert worker.put([parent]) == ["stored"]
    slot = worker.reserve([child])[0].slot
    assert slot is not None
    header = replace(child.header, **changes)  # type: ignore[arg-type]
    view = bench.parts.dram.slot_view(slot)
    fill_slot(view, replace(child.header, payload_bytes=4800), child.payload)
    pack_header(header, view)
    assert worker.commit([slot]) == [False]
    assert bench.tiers([parent, child]) == ["dram"]
    assert worker.put([child]) == ["stored"]
    check(bench)


def test_a_commit_that_is_refused_says_why(bench: Bench, worker: Worker) -> None:
    session, buckets = worker.info.session, bench.parts.index.buckets

    def one(number: int, below: Block | None = None) -> Block:
        """A block whose key belongs into the first bucket alone."""
        block, halves = tree_block(number, below), (number * buckets, (number + 9) * buckets)
        key = BlockKey(b"".join(half.to_bytes(8, "little") for half in halves))
        return Block(replace(block.header, key=key), block.payload)

    def commit(*blocks: Block) -> list[str]:
        slots = [answer.slot or 0 for answer in worker.reserve(blocks)]
        for slot, block in zip(slots, blocks, strict=True):
            worker.fill(slot, block)
        return list(bench.store.commit(session, slots))

    assert commit(*map(one, range(1, BUCKET_ROWS + 1))) == [""] * BUCKET_ROWS
    first = one(BUCKET_ROWS + 1)
    assert commit(first, tree_block(100, first)) == ["index_full", "no_parent"]
    assert bench.store.commit(session, [0]) == ["torn"], "not the session's"
    counts = bench.parts.placement.counts
    assert (counts.index_refused, counts.commits_refused) == (1, 1)
    assert bench.store.stats().reserved_slots == 0
    check(bench)


def test_aborted_block_can_be_reserved_again(bench: Bench, worker: Worker) -> None:
    blocks = chain(0, 3)
    slots = [answer.slot or 0 for answer in worker.reserve(blocks)]
    bench.store.abort(worker.info.session, slots)
    assert bench.store.stats().reserved_slots == 0
    assert worker.put(blocks) == ["stored"] * 3


def test_records_go_in_and_come_out_without_a_session(bench: Bench) -> None:
    bench.open(slot_bytes=None)
    with pytest.raises(BlockMissing):
        read_back(bench, tree_block(0))
    blocks = chain(0, 3)
    assert bench.store.put_record(record_of(blocks[1])) == "refused", "its parent is not there"
    assert [bench.store.put_record(record_of(block)) for block in blocks] == ["stored"] * 3
    assert bench.store.put_record(record_of(blocks[1])) == "present"
    for block in blocks:
        read_back(bench, block)
    with pytest.raises(BlockMissing):
        read_back(bench, tree_block(99))
    check(bench)


def test_damaged_record_does_not_go_in(bench: Bench, worker: Worker) -> None:
    record = record_of(tree_block(0))
    for place in (9, 30, 4200):
        damaged = memoryview(bytearray(record))
        damaged[place] ^= 1
        with pytest.raises(BlockCorrupt):
            bench.store.put_record(damaged)
    for length in (0, 4096, 5000):
        with pytest.raises(BlockCorrupt):
            bench.store.put_record(record[:length])
    assert bench.store.stats().blocks == 0
    del worker


def test_record_that_needs_room_evicts_as_a_stored_block_does(bench: Bench) -> None:
    bench.open()
    for number in range(40):
        assert bench.store.put_record(record_of(tree_block(number))) == "stored"
    assert bench.store.stats().blocks == 16
    check(bench)


def test_size_of_slots_comes_from_the_first_worker(bench: Bench) -> None:
    bench.open(slot_bytes=None)
    assert bench.store.tick() is False
    assert bench.store.stats().tiers == ()
    assert bench.store.lookup([NO_KEY]) == ([], "never_stored")
    assert (bench.store.prefetch([NO_KEY]), bench.store.clear(None)) == (0, 0)
    info = bench.worker().info
    assert (info.slot_bytes, info.dram_slots) == (SLOT_BYTES, 16)
    assert bench.worker(RecordShape(100, 4)).info.slot_bytes == SLOT_BYTES, "smaller ones fit"
    with pytest.raises(ConfigInvalid, match="slot_bytes"):
        bench.worker(RecordShape(SLOT_BYTES, 4))


def test_first_worker_whose_blocks_do_not_fit_at_all_leaves_nothing_behind(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=4, flash_slots=8)
    bench.open(slot_bytes=None)
    with pytest.raises(ConfigInvalid, match="dram_bytes"):
        bench.worker(RecordShape(1 << 20, 4))
    assert bench.worker().put(chain(0, 2)) == ["stored"] * 2
    bench.close()


def test_size_of_slots_comes_from_a_flash_folder_that_has_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=4, flash_slots=8)
    bench.open()
    bench.worker().put(chain(0, 2))
    bench.close()
    bench.open(slot_bytes=None)
    assert bench.tiers(chain(0, 2)) == ["flash"] * 2
    bench.close()
    with pytest.raises(FormatRefused, match="flash_path"):
        bench.open(slot_bytes=2 * SLOT_BYTES)
    bench.open(slot_bytes=SLOT_BYTES)
    bench.close()


def test_second_store_on_the_same_folders_is_refused_and_the_first_goes_on(
    bench: Bench, worker: Worker
) -> None:
    second = Bench(bench.config.run_dir.parent)
    with pytest.raises(ConfigInvalid, match="another sidecar"):
        second.open()
    other_run = Bench(bench.config.run_dir.parent)
    with pytest.raises(ConfigInvalid, match="another sidecar"):
        other_run.open(run_dir=bench.config.run_dir.with_name("other"))
    assert worker.put(chain(0, 1)) == ["stored"]


def test_files_of_an_earlier_life_are_removed_and_nothing_else(bench: Bench) -> None:
    shm = bench.config.shm_dir
    shm.mkdir()
    for name in ("index", "arena", "ring-old-1", "precious"):
        (shm / name).write_text("old")
    bench.open()
    assert {path.name for path in shm.iterdir()} == {"index", "arena", "precious", "store.lock"}
    bench.worker()
    bench.close()
    assert {path.name for path in shm.iterdir()} == {"precious", "store.lock"}


def test_life_that_was_killed_leaves_its_place_to_the_next(bench: Bench) -> None:
    program = (
        "import sys, os, time\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from sim.stores import Bench\n"
        "bench = Bench(Path(sys.argv[1]))\n"
        "bench.open()\n"
        "bench.worker()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    tests, folder = Path(__file__).parent, bench.config.run_dir.parent
    subprocess.run([sys.executable, "-c", program, str(folder), str(tests)], check=False)
    assert len(list(bench.config.shm_dir.glob("ring-*"))) == 1
    bench.open()
    assert list(bench.config.shm_dir.glob("ring-*")) == []
    assert bench.worker().put(chain(0, 2)) == ["stored"] * 2


def test_worker_of_an_earlier_life_harms_nobody(bench: Bench) -> None:
    bench.open()
    old = bench.worker()
    slot = old.reserve([tree_block(0)])[0].slot
    assert slot is not None
    bench.store.close()
    old_epoch = old.info.boot_epoch
    bench.open()
    new = bench.worker()
    blocks = chain(100, 16)
    assert new.put(blocks) == ["stored"] * 16
    old.fill(slot, tree_block(0))
    assert all(new.reads(block) for block in blocks)
    assert new.index.boot_epoch == bench.store.boot_epoch != old_epoch
    assert old.index.boot_epoch == old_epoch


def test_heartbeat_is_the_time_of_the_last_tick(bench: Bench, worker: Worker) -> None:
    bench.clock_s = 2000.5
    bench.store.tick()
    assert worker.index.heartbeat_ns == 2_000_500_000_000


def test_posted_results_that_come_after_the_end_are_ignored(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=8, flash_slots=16)
    bench.open()
    worker = bench.worker()
    worker.put(chain(0, 8))
    bench.close()  # runs what was posted, after the store has closed
    bench.store.session_closed(worker.info.session)
    bench.open()
    assert bench.tiers(chain(0, 8)) != []
    bench.close()


def test_ring_entries_of_any_content_are_survived(bench: Bench, worker: Worker) -> None:
    worker.put(chain(0, 2))
    keys = [*keys_of(chain(0, 2)), NO_KEY, BlockKey(bytes([255]) * 16)]
    for kind in (0, TOUCH, PREFETCH, CORRUPT, 4, 2**32 - 1):
        for key in keys:
            worker.ring.push(kind, 2**32 - 1, key)
    bench.store.tick()
    assert bench.tiers(chain(0, 2)) == ["dram"] * 2
    check(bench)


def test_figures_say_what_is_there_and_what_was_done(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=8, flash_slots=16)
    bench.open()
    worker = bench.worker()
    blocks = chain(0, 6)
    worker.put(blocks[:4])
    bench.settle()
    worker.put(blocks[4:])
    bench.settle()
    worker.reserve([tree_block(50)])
    bench.clock_s += 12.5
    stats = bench.store.stats()
    assert stats.uptime_s == 12.5
    assert (stats.blocks, stats.sessions, stats.reserved_slots) == (6, 1, 1)
    dram, flash = stats.tiers
    assert (dram.tier, dram.state, dram.slots, dram.used_slots) == ("dram", "ready", 8, 7)
    assert (flash.tier, flash.state, flash.slots, flash.used_slots) == ("flash", "ready", 16, 6)
    assert (dram.written_blocks, flash.written_blocks) == (6, 6)
    assert set(stats.hit_tokens) == set(TIERS)
    assert set(stats.miss_tokens) == set(MISS_REASONS)
    bench.close()


def test_index_of_a_reader_survives_the_close_of_the_store(bench: Bench, worker: Worker) -> None:
    worker.put(chain(0, 2))
    path = worker.info.index_path
    reader = IndexReader(path)
    bench.store.close()
    assert not path.exists()
    assert reader.longest_prefix(keys_of(chain(0, 2))) == 2
    reader.close()


def test_arena_is_touched_in_the_background_and_the_end_waits_for_that(bench: Bench) -> None:
    before = set(threading.enumerate())
    bench.open(prefault=True)
    assert bench.worker().put(chain(0, 8)) == ["stored"] * 8
    bench.close()
    left = set(threading.enumerate()) - before
    assert not [each for each in left if each.name.startswith("kvist-")]


def test_attach_tells_everything_a_worker_needs(bench: Bench, worker: Worker) -> None:
    info = bench.store.attach("b", 7, NAMESPACE, "in words", SHAPE)
    assert info.boot_epoch == bench.store.boot_epoch
    assert info.session != worker.info.session
    assert all(path.exists() for path in (info.index_path, info.arena_path, info.ring_path))
    assert info.bell_path.parent == bench.config.run_dir
    assert make_block(0).header.shape.record_bytes <= info.slot_bytes


def test_reader_of_a_damaged_block_does_not_keep_the_arena_mapped(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.open()
    worker, (block,) = bench.worker(), chain(0, 1)
    assert worker.put([block]) == ["stored"]
    gc.collect()
    gc.disable()  # what is given back below is given back because nobody holds it
    try:
        slot = bench.parts.index.find(block.header.key).dram  # type: ignore[union-attr]
        bench.parts.dram.slot_view(slot)[100] ^= 1  # type: ignore[arg-type]
        asked = bench.parts.moves.read(block.header.key)
        with pytest.raises(BlockCorrupt):
            asked.result()
        bench.close()
        held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        assert not [path for path in held if path.startswith(str(tmp_path))]
    finally:
        gc.enable()
