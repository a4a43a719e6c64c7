"""A flash folder that cannot be opened at the start: DRAM serves, and flash comes on by itself.

With real mounts in test_flash_mounts.py; what a person must mend is refused, at the start.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.blocks import NAMESPACE, SLOT_BYTES
from sim.disk import FaultyDisk
from sim.sidecar import Sidecar, wait_until
from sim.stores import Bench, chain, check, comes_back, keys_of, store_settled, worker_of

from kvist.cachesvc.flash.budget import BOOK_NAME
from kvist.cachesvc.flash.watch import OPEN_S_MAX, backoff_s
from kvist.proto.errors import ConfigInvalid, FormatRefused, TierOffline
from kvist.tiers.flash import FlashTier
from kvist.tiers.flash_clear import clear_directory
from kvist.tiers.segment import SEGMENT_BYTES

FLASH_SLOTS = 24


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=8, flash_slots=FLASH_SLOTS)
    yield made
    check(made)
    made.close()


@pytest.fixture
def folder(bench: Bench) -> Path:
    """The flash folder with blocks 0 to 7 in it, and nothing open."""
    store_settled(bench, worker_of(bench), 0, 8)
    bench.close()
    return bench.config.flash_path or Path()


def hide(folder: Path) -> Path:
    """Something else stands in a folder's place; where the folder is."""
    away = folder.with_name("away")
    folder.rename(away)
    folder.write_text("no folder")
    return away


def show(folder: Path) -> None:
    folder.unlink()
    folder.with_name("away").rename(folder)


def flash_of(bench: Bench) -> tuple[str, str]:
    """State and failure, as /stats.json has them."""
    use = bench.store.stats().tiers[-1]
    assert use.tier == "flash"
    return use.state, use.failure


def test_a_folder_that_cannot_be_made_is_a_failed_tier_until_it_can(bench: Bench) -> None:
    folder = bench.config.flash_path or Path()
    folder.write_text("no folder")
    worker = worker_of(bench)
    state, failure = flash_of(bench)
    assert state == "failed"
    assert str(folder) in failure
    assert worker.put(chain(0, 4)) == ["stored"] * 4, "DRAM goes on"
    assert bench.store.lookup(keys_of(chain(500, 1))) == ([], "flash_off"), "it may be there"
    folder.unlink()
    comes_back(bench)
    assert flash_of(bench) == ("ready", "")
    assert bench.store.lookup(keys_of(chain(500, 1))) == ([], "never_stored")
    store_settled(bench, worker, 100, 4)
    assert bench.parts.placement.counts.flash_written == 4


def test_what_an_earlier_life_left_is_found_when_the_folder_is_back(
    bench: Bench, folder: Path
) -> None:
    wear = json.loads((folder / BOOK_NAME).read_text())["written_bytes"]
    assert wear == 8 * SLOT_BYTES
    hide(folder)
    worker = worker_of(bench)
    assert bench.store.lookup(keys_of(chain(0, 8))) == ([], "flash_off")
    assert set(worker.put(chain(0, 3))) == {"stored"}, "anew: nobody knows that it is there"
    show(folder)
    comes_back(bench)
    assert bench.tiers(chain(0, 8)) == ["dram"] * 3 + ["flash"] * 5
    assert bench.store.stats().wear.folder_bytes == wear  # type: ignore[union-attr]
    bench.store.prefetch(keys_of(chain(0, 8)))
    bench.run_until(lambda: bench.tiers(chain(0, 8)) == ["dram"] * 8)
    bench.settle()
    assert all(worker.reads(block) for block in chain(0, 8))


@pytest.mark.parametrize("namespace", [None, NAMESPACE])
def test_what_was_cleared_before_the_folder_came_does_not_come_back(
    bench: Bench, folder: Path, namespace: bytes | None
) -> None:
    hide(folder)
    worker = worker_of(bench)
    bench.store.clear(namespace)
    assert set(worker.put(chain(100, 2))) == {"stored"}
    show(folder)
    comes_back(bench)
    assert bench.tiers(chain(0, 8)) == []
    assert bench.tiers(chain(100, 2)) == ["dram"] * 2, "stored after the clear"
    bench.settle()
    bench.close()
    bench.open()
    assert bench.tiers(chain(0, 8)) == [], "nor at the next start"


def test_a_lost_index_is_rebuilt_when_the_folder_comes_late(bench: Bench, folder: Path) -> None:
    (folder / "index.mdb").unlink()
    hide(folder)
    bench.open()
    show(folder)
    comes_back(bench)
    assert bench.tiers(chain(0, 8)) == ["flash"] * 8


