"""A flash folder after anything may have happened to its slots: open, scan, restore, read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from hypothesis import strategies as st
from sim.blocks import SLOT_BYTES
from sim.flash import load

from fuzz.records import BLOCKS, DAMAGES, PAGES, Damage
from fuzz.target import Check, Target
from kvist.proto.errors import BlockCorrupt, BlockMissing, FormatRefused
from kvist.tiers.flash import FlashTier
from kvist.tiers.flash_index import FlashEntry, unpack_value
from kvist.tiers.segment import Superblock, read_superblock, slots_that_fit

SLOTS = 4


@dataclass(frozen=True, slots=True)
class Folder:
    """What lies on the disk.

    Attributes:
        slots: content of the first slots; the others are empty.
        superblock: (offset, byte) changed in the superblock.
        value: what an index entry of the first block says.
    """

    slots: tuple[Damage | bytearray, ...]
    superblock: tuple[tuple[int, int], ...]
    value: bytes


_BYTES_AT = st.tuples(st.integers(0, 47), st.integers(0, 255))
FOLDERS = st.builds(
    Folder,
    slots=st.lists(DAMAGES | PAGES, max_size=SLOTS).map(tuple),
    superblock=st.lists(_BYTES_AT, min_size=1, max_size=4).map(tuple),
    value=st.binary(max_size=80),
)


@contextmanager
def _opened() -> Iterator[Check]:
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="kvist-fuzz-", dir=memory if memory.is_dir() else None))
    try:
        other = root / "superblock-only"
        other.mkdir()
        tier = FlashTier.open(root / "flash", SLOTS * SLOT_BYTES, SLOT_BYTES)
        segment = root / "flash" / "segment-00000"

        def check(data: object) -> None:
            assert isinstance(data, Folder)
            check_superblock(other, data.superblock)
            check_value(data.value)
            tier.clear()
            with segment.open("r+b") as file:
                for slot, content in enumerate(data.slots):
                    file.seek(slot * SLOT_BYTES)
                    file.write(content.slot() if isinstance(content, Damage) else content)
            check_scan(tier)

        yield check
        tier.close()
    finally:
        shutil.rmtree(root)


def check_superblock(path: Path, changes: tuple[tuple[int, int], ...]) -> None:
    """A changed superblock is refused, or it is as good as the old one."""
    good = Superblock(SLOT_BYTES, 64)
    data = bytearray(good.pack())
    for offset, value in changes:
        data[offset] = value
    (path / "superblock").write_bytes(data)
    try:
        found = read_superblock(path)
    except FormatRefused:
        return
    assert found == good
    assert slots_that_fit(path, found, SLOTS * SLOT_BYTES, None) == SLOTS


def check_value(value: bytes) -> None:
    """An index value that does not pass its check says nothing."""
    key = BLOCKS[0].header.key
    assert unpack_value(key, value) is None


def check_scan(tier: FlashTier) -> None:
    """Every entry that a scan gives can be taken, and read as what it says, or not at all."""
    entries = list(tier.scan(Event()))
    assert len({entry.slot for entry in entries}) == len(entries) <= SLOTS
    assert len({entry.key for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.record_bytes <= SLOT_BYTES
        if tier.take(entry):
            check_record(tier, entry)
    for block in BLOCKS:
        for slot in range(-1, SLOTS + 1):
            load(tier, slot, block)  # looks that no wrong byte is served


def check_record(tier: FlashTier, entry: FlashEntry) -> None:
    """The whole record as a rise reads it."""
    with tier._io.buffer() as buffer:
        try:
            header = tier.read_record(entry.slot, buffer)
        except (BlockCorrupt, BlockMissing):
            return
        assert header.shape.record_bytes <= SLOT_BYTES


TARGET = Target("segment scan", FOLDERS, _opened)
