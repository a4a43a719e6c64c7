"""The arena between processes: a worker's map of what the sidecar's DRAM tier made."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from sim.blocks import SLOT_BYTES, empty, make_block

from kvist.proto.errors import (
    BlockCorrupt,
    BlockMissing,
    BlockTorn,
    ConfigInvalid,
    Detached,
    FormatRefused,
    TierFull,
)
from kvist.tiers.dram import DramTier
from kvist.transfer.shm import ArenaMap

SLOTS = 6


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DramTier]:
    tier = DramTier(tmp_path / "arena", SLOTS, SLOT_BYTES)
    yield tier
    tier.close()


@pytest.fixture
def arena(tier: DramTier) -> Iterator[ArenaMap]:
    arena = ArenaMap(tier.path, SLOT_BYTES, SLOTS)
    yield arena
    arena.close()


def test_a_worker_reads_what_the_sidecar_wrote(tier: DramTier, arena: ArenaMap) -> None:
    block, out = make_block(1), empty(make_block(1))
    slot = tier.allocate()
    tier.write(slot, block.header, block.payload)
    arena.read(slot, block.wanted, out)
    assert np.array_equal(out, block.payload)


def test_a_filled_slot_is_visible_to_nobody_before_the_sidecar_publishes_it(
    tier: DramTier, arena: ArenaMap
) -> None:
    block, out = make_block(1), empty(make_block(1))
    slot = tier.allocate()
    with pytest.raises(BlockMissing):
        tier.header(slot)
    arena.fill(slot, block.header, block.payload)
    for reader in (tier, arena):
        with pytest.raises(BlockMissing):
            reader.read(slot, block.wanted, out)
    assert tier.header(slot) == block.header
    tier.publish(slot)
    for reader in (tier, arena):
        reader.read(slot, block.wanted, out)
        assert np.array_equal(out, block.payload)


def test_the_commit_check_does_not_mistake_the_last_block_of_a_slot_for_the_next(
    tier: DramTier,
) -> None:
    block = make_block(1)
    slot = tier.allocate()
    tier.write(slot, block.header, block.payload)
    tier.free(slot)
    assert tier.allocate() == slot
    with pytest.raises(BlockMissing):
        tier.header(slot)


def test_a_damaged_or_foreign_header_is_seen_by_the_commit_check(
    tier: DramTier, arena: ArenaMap
) -> None:
    slot = tier.allocate()
    arena.fill(slot, make_block(1).header, make_block(1).payload)
    tier.slot_view(slot)[130] ^= 1
    with pytest.raises(BlockCorrupt):
        tier.header(slot)
    tier.slot_view(slot)[16] = 99
    with pytest.raises(FormatRefused):
        tier.header(slot)


def read_in_worker(path: Path, replies: Connection) -> None:
    """Read two blocks from all slots until told to stop; report what came of it."""
    arena = ArenaMap(path, SLOT_BYTES, SLOTS)
    blocks = [make_block(number) for number in range(2)]
    served = wrong = 0
    while not replies.poll():
        for slot, block in itertools.product(range(SLOTS), blocks):
            out = empty(block)
            try:
                arena.read(slot, block.wanted, out)
            except (BlockMissing, BlockTorn, BlockCorrupt):
                continue
            if not served:
                replies.send("served")
            served += 1
            wrong += not np.array_equal(out, block.payload)
    replies.send((served, wrong))


def test_a_worker_process_never_reads_a_wrong_block_while_slots_change_hands(
    tier: DramTier,
) -> None:
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(
        target=read_in_worker, args=(tier.path, there)
    )
    worker.start()
    blocks = [make_block(number) for number in range(2)]
    rounds = 0
    while rounds < 2000 or (not here.poll() and rounds < 200_000):
        slot = tier.allocate()
        block = blocks[rounds % 2]
        tier.write(slot, block.header, block.payload)
        if tier.free_slots == 0:
            for taken in range(SLOTS):
                tier.free(taken)
        rounds += 1
    assert here.recv() == "served"
    here.send("stop")
    served, wrong = here.recv()
    worker.join()
    assert served > 0
    assert wrong == 0


def test_a_slot_number_out_of_range_is_a_block_that_is_not_there(arena: ArenaMap) -> None:
    block = make_block(1)
    for slot in (SLOTS, -1, 2**40):
        with pytest.raises(BlockMissing):
            arena.read(slot, block.wanted, empty(block))


def test_a_map_outlives_the_sidecar_and_sees_nothing_of_the_next_one(tmp_path: Path) -> None:
    block, out = make_block(1), empty(make_block(1))
    first = DramTier(tmp_path / "arena", SLOTS, SLOT_BYTES)
    slot = first.allocate()
    first.write(slot, block.header, block.payload)
    arena = ArenaMap(first.path, SLOT_BYTES, SLOTS)
    second = DramTier(tmp_path / "arena", SLOTS, SLOT_BYTES)
    first.close()
    assert second.path.exists()
    arena.read(slot, block.wanted, out)
    assert np.array_equal(out, block.payload)
    with pytest.raises(BlockMissing):
        second.read(slot, block.wanted, out)
    arena.close()
    second.close()
    assert not second.path.exists()


def test_an_arena_that_is_gone_means_detached_and_a_short_one_is_refused(
    tmp_path: Path, tier: DramTier
) -> None:
    with pytest.raises(Detached, match="arena_path"):
        ArenaMap(tmp_path / "none", SLOT_BYTES, SLOTS)
    with pytest.raises(FormatRefused, match="shorter"):
        ArenaMap(tier.path, SLOT_BYTES, SLOTS + 1)


def test_a_closed_map_is_detached_and_gives_its_descriptors_back(tier: DramTier) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    arena = ArenaMap(tier.path, SLOT_BYTES, SLOTS)
    arena.close()
    block = make_block(1)
    with pytest.raises(Detached):
        arena.read(0, block.wanted, empty(block))
    with pytest.raises(Detached):
        arena.fill(0, block.header, block.payload)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_closing_while_somebody_still_reads_waits_for_nothing_and_breaks_nothing(
    tier: DramTier, tmp_path: Path
) -> None:
    arena = ArenaMap(tier.path, SLOT_BYTES, SLOTS)
    view = arena._slot(0)
    arena.close()
    assert len(bytes(view)) == SLOT_BYTES
    other = DramTier(tmp_path / "other", 1, SLOT_BYTES)
    view = other.slot_view(0)
    other.close()
    assert len(bytes(view)) == SLOT_BYTES


def test_prefault_claims_all_memory_and_changes_nothing(tier: DramTier, arena: ArenaMap) -> None:
    block, out = make_block(1), empty(make_block(1))
    slot = tier.allocate()
    tier.write(slot, block.header, block.payload)
    assert tier.prefault(Event())
    arena.prefault(Event())
    assert tier.path.stat().st_blocks * 512 >= SLOTS * SLOT_BYTES
    arena.read(slot, block.wanted, out)
    assert np.array_equal(out, block.payload)


def test_prefault_stops_when_told(tier: DramTier, arena: ArenaMap) -> None:
    stop = Event()
    stop.set()
    assert not tier.prefault(stop)
    arena.prefault(stop)


def test_an_arena_larger_than_its_file_system_is_refused_with_the_cure(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    slot_bytes = 1024**3
    slots = room.f_blocks * room.f_frsize // slot_bytes + 1
    with pytest.raises(ConfigInvalid, match=rf"dram_bytes: {tmp_path}.*lower dram_bytes"):
        DramTier(tmp_path / "arena", slots, slot_bytes)
    assert not (tmp_path / "arena").exists()


def test_a_slot_whose_memory_cannot_be_claimed_is_not_given_out(tmp_path: Path) -> None:
    class Full(DramTier):
        def _back(self, slot: int) -> bool:
            return slot == 0 and super()._back(slot)

    tier = Full(tmp_path / "arena", SLOTS, SLOT_BYTES)
    assert tier.allocate() == 0
    with pytest.raises(TierFull, match="memory"):
        tier.allocate()
    assert tier.free_slots == SLOTS - 1
    assert not tier.prefault(Event())
    tier.close()


@pytest.mark.parametrize(("slots", "slot_bytes"), [(0, 8192), (1, 4096), (1, 10_000)])
def test_sizes_that_make_no_arena_are_refused(tmp_path: Path, slots: int, slot_bytes: int) -> None:
    with pytest.raises(ConfigInvalid, match="slot_bytes"):
        DramTier(tmp_path / "arena", slots, slot_bytes)


def test_the_arena_is_for_its_owner_only(tier: DramTier) -> None:
    assert tier.path.stat().st_mode & 0o077 == 0
