"""Whether the sidecar fits where it is to live, looked at before anything is made."""

from __future__ import annotations

import os
from pathlib import Path

from kvist.cachesvc.config import SidecarConfig
from kvist.proto.errors import ConfigInvalid
from kvist.proto.sizes import format_bytes


def check_space(config: SidecarConfig) -> None:
    """See whether run_dir and shm_dir can be used; makes them if they are missing.

    What Kvist itself left in a folder counts as free, because it is used again or removed. The
    flash folder is not looked at: one that cannot be used now may be later (flash/watch).

    Raises:
        ConfigInvalid: a folder cannot be made or written, or has too little room.
    """
    _check_folder("run_dir", config.run_dir, 0)
    _check_folder("shm_dir", config.shm_dir, config.dram_bytes, "dram_bytes")


def _check_folder(key: str, path: Path, needed_bytes: int, size_key: str = "") -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        space = os.statvfs(path)
        held = sum(entry.stat().st_blocks * 512 for entry in os.scandir(path) if entry.is_file())
    except OSError as error:
        raise ConfigInvalid(
            f"{key}: cannot use {path}: {error.strerror}; give a folder of this user"
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigInvalid(f"{key}: {path} cannot be written by this user; give another folder")
    free = space.f_bavail * space.f_frsize + held
    if needed_bytes > free:
        raise ConfigInvalid(
            f"{size_key}: {format_bytes(needed_bytes)} do not fit into {path} ({key}), which has "
            f"{format_bytes(free)} free; lower {size_key} or give another {key}"
        )
