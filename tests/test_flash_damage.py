"""The flash tier on a damaged disk, and after its process was killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from multiprocessing.synchronize import Event as EventType
from pathlib import Path
from threading import Event

import pytest
from sim.blocks import SLOT_BYTES, empty, make_block
from sim.disk import FaultyDisk
from sim.flash import SLOTS, filled, flip, load, open_tier, recovered, store

from kvist.proto.errors import (
    BlockCorrupt,
    TierFull,
)
from kvist.proto.record import RecordShape
from kvist.tiers.flash import FlashTier
from kvist.tiers.flash_index import FlashIndex, read_index


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def tier(tmp_path: Path, disk: FaultyDisk) -> Iterator[FlashTier]:
    tier = open_tier(tmp_path / "flash", disk)
    yield tier
    tier.close()


@pytest.mark.parametrize("offset", [8, 15, 16, 20, 24, 90, 92, 104, 112, 120, 128, 143, 4096, 8895])
def test_a_flipped_byte_in_a_record_is_a_corrupt_block_and_the_others_are_served(
    tmp_path: Path, offset: int
) -> None:
    stored = filled(tmp_path)
    flip(tmp_path / "segment-00000", 3 * SLOT_BYTES + offset)
    tier = open_tier(tmp_path)
    recovered(tier)
    with pytest.raises(BlockCorrupt):
        tier.read(3, stored[3].wanted, empty(stored[3]))
    assert [slot for slot, block in stored.items() if load(tier, slot, block)] == [
        slot for slot in stored if slot != 3
    ]
    tier.close()


def test_two_swapped_slots_are_noticed(tmp_path: Path) -> None:
    stored = filled(tmp_path)
    segment = tmp_path / "segment-00000"
    data = segment.read_bytes()
    first, second, rest = (
        data[:SLOT_BYTES],
        data[SLOT_BYTES : 2 * SLOT_BYTES],
        data[2 * SLOT_BYTES :],
    )
    segment.write_bytes(second + first + rest)
    tier = open_tier(tmp_path)
    recovered(tier)
    for slot in (0, 1):
        with pytest.raises(BlockCorrupt, match="key"):
            tier.read(slot, stored[slot].wanted, empty(stored[slot]))
    tier.close()


def test_a_segment_that_was_cut_while_in_use_loses_blocks_and_not_the_tier(
    tmp_path: Path, tier: FlashTier
) -> None:
    blocks = [make_block(number) for number in range(3)]
    slots = [store(tier, block) for block in blocks]
    os.truncate(tmp_path / "flash" / "segment-00000", 2 * SLOT_BYTES)
    assert [load(tier, *pair) for pair in zip(slots, blocks, strict=True)] == [True, True, False]
    assert tier.state == "ready"


def test_a_lost_segment_is_made_anew_and_its_blocks_are_gone(tmp_path: Path) -> None:
    stored = filled(tmp_path)
    (tmp_path / "segment-00000").unlink()
    tier = open_tier(tmp_path)
    recovered(tier)
    assert not any(load(tier, slot, block) for slot, block in stored.items())
    tier.close()


def damage_index(file: Path, how: str) -> None:
    if how == "cut":
        os.truncate(file, 8192)  # what is left points behind the end: SIGBUS
    elif how == "empty":
        os.truncate(file, 0)
    elif how == "noise":
        file.write_bytes(random.Random(1).randbytes(file.stat().st_size))
    elif how == "lost":
        file.unlink()


@pytest.mark.parametrize("how", ["cut", "empty", "noise", "lost"])
def test_a_damaged_index_is_rebuilt_from_the_records(tmp_path: Path, how: str) -> None:
    stored = filled(tmp_path)
    damage_index(tmp_path / "index.mdb", how)
    tier = open_tier(tmp_path)
    assert (tier.state, tier.needs_rebuild, tier.entries()) == ("rebuilding", True, [])
    with pytest.raises(TierFull):
        tier.allocate()
    assert recovered(tier) == {slot: slot for slot in stored}
    assert (tier.state, tier.needs_rebuild) == ("ready", False)
    assert all(load(tier, slot, block) for slot, block in stored.items())
    tier.close()
    tier = open_tier(tmp_path)
    assert recovered(tier) == {slot: slot for slot in stored}
    tier.close()


def test_flipped_bytes_in_the_index_neither_crash_the_opener_nor_serve_wrong_bytes(
    tmp_path: Path,
) -> None:
    filled(tmp_path, blocks=20)
    open_tier(tmp_path).close()  # writes the index anew, without pages of the past
    index = tmp_path / "index.mdb"
    healthy = index.read_bytes()
    offsets = range(0, len(healthy), 151)
    rebuilt = 0
    for offset in offsets:
        index.write_bytes(healthy)
        flip(index, offset)
        tier = open_tier(tmp_path)
        rebuilt += tier.needs_rebuild
        for slot, number in recovered(tier).items():
            assert load(tier, slot, make_block(number))
        tier.close()
    assert 10 < rebuilt < len(offsets)


def test_a_large_damaged_index_gives_true_entries_or_none_at_all(tmp_path: Path) -> None:
    entries = [make_block(number, RecordShape(16, 1)).entry(number) for number in range(1500)]
    index = FlashIndex(tmp_path, len(entries), lambda _entry: True)
    index.put(entries)
    index.finish()
    index.close()
    file = tmp_path / "index.mdb"
    healthy = file.read_bytes()
    truth = {entry.key: entry for entry in entries}
    chance = random.Random(5)
    # The first 48 bytes of a page say what the page is and where its nodes are.
    pages = range(0, len(healthy), 4096)
    offsets = [page + chance.randrange(48) for page in pages for _ in range(3)]
    offsets += [chance.randrange(len(healthy)) for _ in range(60)]
    refused = 0
    for offset in offsets:
        file.write_bytes(healthy)
        flip(file, offset)
        found = read_index(file, lambda _entry: True)
        refused += found is None
        assert all(truth[entry.key] == entry for entry in found or ())
    assert 50 < refused < len(offsets)


def test_one_bad_value_is_enough_to_rebuild(tmp_path: Path) -> None:
    stored = filled(tmp_path)
    open_tier(tmp_path).close()
    index = tmp_path / "index.mdb"
    flip(index, index.read_bytes().find(stored[2].header.parent + stored[2].header.namespace))
    tier = open_tier(tmp_path)
    assert tier.needs_rebuild
    assert (tmp_path / "index.bad").exists()
    assert recovered(tier) == {slot: slot for slot in stored}
    tier.close()


def test_two_keys_with_one_slot_are_a_reason_to_rebuild(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    slot = store(tier, make_block(1))
    tier.index_put([make_block(2).entry(slot)])
    tier.close()
    tier = open_tier(tmp_path)
    assert recovered(tier) == {slot: 1}
    tier.close()


def test_a_scan_that_was_stopped_is_done_again_in_the_next_life(tmp_path: Path) -> None:
    stored = filled(tmp_path)
    (tmp_path / "index.mdb").unlink()
    tier = open_tier(tmp_path)
    stop = Event()
    stop.set()
    assert list(tier.scan(stop)) == []
    assert tier.state == "rebuilding"
    tier.close()
    tier = open_tier(tmp_path)
    assert tier.needs_rebuild
    assert recovered(tier) == {slot: slot for slot in stored}
    tier.close()


def test_a_scan_names_a_block_once_even_if_an_old_copy_of_it_lies_about(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    block = make_block(1)
    slots = [store(tier, block), store(tier, block)]
    tier.close()
    (tmp_path / "index.mdb").unlink()
    tier = open_tier(tmp_path)
    assert recovered(tier) == {slots[0]: 1}
    tier.close()


def test_clear_drops_everything_from_the_disk_too_and_ends_a_rebuild(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "index.mdb").unlink()
    tier = open_tier(tmp_path)
    tier.clear()
    assert (tier.state, tier.free_slots) == ("ready", SLOTS)
    slot = store(tier, make_block(5))
    tier.close()
    (tmp_path / "index.mdb").unlink()
    tier = open_tier(tmp_path)
    assert recovered(tier) == {slot: 5}
    tier.close()


FORK = multiprocessing.get_context("fork")


def write_forever(path: Path, seed: int, begun: EventType) -> None:
    """Store and evict at random, in the order that the tier's contract asks for."""
    tier = open_tier(path)
    begun.set()
    chance = random.Random(seed)
    held = {entry.key: entry.slot for entry in tier.entries() if tier.take(entry)}
    while True:
        if tier.free_slots == 0 or (held and chance.random() < 0.4):
            key = chance.choice(list(held))
            tier.index_delete([key])
            tier.free(held.pop(key))
        block = make_block(chance.randrange(200))
        if block.header.key not in held:
            slot = tier.allocate()
            tier.write(slot, block.header, block.payload)
            tier.index_put([block.entry(slot)])
            held[block.header.key] = slot


@pytest.mark.parametrize("lose_index", [False, True])
def test_a_writer_killed_at_any_moment_leaves_only_whole_blocks(
    tmp_path: Path, lose_index: bool
) -> None:
    chance = random.Random(11)
    survivors = 0
    for life in range(8):
        begun = FORK.Event()
        writer = FORK.Process(target=write_forever, args=(tmp_path, life, begun))
        writer.start()
        assert begun.wait(60)
        Event().wait(chance.random() * 0.15)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        if lose_index:
            (tmp_path / "index.mdb").unlink(missing_ok=True)
        tier = open_tier(tmp_path)
        found = recovered(tier)
        whole = [slot for slot, number in found.items() if load(tier, slot, make_block(number))]
        # With its index a killed process loses nothing; a scan also sees the slot it was in.
        assert len(found) - len(whole) <= (1 if lose_index else 0)
        survivors += len(whole)
        tier.close()
    assert survivors > 0
