"""Admission to flash: what is worth a write, how much may be written, and what was."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.blocks import SLOT_BYTES, Block
from sim.disk import FaultyDisk
from sim.stores import Bench, chain, check, comes_back, keys_of, worker_of

from kvist.cachesvc.flash.budget import BOOK_NAME, BOOK_S, DAY_S, Wear, WearBook, WriteBudget
from kvist.proto.shm import TOUCH


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, 16, 4)
    made.config = replace(made.config, flash_admission="second_use")
    yield made
    made.close()


def on_flash(bench: Bench, blocks: list) -> list[bool]:  # type: ignore[type-arg]
    index = bench.parts.index
    found = [index.find(key) for key in keys_of(blocks)]
    return [each is not None and each.flash is not None for each in found]


def events(bench: Bench) -> tuple[int, int, int]:
    counts = bench.parts.placement.counts
    return counts.sinks_first_use, counts.sinks_over_budget, counts.sinks_dropped


def test_free_slots_take_what_is_new_and_a_full_tier_what_is_used_again(bench: Bench) -> None:
    worker = worker_of(bench)
    old, new = chain(0, 4), chain(100, 3)
    worker.put(old)
    bench.settle()
    assert on_flash(bench, old) == [True] * 4
    worker.put(new)
    bench.settle()
    assert on_flash(bench, new) == [False] * 3
    assert events(bench) == (3, 0, 0)
    worker.ring.push(TOUCH, 2, keys_of(new)[1])
    bench.store.tick()
    bench.settle()
    assert on_flash(bench, new) == [True, True, False], "used again, and with it what is before"
    check(bench)


def test_what_is_stored_anew_after_its_eviction_is_used_again(bench: Bench) -> None:
    worker = worker_of(bench)
    worker.put(chain(0, 4))
    bench.settle()
    new = chain(100, 3)
    worker.put(new)
    worker.put(chain(200, 16))  # all that DRAM has room for
    assert on_flash(bench, new) == [False] * 3
    index = bench.parts.index
    assert [index.miss_reason(key) for key in keys_of(new)] == ["not_admitted"] * 3
    assert worker.put(new) == ["stored"] * 3
    bench.settle()
    assert on_flash(bench, new) == [True] * 3
    check(bench)


def test_always_writes_everything(bench: Bench) -> None:
    bench.open(flash_admission="always")
    worker = bench.worker()
    for first in (0, 100, 200):
        worker.put(chain(first, 4))
        bench.settle()
        assert on_flash(bench, chain(first, 4)) == [True] * 4
    assert events(bench) == (0, 0, 0)


def test_over_the_budget_nothing_is_written_until_time_has_filled_it(bench: Bench) -> None:
    burst = 3 * SLOT_BYTES
    bench.open(flash_write_bytes_per_day=burst * 24, flash_write_burst_bytes=burst)
    worker = bench.worker()
    blocks = chain(0, 4)
    worker.put(blocks)
    bench.settle()
    assert on_flash(bench, blocks) == [True] * 3 + [False]
    assert events(bench) == (0, 1, 0)
    assert bench.store.stats().wear == _wear(3, 3, 0, burst * 24)
    bench.clock_s += 3600 / 3 + 1
    worker.ring.push(TOUCH, 4, keys_of(blocks)[3])
    bench.store.tick()
    bench.settle()
    assert on_flash(bench, blocks) == [True] * 4
    check(bench)


def _wear(life: int, folder: int, left: int | None, per_day: int | None) -> Wear:
    left_bytes = None if left is None else left * SLOT_BYTES
    return Wear(life * SLOT_BYTES, folder * SLOT_BYTES, left_bytes, per_day)


def test_a_restart_is_no_new_burst_and_the_folder_remembers_its_wear(bench: Bench) -> None:
    limits = {"flash_write_bytes_per_day": 1 << 20, "flash_write_burst_bytes": 2 * SLOT_BYTES}
    bench.open(**limits)
    bench.worker().put(chain(0, 2))
    bench.settle()
    bench.close()
    bench.open(**limits)
    assert bench.store.stats().wear == _wear(0, 2, 0, 1 << 20)
    bench.worker().put(chain(100, 2))
    bench.settle()
    assert on_flash(bench, chain(100, 2)) == [False] * 2
    bench.close()
    bench.open(flash_write_bytes_per_day=None)
    assert bench.store.stats().wear == _wear(0, 2, None, None)


def test_the_book_is_written_while_the_store_lives(bench: Bench) -> None:
    bench.open()
    bench.worker().put(chain(0, 2))
    bench.settle()
    book = bench.config.flash_path / BOOK_NAME  # type: ignore[operator]
    bench.clock_s += BOOK_S + 1
    bench.run_until(lambda: book.exists())
    assert json.loads(book.read_text())["written_bytes"] == 2 * SLOT_BYTES


def test_a_book_that_cannot_be_read_is_a_new_one(tmp_path: Path) -> None:
    for text in ("", "{}", "[1]", '{"written_bytes": "x", "budget_left_bytes": 1}', "\x00"):
        (tmp_path / BOOK_NAME).write_text(text)
        book = WearBook(tmp_path)
        book.save(9, 9)
        assert (tmp_path / BOOK_NAME).read_text() == text, "of a folder that is not open yet"
        book.read()
        assert (book.earlier_bytes, book.left_bytes) == (0, None)
        book.save(5, 7)
        again = WearBook(tmp_path)
        again.read()
        assert (again.earlier_bytes, again.left_bytes) == (5, 7)


@settings(max_examples=200, deadline=None)
@given(
    per_day=st.integers(1, 10**12),
    burst=st.integers(1, 10**10),
    waits=st.lists(st.floats(0, 10 * DAY_S), max_size=20),
)
def test_no_more_is_written_than_the_burst_and_what_time_has_filled(
    per_day: int, burst: int, waits: list[float]
) -> None:
    clock = [1000.0]
    budget = WriteBudget(per_day, burst, lambda: clock[0])
    spent = 0
    for wait in waits:
        left = budget.left_bytes
        assert left is not None
        assert 0 <= left <= burst
        budget.spend(left)
        spent += left
        clock[0] += wait
    elapsed_s = clock[0] - 1000.0
    assert spent <= burst + per_day * elapsed_s / DAY_S + 1


def fail_and_store(bench: Bench, disk: FaultyDisk, blocks: list[Block]) -> None:
    """The device fails, and blocks are stored meanwhile."""
    worker = bench.worker()
    disk.broken = {"pwrite": errno.EIO, "sync": errno.EIO}
    worker.put(chain(900, 1))
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    assert worker.put(blocks) == ["stored"] * len(blocks)
    disk.broken = {}


def test_what_was_stored_while_flash_was_away_gets_there_unasked_when_it_is_back(
    tmp_path: Path,
) -> None:
    bench, disk, blocks = Bench(tmp_path, 64, 64), FaultyDisk(), chain(0, 40)
    bench.open(disk)
    fail_and_store(bench, disk, blocks)
    counts = bench.parts.placement.counts
    assert (counts.sinks_dropped, counts.sinks_failed) == (0, 41)
    comes_back(bench)

    def all_there() -> bool:
        check(bench)
        assert bench.parts.moves.queued["write"] <= 8
        return all(on_flash(bench, blocks + chain(900, 1)))

    bench.run_until(all_there)
    assert (counts.flash_written, counts.sinks_dropped) == (41, 0)
    bench.close()


def test_what_is_offered_again_keeps_to_the_budget_and_starts_with_the_parents(
    tmp_path: Path,
) -> None:
    bench, disk, blocks = Bench(tmp_path, 64, 64), FaultyDisk(), chain(0, 6)
    day = int(DAY_S * SLOT_BYTES / 1000)  # a block in 1000 s
    limits = {"flash_write_bytes_per_day": day, "flash_write_burst_bytes": 4 * SLOT_BYTES}
    bench.open(disk, **limits)
    fail_and_store(bench, disk, blocks)
    comes_back(bench)
    bench.run_until(lambda: (bench.parts.admission.wear.left_bytes or 0) < SLOT_BYTES)
    for _ in range(20):
        bench.store.tick()
    bench.settle()
    there = on_flash(bench, blocks)
    assert sorted(there, reverse=True) == there, "parents first"
    assert 0 < sum(there) < 6
    bench.clock_s += 7000.0
    bench.run_until(lambda: sum(on_flash(bench, blocks)) > sum(there))
    check(bench)
    bench.close()
