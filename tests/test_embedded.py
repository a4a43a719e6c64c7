"""The cache inside the engine's process: the same client, no sidecar, nothing left behind."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.sidecar import QUIET, Prompt, load_all, namespace, wait_until

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.embedded import FOLDER_PREFIX, StoreConfig, open_embedded
from kvist.cachesvc.folders import LOCK_NAME, OwnedFolder, sweep
from kvist.cachesvc.log import Log
from kvist.proto.errors import ConfigInvalid
from kvist.tiers.segment import OwnerLock


def config(folder: Path, flash: bool = False) -> StoreConfig:
    return StoreConfig(
        run_dir=folder,
        shm_dir=folder,
        dram_bytes=8 << 20,
        flash_path=folder / "flash" if flash else None,
        flash_bytes=8 << 20,
        slot_bytes=None,
    )


def folders() -> set[Path]:
    return set(Path("/dev/shm").glob(f"{FOLDER_PREFIX}*"))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[CacheClient]:
    opened = open_embedded(config(tmp_path), namespace(), "test", QUIET)
    assert opened.wait_attached(10.0)
    yield opened
    opened.close()


def test_blocks_go_in_and_come_out_and_lookups_and_loads_make_no_call(client: CacheClient) -> None:
    prompt = Prompt(1, 6)
    assert client.store(prompt.items).stored == 6
    calls = client.rpc_calls
    assert client.tiers(prompt.keys) == ("dram",) * 6
    assert load_all(client, prompt) == [None] * 6
    assert client.store(prompt.items).present == 6
    assert client.rpc_calls == calls


def life(folder: Path, layers: int, log: Log = QUIET) -> tuple[tuple[str, ...], int]:
    """One life of an engine whose blocks have so many layers: tiers of what it found of its
    prompt, which it then stores, and how many slots its DRAM tier has."""
    of = namespace(layers=layers)
    prompt = Prompt(3, 4, of)
    opened = open_embedded(config(folder, flash=True), of, "test", log)
    assert opened.wait_attached(10.0)
    held = opened.tiers(prompt.keys)
    assert opened.store(prompt.items).stored == 4 - len(held)
    opened.prefetch(prompt.keys, 4)
    assert load_all(opened, prompt) == [None] * 4
    assert opened._life is not None
    slots = opened._life.index.dram_slots
    opened.close()
    return held, slots


def test_models_with_blocks_of_two_sizes_keep_what_they_have_on_flash_and_waste_no_dram(
    tmp_path: Path,
) -> None:
    (none, small), (also_none, large) = life(tmp_path, 2), life(tmp_path, 8)
    assert (none, also_none) == ((), ())
    assert small > 2 * large, "slots have the size of the model's blocks"
    assert life(tmp_path, 2) == (("flash",) * 4, small)
    assert life(tmp_path, 8) == (("flash",) * 4, large)
    assert len(list((tmp_path / "flash").iterdir())) == 2


def test_of_folders_of_other_slot_sizes_the_least_recently_used_goes_and_one_in_use_stays(
    tmp_path: Path,
) -> None:
    flash, text = tmp_path / "flash", io.StringIO()
    for layers in (2, 4):
        life(tmp_path, layers)
    first, second = sorted(flash.iterdir(), key=lambda path: int(path.name))
    lock = OwnerLock(first)
    for age_s, path in ((200, first), (100, second)):
        for file in path.iterdir():
            os.utime(file, (time.time() - age_s,) * 2)
    life(tmp_path, 8, Log(text))
    assert (first / "superblock").exists(), "a process uses it"
    assert (second / "superblock").exists(), "alone it takes no more than the budget"
    assert "emptied" not in text.getvalue()
    lock.close()
    life(tmp_path, 16, Log(text))
    assert [(path / "superblock").exists() for path in (first, second)] == [False, False]
    assert f"folder={first}" in text.getvalue()
    taken = sum(file.stat().st_blocks * 512 for file in flash.rglob("segment-*"))
    assert taken <= 2 * config(tmp_path).flash_bytes


def test_a_folder_that_is_formatted_itself_for_these_slots_is_used_as_it_is(
    tmp_path: Path,
) -> None:
    life(tmp_path, 2)
    (sub,) = (tmp_path / "flash").iterdir()
    sub.rename(tmp_path / "moved")
    (tmp_path / "flash").rmdir()
    (tmp_path / "moved").rename(tmp_path / "flash")
    assert life(tmp_path, 2)[0] == ("flash",) * 4


def test_a_flash_folder_that_somebody_uses_is_not_emptied(tmp_path: Path) -> None:
    prompt = Prompt(4, 3)
    first = open_embedded(config(tmp_path, flash=True), namespace(), "test", QUIET)
    assert first.wait_attached(10.0)
    first.store(prompt.items)
    beside = open_embedded(config(tmp_path, flash=True), namespace(layers=8), "test", QUIET)
    assert beside.wait_attached(10.0)
    assert beside.without == "", "slots of another size have a folder of their own"
    beside.close()
    first.close()
    again = open_embedded(config(tmp_path, flash=True), namespace(), "test", QUIET)
    assert again.wait_attached(10.0)
    assert len(again.tiers(prompt.keys)) == 3
    again.close()


def test_flash_survives_from_one_life_to_the_next(tmp_path: Path) -> None:
    prompt = Prompt(2, 5)
    first = open_embedded(config(tmp_path, flash=True), namespace(), "test", QUIET)
    assert first.wait_attached(10.0)
    first.store(prompt.items)
    first.close()
    second = open_embedded(config(tmp_path, flash=True), namespace(), "test", QUIET)
    assert second.wait_attached(10.0)
    assert second.tiers(prompt.keys) == ("flash",) * 5
    second.prefetch(prompt.keys, 5)
    assert load_all(second, prompt) == [None] * 5
    second.close()


def test_close_leaves_no_folder_and_no_session_behind(tmp_path: Path) -> None:
    before = folders()
    client = open_embedded(config(tmp_path), namespace(), "test", QUIET)
    assert client.wait_attached(10.0)
    assert len(folders() - before) == 1
    client.close()
    assert folders() <= before
    assert client.state == "detached"


def test_folder_of_a_killed_process_is_removed_at_the_next_start(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_embedded import *\n"
        "c = open_embedded(config(pathlib.Path(sys.argv[2])), namespace(), 'dead', QUIET)\n"
        "assert c.wait_attached(10)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    here = str(Path(__file__).resolve().parent)
    before = folders()
    subprocess.run([sys.executable, "-P", "-c", code, here, str(tmp_path)], timeout=60)
    left = folders() - before
    assert len(left) == 1
    client = open_embedded(config(tmp_path), namespace(), "next", QUIET)
    assert client.wait_attached(10.0)
    assert not left & folders()
    client.close()


def test_a_flash_folder_in_use_costs_the_flash_tier_and_nothing_else(tmp_path: Path) -> None:
    text = io.StringIO()
    first = open_embedded(config(tmp_path, flash=True), namespace(), "test", QUIET)
    assert first.wait_attached(10.0)
    second = open_embedded(config(tmp_path, flash=True), namespace(), "test", Log(text))
    assert second.wait_attached(10.0)
    assert (first.without, second.without) == ("", f"in use by process {os.getpid()}")
    assert "WARN" in text.getvalue().upper()
    assert "--cache-flash-path" in text.getvalue()
    prompt = Prompt(1, 2)
    assert second.store(prompt.items).stored == 2
    assert second.tiers(prompt.keys) == ("dram",) * 2
    second.close()
    first.close()


def test_a_flash_folder_of_another_format_costs_the_flash_tier_and_nothing_else(
    tmp_path: Path,
) -> None:
    life(tmp_path, 2)
    (sub,) = (tmp_path / "flash").iterdir()
    (sub / "superblock").write_bytes(b"something else")
    opened = open_embedded(config(tmp_path, flash=True), namespace(layers=2), "test", QUIET)
    assert opened.wait_attached(10.0)
    assert "not Kvist's" in opened.without
    opened.close()
    assert (sub / "superblock").read_bytes() == b"something else"


def test_owned_folder_has_one_owner_and_sweep_takes_only_the_dead(tmp_path: Path) -> None:
    living = OwnedFolder(tmp_path / "kv-living")
    with pytest.raises(ConfigInvalid, match="another process"):
        OwnedFolder(tmp_path / "kv-living")
    dead = OwnedFolder(tmp_path / "kv-dead")
    dead.close()
    (tmp_path / "kv-not-ours").mkdir()
    (tmp_path / "other" / LOCK_NAME).mkdir(parents=True)
    assert sweep(tmp_path, "kv-") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"kv-living", "kv-not-ours", "other"}
    living.remove()
    assert not living.path.exists()


def test_two_embedded_caches_do_not_see_each_other(tmp_path: Path, client: CacheClient) -> None:
    other = open_embedded(config(tmp_path), namespace(), "other", QUIET)
    assert other.wait_attached(10.0)
    prompt = Prompt(3, 2)
    client.store(prompt.items)
    assert other.tiers(prompt.keys) == ()
    other.close()


def test_session_that_ends_is_followed_by_another(client: CacheClient) -> None:
    client._control.hang_up()
    wait_until(lambda: client.reattaches == 1 and client.state == "attached", "the next session")
    assert client.store(Prompt(4, 2).items).stored == 2
