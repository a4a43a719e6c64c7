"""An open flash folder: its lock, its segments and its index, which open and close together."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kvist.proto.errors import ConfigInvalid, FormatRefused, TierOffline
from kvist.proto.sizes import format_bytes
from kvist.tiers.flash_clear import clear_files
from kvist.tiers.flash_index import FlashIndex
from kvist.tiers.flash_io import DEVICE_ERRORS
from kvist.tiers.segment import (
    DiskIo,
    OwnerLock,
    Segments,
    make_superblock,
    read_superblock,
    slots_that_fit,
    write_superblock,
)


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """What a flash tier is to be, whether its folder can be opened now or not.

    Attributes:
        path: the folder, for one process alone.
        capacity_bytes: of its slots; all of them are claimed at the opening.
        disk: system calls.
    """

    path: Path
    capacity_bytes: int
    disk: DiskIo

    def slots(self, slot_bytes: int) -> int:
        """How many slots there will be. Raises: ConfigInvalid: the sizes make no tier."""
        return slots_that_fit(self.path, make_superblock(slot_bytes), self.capacity_bytes, None)


@dataclass(frozen=True, slots=True)
class FlashFolder:
    """What is open of it.

    Attributes:
        mount: where its file system is mounted.
    """

    mount: Path
    lock: OwnerLock
    segments: Segments
    index: FlashIndex

    def close(self) -> None:
        """Close the files and give the folder back."""
        self.index.close()
        self.segments.close()
        self.lock.close()


def open_folder(plan: FlashPlan, slot_bytes: int | None) -> FlashFolder | None:
    """Open a folder, format it if it is new, and read its index.

    What an opening that fails has claimed of the disk it gives back.

    Args:
        slot_bytes: bytes of a slot; None takes what the folder was formatted with.

    Returns: None when slot_bytes is None and the folder is not formatted, but could be.

    Raises:
        ConfigInvalid: another process has it, or the sizes make no tier.
        FormatRefused: it was formatted otherwise; the message says how to clear it.
        TierOffline: the folder cannot be made or used now, or has no room.
    """
    try:
        if slot_bytes is None and read_superblock(plan.path) is None:
            _check_can_be(plan)
            return None
        return _open(plan, slot_bytes)
    except DEVICE_ERRORS as error:
        raise TierOffline(f"flash_path {plan.path}: {error}") from error


def try_folder(
    plan: FlashPlan, slot_bytes: int, mount: Path | None
) -> tuple[FlashFolder | None, str]:
    """The same for a service that runs and must not fail.

    Args:
        mount: where the file system was mounted when the folder was open before. Not to be opened
            when nothing is mounted there: it would be made on the disk beneath, and filled.

    Returns: the folder, or None and why it cannot be opened now.
    """
    if mount is not None and not mount.is_mount():
        return None, f"flash_path {plan.path}: nothing is mounted at {mount} any more"
    try:
        return open_folder(plan, slot_bytes), ""
    except (TierOffline, ConfigInvalid, FormatRefused) as error:
        return None, str(error)


def _mount_of(path: Path) -> Path:
    path = path.resolve()
    return next(each for each in (path, *path.parents) if each.is_mount())


def _open(plan: FlashPlan, slot_bytes: int | None) -> FlashFolder:
    path, disk = plan.path, plan.disk
    with ExitStack() as undo:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = OwnerLock(path)
        undo.callback(lock.close)
        superblock = read_superblock(path)
        is_new = superblock is None
        if superblock is None:
            assert slot_bytes is not None
            superblock = make_superblock(slot_bytes)
            clear_files(path)
        slots = slots_that_fit(path, superblock, plan.capacity_bytes, slot_bytes)
        _check_room(path, slots * superblock.slot_bytes)
        segments = Segments(path, superblock, slots, disk)
        undo.callback(segments.close)
        if is_new:
            write_superblock(path, superblock)
        index = disk.open_index(path, slots, lambda it: segments.fits(it.slot, it.record_bytes))
        undo.callback(index.close)
        if is_new:
            index.finish()
        undo.pop_all()
        return FlashFolder(_mount_of(path), lock, segments, index)


def _check_can_be(plan: FlashPlan) -> None:
    """See that a folder can be made and written and has room, long before it is formatted.

    Raises: OSError.
    """
    plan.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(plan.path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it cannot be written by this user")
    _check_room(plan.path, plan.capacity_bytes)


def _check_room(path: Path, needed_bytes: int) -> None:
    """Said with the setting, and before a disk that others use too is filled to the brim.

    Raises: OSError.
    """
    space = os.statvfs(path)
    held = sum(entry.stat().st_blocks * 512 for entry in os.scandir(path) if entry.is_file())
    free = space.f_bavail * space.f_frsize + held
    if needed_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"No space left: flash_bytes {format_bytes(needed_bytes)}, free"
            f" {format_bytes(free)}; make room or lower flash_bytes",
        )