@pytest.mark.parametrize("operation", ["fallocate", "direct", "pread"])
def test_a_device_that_fails_at_the_start_comes_on_when_it_works(
    bench: Bench, folder: Path, operation: str
) -> None:
    disk = FaultyDisk()
    disk.broken[operation] = errno.EIO
    bench.open(disk)
    assert flash_of(bench)[0] == "failed"
    disk.broken.clear()
    comes_back(bench)
    assert bench.tiers(chain(0, 8)) == ["flash"] * 8
    assert folder.is_dir()


def test_an_opening_that_fails_keeps_nothing_of_the_disk(tmp_path: Path) -> None:
    disk, slots = FaultyDisk(), 2 * SEGMENT_BYTES // SLOT_BYTES
    disk.broken_after["fallocate"] = (1, errno.ENOSPC)
    with pytest.raises(TierOffline, match="No space"):
        FlashTier.open(tmp_path / "other", slots * SLOT_BYTES, SLOT_BYTES, disk)
    assert sum(file.stat().st_blocks for file in (tmp_path / "other").glob("segment-*")) == 0


def test_a_failed_tier_that_stays_failed_is_let_go_and_read_again(bench: Bench) -> None:
    disk = FaultyDisk()
    bench.open(disk)
    worker = bench.worker()
    first, second = chain(0, 8), chain(100, 8)
    store_settled(bench, worker, 0, 8)
    store_settled(bench, worker, 100, 8)  # the first ones are on flash only
    disk.broken = {"pwrite": errno.EIO, "pread": errno.EIO, "sync": errno.EIO}
    worker.put(chain(200, 2))
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    bench.settle()
    assert bench.store.lookup(keys_of(first)) == ([], "flash_off")

    def let_go() -> bool:
        bench.clock_s += 2.0
        check(bench)
        return bench.parts.index.locate(keys_of(first)[0]) is None

    bench.run_until(let_go)
    bench.run_until(lambda: bench.store.lookup(keys_of(first)) == ([], "flash_off"))
    on_both = bench.tiers(second)
    assert set(on_both) == {"dram"}
    assert bench.parts.placement.counts.flash_let_go
    disk.broken.clear()
    comes_back(bench)
    assert bench.tiers(first) == ["flash"] * 8
    assert bench.tiers(second)[: len(on_both)] == on_both
    bench.store.prefetch(keys_of(first))
    bench.settle()
    assert any(worker.reads(block) for block in first)


def test_what_was_cleared_while_flash_failed_does_not_come_back(bench: Bench) -> None:
    disk = FaultyDisk()
    bench.open(disk)
    worker = bench.worker()
    store_settled(bench, worker, 0, 4)
    disk.broken = {"pwrite": errno.EIO, "sync": errno.EIO}
    worker.put(chain(100, 2))
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    bench.settle()
    bench.store.clear(None)  # before it is let go: its index cannot be told
    worker.put(chain(200, 2))

    def let_go() -> bool:
        bench.clock_s += 2.0
        return bench.store.lookup(keys_of(chain(500, 1))) == ([], "flash_off")

    bench.run_until(let_go)
    disk.broken.clear()
    comes_back(bench)
    assert bench.tiers(chain(0, 4)) == []
    assert bench.tiers(chain(200, 2)) == ["dram"] * 2


def test_another_folder_in_its_place_is_used_after_a_while(bench: Bench) -> None:
    worker = worker_of(bench)
    folder = bench.config.flash_path or Path()
    store_settled(bench, worker, 0, 4)
    folder.rename(folder.with_name("gone"))
    folder.mkdir()
    worker.put(chain(100, 2))
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    comes_back(bench)
    assert bench.tiers(chain(0, 4)) == ["dram"] * 4, "what was in the old one only is gone"
    store_settled(bench, worker, 200, 4)
    assert bench.parts.placement.counts.flash_written >= 8


def test_what_a_person_must_mend_ends_the_start(bench: Bench, folder: Path) -> None:
    with pytest.raises(FormatRefused, match="formatted with slot_bytes"):
        bench.open(slot_bytes=2 * SLOT_BYTES)
    with pytest.raises(ConfigInvalid, match="flash_bytes"):
        bench.open(slot_bytes=SLOT_BYTES, flash_bytes=SLOT_BYTES - 1)
    hide(folder)
    for wrong in (SLOT_BYTES - 1, 1 << 60):
        with pytest.raises(ConfigInvalid, match="flash_bytes"):
            bench.open(flash_bytes=wrong)
    show(folder)
    other = FlashTier.open(folder, FLASH_SLOTS * SLOT_BYTES, SLOT_BYTES)
    with pytest.raises(ConfigInvalid, match="in use by process"):
        bench.open(flash_bytes=FLASH_SLOTS * SLOT_BYTES)
    other.close()
    (folder / "superblock").write_bytes(b"KVISTFLS" + b"\xff" * 4088)
    with pytest.raises(FormatRefused, match="format version"):
        bench.open()
    clear_directory(folder)
    bench.open()


