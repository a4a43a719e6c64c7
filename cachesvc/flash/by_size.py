"""A flash folder for models of all sizes: a sub-folder for each size of slots, named by its bytes.

Slots do not change their size, so a model of larger blocks would have to empty the folder of one
of smaller blocks, and a model of smaller blocks would waste the rest of each slot, in DRAM too.
With sub-folders each keeps what it stored while another is tried out, as long as there is room.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from kvist.cachesvc.log import Log
from kvist.proto.errors import ConfigInvalid, FormatRefused
from kvist.proto.sizes import format_bytes
from kvist.tiers.flash_clear import clear_directory
from kvist.tiers.segment import read_superblock

# Slots are claimed on the disk at once, so this is what they take, used or not.
_BLOCK_BYTES = 512


def folder_of_size(flash: Path, slot_bytes: int, budget_bytes: int, log: Log) -> Path:
    """The folder for slots of a size, after making room for it.

    Those of other sizes may take budget_bytes together; while they take more, or the disk has no
    room for this one, the one that was not used for longest is emptied. One in use stays.

    Args:
        flash: the folder of all sizes. Where it is formatted itself for slots of this size (by a
            sidecar, say), it is the one.
        slot_bytes: bytes of a slot, a multiple of 4096.
        budget_bytes: of the slots of one size.
        log: where an emptied folder is told.

    Returns: the folder, which need not exist.
    """
    own = flash if _slot_bytes(flash) == slot_bytes else flash / str(slot_bytes)
    others = [path for path in _formatted(flash) if path != own]
    held = {path: _held_bytes(path) for path in others}
    for path in sorted(others, key=_used_s):
        if sum(held.values()) <= budget_bytes and _has_room(flash, own, budget_bytes):
            break
        taken = held.pop(path)
        with suppress(ConfigInvalid, OSError):  # in use, or not ours
            clear_directory(path)
            log.info(
                "flash folder of another slot size emptied, to stay within --cache-flash-bytes",
                folder=path, freed=format_bytes(taken), slot_bytes=slot_bytes,
            )  # fmt: skip
    return own


def _formatted(flash: Path) -> list[Path]:
    sizes = [path for path in flash.glob("[1-9]*") if path.name.isdecimal()]
    return [path for path in (flash, *sizes) if (path / "superblock").is_file()]


def _slot_bytes(path: Path) -> int | None:
    with suppress(FormatRefused, OSError):
        superblock = read_superblock(path)
        return None if superblock is None else superblock.slot_bytes
    return None


def _held_bytes(path: Path) -> int:
    with suppress(OSError):  # emptied meanwhile
        return sum(file.stat().st_blocks * _BLOCK_BYTES for file in path.glob("segment-*"))
    return 0


def _used_s(path: Path) -> float:
    with suppress(OSError):
        return max(file.stat().st_mtime for file in path.iterdir() if file.is_file())
    return 0.0


def _has_room(flash: Path, own: Path, needed_bytes: int) -> bool:
    with suppress(OSError):  # the first start: nothing is there yet
        space = os.statvfs(flash)
        return space.f_bavail * space.f_frsize + _held_bytes(own) >= needed_bytes
    return True
