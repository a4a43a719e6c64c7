"""The flash tier on real file systems that fill up or vanish, and come back.

Needs the right to mount; the same with a disk that fails as told is in test_flash_faults.py, and so
is a file system that turns read-only in use: while files are open for writing no mount does that.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.blocks import SLOT_BYTES
from sim.stores import Bench, chain, check, store_settled

FLASH_SLOTS = 24


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, unmounted at the end."""
    if os.geteuid():
        pytest.skip("only root mounts")
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path))
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def bench(tmp_path: Path, disk: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=16, flash_slots=FLASH_SLOTS)
    made.open(flash_path=disk / "flash")
    yield made
    made.close()


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def fails(bench: Bench) -> None:
    bench.run_until(lambda: bench.parts.moves.state == "failed")
    bench.settle()


def comes_back(bench: Bench) -> None:
    def ready() -> bool:
        bench.clock_s += 2.0
        return bench.parts.moves.state == "ready"

    bench.run_until(ready)


def test_a_full_file_system_turns_flash_off_dram_goes_on_and_room_brings_it_back(
    bench: Bench, disk: Path
) -> None:
    worker = bench.worker()
    store_settled(bench, worker, 0, 4)
    # Its slots were claimed at the start; take their room away, and fill the disk.
    (segment,) = (disk / "flash").glob("segment-*")
    os.truncate(segment, 4 * SLOT_BYTES)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        fill_up(filler)
    worker.put(chain(100, 4))
    fails(bench)
    assert bench.tiers(chain(100, 4)) == ["dram"] * 4
    assert worker.put(chain(200, 4)) == ["stored"] * 4, "DRAM goes on"
    filler.unlink()
    comes_back(bench)
    store_settled(bench, worker, 300, 4)
    assert bench.parts.placement.counts.flash_written >= 4


def test_a_vanished_mount_turns_flash_off_and_its_return_on(
    bench: Bench, disk: Path, tmp_path: Path
) -> None:
    worker = bench.worker()
    store_settled(bench, worker, 0, 4)
    kept = tmp_path / "kept"
    kept.mkdir()
    mount("--bind", str(disk), str(kept))
    subprocess.run(["umount", "-l", str(disk)], check=True)
    worker.put(chain(100, 4))
    fails(bench)
    assert bench.tiers(chain(0, 4)) == ["dram"] * 4
    assert worker.put(chain(200, 4)) == ["stored"] * 4, "DRAM goes on"
    mount("--bind", str(kept), str(disk))
    subprocess.run(["umount", "-l", str(kept)], check=True)
    comes_back(bench)
    store_settled(bench, worker, 300, 4)
    check(bench)


def test_a_read_only_file_system_at_the_start_is_an_offline_tier_and_dram_works(
    tmp_path: Path, disk: Path
) -> None:
    mount("-o", "remount,ro", str(disk))
    bench = Bench(tmp_path, dram_slots=16, flash_slots=FLASH_SLOTS)
    bench.open(flash_path=disk / "flash")
    worker = bench.worker()
    assert bench.parts.moves.state == "failed"
    assert worker.put(chain(0, 4)) == ["stored"] * 4
    bench.close()