def test_the_same_found_later_ends_nothing_and_is_said_until_it_is_mended(
    bench: Bench, folder: Path
) -> None:
    away = hide(folder)
    worker = worker_of(bench)
    good = (away / "superblock").read_bytes()
    (away / "superblock").write_bytes(b"KVISTFLS" + b"\xff" * 4088)
    show(folder)

    def said(what: str) -> bool:
        bench.clock_s += OPEN_S_MAX
        return what in flash_of(bench)[1]

    bench.run_until(lambda: said("format version"))
    assert worker.put(chain(100, 2)) == ["stored"] * 2
    (folder / "superblock").write_bytes(good)
    other = FlashTier.open(folder, FLASH_SLOTS * SLOT_BYTES, SLOT_BYTES)
    bench.run_until(lambda: said("in use by process"))
    other.close()
    comes_back(bench)
    assert bench.tiers(chain(0, 8)) == ["flash"] * 8


def test_a_folder_that_says_how_large_slots_are_is_waited_for(bench: Bench, folder: Path) -> None:
    away = hide(folder)
    bench.open(slot_bytes=None)
    assert flash_of(bench)[0] == "failed"
    bench.store.tick()
    assert bench.store._parts is None
    away.rename(folder.with_name("later"))
    folder.unlink()
    bench.clock_s += OPEN_S_MAX
    bench.store.tick()  # nothing there: a new folder, whose slots the first worker sizes
    assert bench.store.stats().tiers == ()
    folder.with_name("later").rename(folder)
    worker = bench.worker()
    assert bench.tiers(chain(0, 8)) == ["flash"] * 8
    assert worker.info.slot_bytes == SLOT_BYTES


def test_a_new_folder_that_cannot_be_is_said_before_a_worker_comes(tmp_path: Path) -> None:
    bench, new = Bench(tmp_path / "store"), tmp_path / "new"
    bench.open(slot_bytes=None, flash_path=new, flash_bytes=1 << 60)
    assert "lower flash_bytes" in flash_of(bench)[1]
    assert list(new.iterdir()) == [], "nothing is formatted"
    bench.close()
    bench.open(flash_path=Path("/proc/kvist"), flash_bytes=4 * SLOT_BYTES)
    state, failure = flash_of(bench)
    assert (state, "flash_path /proc/kvist" in failure) == ("failed", True)
    assert bench.worker().put(chain(0, 4)) == ["stored"] * 4, "DRAM serves"
    bench.close()


def test_a_readable_folder_ends_the_wait_without_a_worker(bench: Bench, folder: Path) -> None:
    hide(folder)
    bench.open(slot_bytes=None)
    show(folder)
    bench.clock_s += OPEN_S_MAX
    bench.store.tick()
    assert bench.tiers(chain(0, 8)) == ["flash"] * 8


def test_attempts_become_rare() -> None:
    waits = [backoff_s(failures) for failures in range(3000)]
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert max(waits) == OPEN_S_MAX


def test_kvistd_serves_from_dram_says_so_and_takes_flash_when_it_can(tmp_path: Path) -> None:
    flash = tmp_path / "flash"
    flash.write_text("no folder")
    flags = ["--flash-path", str(flash), "--flash-bytes", "8MiB", "--slot-bytes", "64KiB"]
    sidecar = Sidecar(tmp_path, flags)
    try:
        sidecar.start()
        (line,) = [line for line in sidecar.text().splitlines() if "flash tier failed" in line]
        assert " ERROR " in line
        assert str(flash) in line
        _, tier = json.loads(sidecar.get("stats.json"))["tiers"]
        assert (tier["tier"], tier["state"]) == ("flash", "failed")
        assert str(flash) in tier["failure"]
        assert 'kvist_tier_state{state="failed",tier="flash"} 1.0' in sidecar.get("metrics")
        flash.unlink()
        ready = 'kvist_tier_state{state="ready",tier="flash"} 1.0'
        wait_until(lambda: ready in sidecar.get("metrics"), "flash to come on")
        assert "flash tier ready" in sidecar.text()
    finally:
        sidecar.close()
