"""Clearing a flash directory: whether it is one, and what is Kvist's in it goes, by exact names."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from kvist.proto.errors import ConfigInvalid, FormatRefused
from kvist.tiers.durable import sync_directory
from kvist.tiers.segment import OwnerLock, Superblock, read_superblock

# In the order in which they go. The superblock is the last: until then the directory is Kvist's,
# and what was interrupted can be done again.
_OWN_NAMES = (
    re.compile(r"index\.(mdb|new|bad)"),
    re.compile(r"segment-\d{5,}"),
    re.compile(r"superblock\.new"),
    re.compile(r"superblock"),
)


def read_formatted(path: Path) -> Superblock:
    """What a directory was formatted for.

    Raises:
        ConfigInvalid: Kvist has not formatted it, or it does not exist.
        FormatRefused: it has, but see read_superblock.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise ConfigInvalid(f"{path} does not exist")
    if not path.is_dir():
        raise ConfigInvalid(f"{path} is not a flash folder of kvistd: it is a file")
    superblock = read_superblock(path)
    if superblock is None:
        raise ConfigInvalid(f"{path} is not a flash folder of kvistd: it has no superblock")
    return superblock


def clear_files(path: Path) -> None:
    """Remove every file of Kvist's in a directory that the caller has locked, but the lock.

    Raises:
        OSError: the device failed.
    """
    files = [file for file in path.iterdir() if file.is_file() or file.is_symlink()]
    for own in _OWN_NAMES:
        for file in files:
            if own.fullmatch(file.name):
                file.unlink()
    sync_directory(path)


def clear_directory(path: Path) -> None:
    """Remove what Kvist keeps in a directory, of whatever version, and nothing else.

    Raises:
        ConfigInvalid: Kvist has not formatted it, or a process uses it; nothing was touched.
        OSError: the device failed.
    """
    with suppress(FormatRefused):  # of another version, or damaged: that is what clearing is for
        read_formatted(path)
    lock = OwnerLock(path, "stop it first")
    try:
        clear_files(path)
    finally:
        lock.close()
