"""Looks through a flash directory while nothing runs, and changes nothing in it.

Every slot is read whole and its record judged by its own header and checksums; then the index is
compared with what the slots say. What is not listed in the index is no fault: an evicted block's
record stays until its slot is written again, and a write that a crash cut short was never listed.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvist.proto.errors import BlockCorrupt, FormatRefused
from kvist.proto.keys import NO_KEY
from kvist.proto.record import MAGIC, BlockHeader, checksum, unpack_header
from kvist.proto.slot import payload_of
from kvist.tiers.flash_clear import read_formatted
from kvist.tiers.flash_index import FlashEntry, read_index
from kvist.tiers.segment import (
    FLASH_VERSION,
    DiskIo,
    OwnerLock,
    Superblock,
    aligned_buffer,
)

Verdict = Literal["sound", "empty", "bad_header", "bad_payload", "other_version", "unreadable"]
VERDICTS: tuple[Verdict, ...] = (
    "sound", "empty", "bad_header", "bad_payload", "other_version", "unreadable",
)  # fmt: skip
IndexState = Literal["whole", "missing", "damaged", "rebuilding"]

# What is told in words; the rest is in the counts.
PROBLEMS_SHOWN = 20
_NAME = slice(8, 16)


@dataclass(slots=True)
class FlashReport:
    """What was found.

    Attributes:
        version: of the directory's format. slot_bytes: bytes of a slot.
        segments: segment files. slots: slots in them.
        records: verdict -> slots. empty: never written. bad_header, bad_payload: a checksum
            differs, or the lengths fit nothing. unreadable: the device failed.
        index: whole, missing, damaged, or rebuilding (a scan was not finished).
        entries: blocks that the index lists.
        listed_bad: of these, whose slot does not hold a sound record.
        listed_elsewhere: whose slot holds another block, or does not exist.
        orphans: whose block before is not listed; no lookup reaches them.
        unlisted: sound records that the index does not list.
        problems: the first PROBLEMS_SHOWN in words. problem_count: how many there are.
    """

    path: str
    version: int
    slot_bytes: int
    segments: int
    slots: int
    records: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERDICTS, 0))
    index: IndexState = "whole"
    entries: int = 0
    listed_bad: int = 0
    listed_elsewhere: int = 0
    orphans: int = 0
    unlisted: int = 0
    problems: list[str] = field(default_factory=list)
    problem_count: int = 0

    def complain(self, problem: str) -> None:
        """Note a problem."""
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_SHOWN:
            self.problems.append(problem)


def check_directory(
    path: Path, progress: Callable[[int, int], None], disk: DiskIo | None = None
) -> FlashReport:
    """Check a flash directory, which is locked meanwhile.

    Args:
        path: the directory.
        progress: told the slots done and the slots there are, after each.
        disk: system calls, replaced by tests.

    Raises:
        ConfigInvalid: it is no flash directory, or a process uses it.
        FormatRefused: the superblock is damaged or of another version; with the cure.
        OSError: the directory cannot be read.
    """
    superblock = read_formatted(path)
    with ExitStack() as undo:
        lock = OwnerLock(path, "stop it first: only a folder that nothing changes can be verified")
        undo.callback(lock.close)
        files = sorted(path.glob("segment-[0-9]*"))
        sizes = [file.stat().st_size // superblock.slot_bytes for file in files]
        report = FlashReport(
            str(path), FLASH_VERSION, superblock.slot_bytes, len(files), sum(sizes)
        )
        slots = _Slots(superblock, disk or DiskIo())
        for file, count in zip(files, sizes, strict=True):
            _check_names(report, file)
            slots.read(file, count, lambda: progress(len(slots.verdicts), report.slots))
        report.records.update(Counter(slots.verdicts))
        _check_index(report, path, slots)
    return report


def _check_names(report: FlashReport, file: Path) -> None:
    want = f"segment-{int(file.name[8:]):05}" if file.name[8:].isdigit() else ""
    if file.name != want:
        report.complain(f"{file.name} is no name that kvistd gives a segment")


class _Slots:
    """What every slot holds, in order; 40 bytes a slot.

    Attributes:
        verdicts: one per slot.
        identity: a hash of what the index should say of the slot's block, 0 where none is sound.
    """

    def __init__(self, superblock: Superblock, disk: DiskIo) -> None:
        self.verdicts: list[Verdict] = []
        self.identity = array("q")
        self._slot_bytes = superblock.slot_bytes
        self._disk = disk
        self._buffer = aligned_buffer(superblock.slot_bytes)

    def read(self, file: Path, count: int, done: Callable[[], None]) -> None:
        """Judge the slots of a segment."""
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._make_direct(fd)
            for at in range(count):
                verdict, header = self._judge(fd, at * self._slot_bytes)
                self.verdicts.append(verdict)
                self.identity.append(_identity_of(header) if header is not None else 0)
                done()
        finally:
            os.close(fd)

    def _make_direct(self, fd: int) -> None:
        try:
            self._disk.set_direct(fd)
        except OSError as error:  # a file system without it
            if error.errno != errno.EINVAL:
                raise

    def _judge(self, fd: int, offset: int) -> tuple[Verdict, BlockHeader | None]:
        try:
            self._disk.pread(fd, [self._buffer], offset)
        except OSError:
            return "unreadable", None
        if self._buffer[_NAME] != MAGIC:
            return ("bad_header" if any(self._buffer[_NAME]) else "empty"), None
        try:
            header = unpack_header(self._buffer)
            payload = payload_of(self._buffer, header)
        except FormatRefused:
            return "other_version", None
        except BlockCorrupt:
            return "bad_header", None
        if checksum(payload) != header.checksum:
            return "bad_payload", None
        return "sound", header


def _identity_of(block: BlockHeader | FlashEntry) -> int:
    shape = (block.payload_bytes, _tokens_of(block))
    return hash((block.key, block.parent, block.namespace, block.depth, shape)) or 1


def _tokens_of(block: BlockHeader | FlashEntry) -> int:
    return block.block_tokens if isinstance(block, FlashEntry) else block.shape.block_tokens


def _check_index(report: FlashReport, path: Path, slots: _Slots) -> None:
    file = path / "index.mdb"
    entries: list[FlashEntry] | None = []
    if file.exists():
        entries = read_index(file, lambda _: True)
        report.index = "damaged" if entries is None else "whole"
    else:
        report.index = "rebuilding" if (path / "index.new").exists() else "missing"
    if report.index != "whole":
        report.complain(f"the index is {report.index}; kvistd rebuilds it at its start")
    listed = bytearray(report.slots)
    keys = {entry.key for entry in entries or ()}
    for entry in entries or ():
        report.entries += 1
        _check_entry(report, entry, slots)
        if entry.slot < report.slots:
            listed[entry.slot] = 1
        if entry.parent != NO_KEY and entry.parent not in keys:
            report.orphans += 1
            report.complain(f"block {entry.key.hex()}: the block before it is not listed")
    sound = sum(verdict == "sound" for verdict in slots.verdicts)
    report.unlisted = sound - sum(
        verdict == "sound" and there for verdict, there in zip(slots.verdicts, listed, strict=True)
    )


def _check_entry(report: FlashReport, entry: FlashEntry, slots: _Slots) -> None:
    name = f"block {entry.key.hex()} in slot {entry.slot}"
    if entry.slot >= report.slots:
        report.listed_elsewhere += 1
        report.complain(f"{name}: there is no such slot")
    elif slots.verdicts[entry.slot] != "sound":
        report.listed_bad += 1
        report.complain(f"{name}: {slots.verdicts[entry.slot].replace('_', ' ')}")
    elif slots.identity[entry.slot] != _identity_of(entry):
        report.listed_elsewhere += 1
        report.complain(f"{name}: the slot holds another block")
