"""The flash tier on a device that fails, and comes back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.blocks import empty, make_block
from sim.disk import FaultyDisk
from sim.flash import SLOTS, load, open_tier, recovered, store

from kvist.proto.errors import (
    KvistError,
    TierOffline,
)
from kvist.tiers.flash import FlashTier


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def tier(tmp_path: Path, disk: FaultyDisk) -> Iterator[FlashTier]:
    tier = open_tier(tmp_path / "flash", disk)
    yield tier
    tier.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_failed_write_turns_the_tier_off_until_probe_finds_it_working(
    tier: FlashTier, disk: FaultyDisk, code: int
) -> None:
    kept = make_block(1)
    slot = store(tier, kept)
    disk.broken["pwrite"] = code
    other = tier.allocate()
    with pytest.raises(TierOffline, match=os.strerror(code)):
        tier.write(other, kept.header, kept.payload)
    assert (tier.state, os.strerror(code) in tier.failure) == ("failed", True)
    for refused in (
        tier.allocate,
        tier.clear,
        lambda: tier.read(slot, kept.wanted, empty(kept)),
        lambda: tier.index_put([kept.entry(slot)]),
        lambda: tier.index_delete([kept.header.key]),
    ):
        with pytest.raises(TierOffline):
            refused()
    assert not tier.probe()
    disk.broken.clear()
    assert tier.probe()
    assert load(tier, slot, kept)
    tier.write(other, kept.header, kept.payload)
    assert load(tier, other, kept)


def test_a_failed_read_turns_the_tier_off_and_a_failing_sync_keeps_it_off(
    tier: FlashTier, disk: FaultyDisk
) -> None:
    block = make_block(1)
    slot = store(tier, block)
    disk.broken = {"pread": errno.EIO, "sync": errno.EIO}
    with pytest.raises(TierOffline):
        tier.read(slot, block.wanted, empty(block))
    assert not tier.probe()
    disk.broken.clear()
    assert tier.probe()
    assert load(tier, slot, block)


@pytest.mark.parametrize("tear_at", [0, 100, 4096, 6000])
def test_a_write_that_stops_half_way_leaves_no_readable_block(tmp_path: Path, tear_at: int) -> None:
    disk = FaultyDisk()
    disk.broken["direct"] = errno.EINVAL  # so that a write can stop anywhere
    tier = open_tier(tmp_path, disk)
    slot = tier.allocate()
    block = make_block(1)
    disk.tear_at = tear_at
    with pytest.raises(TierOffline):
        tier.write(slot, block.header, block.payload)
    assert tier.probe()
    assert not load(tier, slot, block)
    tier.close()
    (tmp_path / "index.mdb").unlink()
    tier = open_tier(tmp_path)
    assert all(not load(tier, slot, make_block(it)) for slot, it in recovered(tier).items())
    tier.close()


def test_a_vanished_directory_turns_the_tier_off_and_its_return_on(
    tmp_path: Path, tier: FlashTier
) -> None:
    block = make_block(1)
    slot = store(tier, block)
    (tmp_path / "flash").rename(tmp_path / "gone")
    with pytest.raises(TierOffline, match="flash"):
        tier.index_put([block.entry(slot)])
    assert not tier.probe()
    (tmp_path / "flash").mkdir()
    (tmp_path / "flash" / "owner.lock").touch()
    assert not tier.probe()
    (tmp_path / "flash" / "owner.lock").unlink()
    (tmp_path / "flash").rmdir()
    (tmp_path / "gone").rename(tmp_path / "flash")
    assert tier.probe()
    assert load(tier, slot, block)


def test_a_disk_without_room_is_said_at_open_and_leaves_nothing_open(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.broken["fallocate"] = errno.ENOSPC
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TierOffline, match=rf"flash_path {tmp_path}.*No space left"):
        open_tier(tmp_path, disk)
    assert len(os.listdir("/proc/self/fd")) == before
    disk.broken.clear()
    open_tier(tmp_path, disk).close()


def test_a_clear_that_fails_can_be_repeated_when_the_device_works_again(
    tier: FlashTier, disk: FaultyDisk
) -> None:
    store(tier, make_block(1))
    disk.broken["fallocate"] = errno.EIO
    with pytest.raises(TierOffline):
        tier.clear()
    disk.broken.clear()
    assert tier.probe()
    tier.clear()
    assert (tier.state, tier.free_slots) == ("ready", SLOTS)
    assert load(tier, store(tier, make_block(2)), make_block(2))


def test_a_clear_in_a_vanished_directory_is_done_when_it_is_back(
    tmp_path: Path, tier: FlashTier
) -> None:
    store(tier, make_block(1))
    (tmp_path / "flash").rename(tmp_path / "gone")
    with pytest.raises(TierOffline):
        tier.clear()
    assert not tier.probe()
    (tmp_path / "gone").rename(tmp_path / "flash")
    assert tier.probe()
    tier.clear()
    assert load(tier, store(tier, make_block(2)), make_block(2))


def test_a_file_where_the_directory_should_be_is_an_offline_tier(tmp_path: Path) -> None:
    (tmp_path / "flash").touch()
    with pytest.raises(TierOffline, match="flash_path"):
        open_tier(tmp_path / "flash")


@pytest.mark.parametrize("operation", ["direct", "pread"])
def test_a_file_system_without_direct_io_works_and_says_so(tmp_path: Path, operation: str) -> None:
    class Refusing(FaultyDisk):
        def _enter(self, name: str) -> None:
            self.broken = {operation: errno.EINVAL} if not self.calls.count(operation) else {}
            super()._enter(name)

    tier = open_tier(tmp_path, Refusing())
    assert not tier.direct
    block = make_block(1)
    assert load(tier, store(tier, block), block)
    tier.close()


def test_an_index_that_cannot_grow_turns_the_tier_off_and_the_tier_comes_back(
    tier: FlashTier,
) -> None:
    class Failing:
        def put(self, _entries: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    index, tier._index = tier._index, Failing()  # type: ignore[assignment]
    with pytest.raises(TierOffline, match="No space"):
        tier.index_put([make_block(1).entry(0)])
    tier._index = index
    assert tier.probe()
    assert tier.state == "ready"


def test_a_failed_tier_frees_slots_and_closes_all_the_same(tmp_path: Path) -> None:
    disk = FaultyDisk()
    tier = open_tier(tmp_path, disk)
    slot = tier.allocate()
    disk.broken = {"pwrite": errno.EIO, "pread": errno.EIO, "sync": errno.EIO}
    with pytest.raises(KvistError):
        tier.write(slot, make_block(1).header, make_block(1).payload)
    tier.free(slot)
    tier.close()
    assert tier.state == "off"
