"""The flash tier: what survives a restart, who may use a directory, how records move."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from sim.blocks import SLOT_BYTES, Block, make_block
from sim.disk import FaultyDisk
from sim.flash import CAPACITY, SLOTS, filled, flip, load, open_tier, recovered, store

from kvist.proto.errors import (
    BlockCorrupt,
    ConfigInvalid,
    FormatRefused,
)
from kvist.proto.record import RecordShape
from kvist.proto.slot import fill_slot
from kvist.tiers.flash import FlashTier
from kvist.tiers.flash_clear import clear_directory


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def tier(tmp_path: Path, disk: FaultyDisk) -> Iterator[FlashTier]:
    tier = open_tier(tmp_path / "flash", disk)
    yield tier
    tier.close()


def test_blocks_survive_a_restart_with_all_that_the_index_says(tmp_path: Path) -> None:
    stored = filled(tmp_path)
    tier = open_tier(tmp_path)
    entries = tier.entries()
    assert {entry.slot: entry for entry in entries} == {
        slot: block.entry(slot) for slot, block in stored.items()
    }
    assert all(tier.take(entry) for entry in entries)
    assert all(load(tier, slot, block) for slot, block in stored.items())
    assert tier.free_slots == SLOTS - len(stored)
    assert (tier.state, tier.needs_rebuild) == ("ready", False)
    tier.close()


def test_a_deleted_block_does_not_come_back(tmp_path: Path) -> None:
    stored = filled(tmp_path)
    tier = open_tier(tmp_path)
    tier.index_delete([stored[3].header.key, b"never stored    "])  # type: ignore[list-item]
    tier.close()
    tier = open_tier(tmp_path)
    assert recovered(tier) == {slot: slot for slot in stored if slot != 3}
    tier.close()


def test_a_slot_is_taken_once(tier: FlashTier) -> None:
    entry = make_block(1).entry(5)
    assert tier.take(entry)
    assert not tier.take(entry)
    assert not tier.take(make_block(1).entry(SLOTS))


def test_the_slot_length_can_be_taken_from_the_directory(tmp_path: Path) -> None:
    assert FlashTier.open(tmp_path / "none", CAPACITY, None) is None
    filled(tmp_path)
    tier = FlashTier.open(tmp_path, CAPACITY, None)
    assert tier is not None
    assert tier.slot_bytes == SLOT_BYTES
    tier.close()


def test_another_slot_length_than_the_directory_has_is_refused_with_the_cure(
    tmp_path: Path,
) -> None:
    filled(tmp_path)
    with pytest.raises(FormatRefused, match=rf"{tmp_path}.*slot_bytes.*kvistd --clear-flash"):
        FlashTier.open(tmp_path, CAPACITY, 2 * SLOT_BYTES)


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 32, 4000])
def test_a_superblock_that_is_not_understood_is_refused_with_the_cure(
    tmp_path: Path, offset: int
) -> None:
    filled(tmp_path)
    flip(tmp_path / "superblock", offset)
    with pytest.raises(FormatRefused, match=rf"{tmp_path}.*kvistd --clear-flash"):
        open_tier(tmp_path)
    clear_directory(tmp_path)
    tier = open_tier(tmp_path)
    assert (tier.entries(), tier.state) == ([], "ready")
    tier.close()


def test_clearing_a_directory_removes_nothing_that_is_not_kvists(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "holiday.jpg").touch()
    clear_directory(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"holiday.jpg", "owner.lock"}


def test_clearing_knows_its_files_by_their_exact_names_and_leaves_folders_alone(
    tmp_path: Path,
) -> None:
    filled(tmp_path)
    others = {"segment-results.csv", "segment-0001", "superblock.md", "index.html"}
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / "segment-00007").mkdir()
    clear_directory(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == others | {"segment-00007", "owner.lock"}


@pytest.mark.parametrize("name", ["segment-results.csv", "segment-00000", "index.mdb"])
def test_clearing_refuses_what_kvist_has_not_formatted_and_leaves_nothing_there(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigInvalid, match=f"{tmp_path} is not a flash folder of kvistd"):
        clear_directory(tmp_path)
    with pytest.raises(ConfigInvalid, match="is a file"):
        clear_directory(tmp_path / name)
    with pytest.raises(ConfigInvalid, match="does not exist"):
        clear_directory(tmp_path / "none")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_superblock_goes_last_so_that_an_interrupted_clearing_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    gone: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda file: gone.append(file.name))
    clear_directory(tmp_path)
    assert sorted(gone) == ["index.mdb", "segment-00000", "superblock"]
    assert gone[-1] == "superblock"


def test_formatting_a_folder_of_others_leaves_their_files(tmp_path: Path) -> None:
    (tmp_path / "segment-results.csv").write_text("precious")
    open_tier(tmp_path).close()
    assert (tmp_path / "segment-results.csv").read_text() == "precious"


def test_a_second_owner_is_refused_and_told_who_has_it(tmp_path: Path, tier: FlashTier) -> None:
    with pytest.raises(ConfigInvalid, match=rf"flash_path.*in use by process {os.getpid()}"):
        open_tier(tmp_path / "flash")
    with pytest.raises(ConfigInvalid, match="in use"):
        clear_directory(tmp_path / "flash")
    assert store(tier, make_block(1)) == 0


@pytest.mark.parametrize("slot_bytes", [4096, 10_000, 2**31])
def test_a_slot_length_that_cannot_be_is_refused(tmp_path: Path, slot_bytes: int) -> None:
    with pytest.raises(ConfigInvalid, match="slot_bytes"):
        FlashTier.open(tmp_path, 2**32, slot_bytes)


def test_a_capacity_below_one_slot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="flash_bytes"):
        FlashTier.open(tmp_path, SLOT_BYTES - 1, SLOT_BYTES)


def test_a_smaller_capacity_gives_room_back_and_a_larger_one_keeps_what_is_there(
    tmp_path: Path,
) -> None:
    filled(tmp_path)
    for slots, kept in ((4, 4), (SLOTS, 4)):
        tier = open_tier(tmp_path, slots=slots)
        assert set(recovered(tier)) == set(range(kept))
        assert tier.slots == slots
        size = (tmp_path / "segment-00000").stat().st_size
        assert size == slots * SLOT_BYTES
        tier.close()


def test_slots_are_spread_over_segments_of_at_most_one_gibibyte(tmp_path: Path) -> None:
    slot_bytes = 512 * 1024**2
    # Claims 1.5 GiB of the disk and writes two short records.
    tier = FlashTier.open(tmp_path, 3 * slot_bytes, slot_bytes)
    sizes = [file.stat().st_size for file in sorted(tmp_path.glob("segment-*"))]
    assert sizes == [2 * slot_bytes, slot_bytes]
    entry = make_block(7)
    memory = aligned_record(entry)
    slots = [tier.allocate() for _ in range(3)]
    for slot in (slots[0], slots[2]):
        tier.write_record(slot, memory)
        assert tier.read_record(slot, memory) == entry.header
    tier.close()


def aligned_record(block: Block, generation: int = 0) -> memoryview:
    """A record in page-aligned memory, as in a DRAM slot."""
    memory = memoryview(mmap.mmap(-1, SLOT_BYTES))
    memory.cast("Q")[0] = generation
    fill_slot(memory, block.header, block.payload)
    return memory


def test_records_move_between_memory_and_flash_without_touching_the_generation(
    tier: FlashTier,
) -> None:
    block = make_block(4)
    slot = tier.allocate()
    tier.write_record(slot, aligned_record(block, generation=77))
    into = memoryview(mmap.mmap(-1, SLOT_BYTES))
    into.cast("Q")[0] = 99
    assert tier.read_record(slot, into) == block.header
    assert into.cast("Q")[0] == 99
    assert bytes(into[8:]) == bytes(aligned_record(block)[8:])


def test_no_generation_gets_to_the_disk(tmp_path: Path, tier: FlashTier) -> None:
    slot = tier.allocate()
    tier.write_record(slot, aligned_record(make_block(4), generation=77))
    with (tmp_path / "flash" / "segment-00000").open("rb") as file:
        file.seek(slot * SLOT_BYTES)
        assert file.read(16) == bytes(8) + b"KVISTBLK"


def test_records_with_many_tokens_are_stored_and_found_by_a_scan(tmp_path: Path) -> None:
    shape = RecordShape(payload_bytes=3000, block_tokens=3000)
    block = make_block(2, shape)
    tier = FlashTier.open(tmp_path, 4 * shape.record_bytes, shape.record_bytes)
    slot = store(tier, block)
    assert load(tier, slot, block)
    tier.close()
    (tmp_path / "index.mdb").unlink()
    tier = FlashTier.open(tmp_path, 4 * shape.record_bytes, shape.record_bytes)
    assert recovered(tier) == {slot: 2}
    assert load(tier, slot, block)
    tier.close()


def test_a_shorter_record_fits_a_longer_slot(tier: FlashTier) -> None:
    block = make_block(9, RecordShape(100, 1))
    assert load(tier, store(tier, block), block)


def test_memory_without_a_whole_record_is_not_written(tier: FlashTier, disk: FaultyDisk) -> None:
    slot = tier.allocate()
    disk.calls.clear()
    for memory in (aligned_record(make_block(1))[:4096], memoryview(mmap.mmap(-1, SLOT_BYTES))):
        with pytest.raises(BlockCorrupt):
            tier.write_record(slot, memory)
    assert disk.calls == []


def test_threads_may_write_and_read_different_slots_at_once(tier: FlashTier) -> None:
    blocks = {tier.allocate(): make_block(number) for number in range(8)}
    right: list[bool] = []

    def work(slot: int, block: Block) -> None:
        tier.write(slot, block.header, block.payload)
        tier.index_put([block.entry(slot)])
        right.append(load(tier, slot, block))

    threads = [Thread(target=work, args=item) for item in blocks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 8
