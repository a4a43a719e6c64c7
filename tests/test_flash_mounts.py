"""The flash tier on real file systems that fill up or vanish, and come back.

Needs the right to mount; the same with a disk that fails as told is in test_flash_faults.py. No
mount turns a file system read-only while files are open for writing; an error of the file system
itself does, and then it has to be unmounted, repaired and mounted anew.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.blocks import SLOT_BYTES
from sim.stores import Bench, chain, check, comes_back, keys_of, store_settled

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


def test_a_file_system_that_is_read_only_at_the_start_serves_when_it_is_not(
    tmp_path: Path, disk: Path
) -> None:
    bench = Bench(tmp_path, dram_slots=16, flash_slots=FLASH_SLOTS)
    bench.open(flash_path=disk / "flash")
    store_settled(bench, bench.worker(), 0, 4)
    bench.close()
    mount("-o", "remount,ro", str(disk))
    bench.open()
    worker = bench.worker()
    assert "Read-only file system" in bench.store.stats().tiers[-1].failure
    assert worker.put(chain(100, 4)) == ["stored"] * 4
    assert bench.store.lookup(keys_of(chain(0, 4))) == ([], "flash_off")
    mount("-o", "remount,rw", str(disk))
    comes_back(bench)
    assert bench.tiers(chain(0, 4)) == ["flash"] * 4
    check(bench)
    bench.close()


def test_a_file_system_without_room_at_the_start_is_not_filled_and_serves_when_it_has(
    tmp_path: Path, disk: Path
) -> None:
    (disk / "filler").write_bytes(bytes(16 << 20)[: (16 << 20) - 8 * SLOT_BYTES])
    bench = Bench(tmp_path, dram_slots=16, flash_slots=FLASH_SLOTS)
    bench.open(flash_path=disk / "flash")
    worker = bench.worker()
    assert "lower flash_bytes" in bench.store.stats().tiers[-1].failure
    assert worker.put(chain(0, 4)) == ["stored"] * 4
    (disk / "other").write_bytes(bytes(4 * SLOT_BYTES))  # others still find room
    (disk / "filler").unlink()
    comes_back(bench)
    store_settled(bench, worker, 100, 4)
    check(bench)
    bench.close()


def test_a_mount_that_is_missing_at_the_start_is_used_when_it_comes(
    tmp_path: Path, disk: Path
) -> None:
    bench = Bench(tmp_path, dram_slots=16, flash_slots=FLASH_SLOTS)
    bench.open(flash_path=disk / "flash")
    store_settled(bench, bench.worker(), 0, 4)
    bench.close()
    place = tmp_path / "place"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "ro", "tmpfs", str(place))  # nothing is made where none may
    bench.open(flash_path=place / "flash")
    worker = bench.worker()
    assert worker.put(chain(100, 4)) == ["stored"] * 4
    subprocess.run(["umount", str(place)], check=True)
    mount("--bind", str(disk), str(place))
    comes_back(bench)
    assert bench.tiers(chain(0, 4)) == ["flash"] * 4
    bench.close()
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 of its own that turns read-only at an error: its image and where it is mounted."""
    if os.geteuid():
        pytest.skip("only root mounts")
    image, path = tmp_path / "disk.img", tmp_path / "disk"
    path.mkdir()
    image.touch()
    os.truncate(image, 32 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    except FileNotFoundError:
        pytest.skip("no mkfs.ext4 here")
    mount("-o", "loop,errors=remount-ro", str(image), str(path))
    yield image, path
    subprocess.run(["umount", "-l", str(path)], check=False)


def break_ext4(path: Path) -> None:
    """What ext4 does when it finds an error in itself; what was not synced is lost by it."""
    subprocess.run(["sync", "-f", str(path)], check=True)
    source = next(
        line.split()[0]
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[1] == str(path)
    )
    switch = Path("/sys/fs/ext4") / Path(source).name / "trigger_fs_error"
    if not switch.exists():
        pytest.skip("a kernel without trigger_fs_error")
    switch.write_text("1")


def test_a_file_system_that_turns_read_only_in_use_is_let_go_and_serves_when_it_is_repaired(
    tmp_path: Path, ext4: tuple[Path, Path]
) -> None:
    image, path = ext4
    bench = Bench(tmp_path, dram_slots=8, flash_slots=FLASH_SLOTS)
    bench.open(flash_path=path / "flash")
    worker = bench.worker()
    first, second = chain(0, 8), chain(100, 8)
    for blocks in (0, 100):
        store_settled(bench, worker, blocks, 8)
    break_ext4(path)
    worker.put(chain(200, 2))
    fails(bench)
    assert "Read-only file system" in bench.store.stats().tiers[-1].failure
    assert bench.tiers(second)[:4] == ["dram"] * 4
    assert bench.store.lookup(keys_of(first)) == ([], "flash_off")
    assert worker.put(chain(300, 4)) == ["stored"] * 4, "DRAM goes on"

    def unmounted() -> bool:
        bench.clock_s += 2.0
        return not subprocess.run(["umount", str(path)], capture_output=True).returncode

    bench.run_until(unmounted)
    # 1: it has mended something.
    assert subprocess.run(["e2fsck", "-p", str(image)], capture_output=True).returncode <= 1
    mount("-o", "loop", str(image), str(path))
    comes_back(bench)
    check(bench)
    assert bench.tiers(first) == ["flash"] * 8
    late = keys_of(chain(300, 4))
    bench.run_until(lambda: all(bench.parts.index.find(key).flash is not None for key in late))
    bench.settle()  # what came meanwhile has gone there too; a block on its way holds its DRAM slot
    bench.store.prefetch(keys_of(first))
    bench.run_until(lambda: set(bench.tiers(first)) == {"dram"})
    bench.settle()
    assert all(worker.reads(block) for block in first)
    store_settled(bench, worker, 400, 4)
    bench.close()
    subprocess.run(["umount", str(path)], check=True)
