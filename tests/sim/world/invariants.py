"""What must hold of a store between any two steps, and the plain model it is compared with.

The model is a dict: key -> what was committed under it. In DESIGN.md's words: a read never gives
bytes other than those (1); nothing is visible that is not in it (2); a block leaves only for a
reason that is counted; every slot is free, held, or in exactly one row (5); the parent of what is
stored is stored, and likewise on flash. What the index shows on flash is on the medium, record
and index entry, unless the world itself has damaged it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.catalog.index import unpack_location
from kvist.cachesvc.catalog.location import dram_half
from kvist.cachesvc.core.parts import Parts
from kvist.cachesvc.core.store import Store
from kvist.cachesvc.flash.flashio import Rise
from kvist.cachesvc.placing.wards import Wards
from kvist.proto.errors import BlockCorrupt, FormatRefused
from kvist.proto.keys import KEY_BYTES, NO_KEY, BlockKey
from kvist.proto.record import PAGE_BYTES, checksum, unpack_header
from kvist.proto.shm import BUCKET_BYTES, BUCKET_ROWS, HEADER_BYTES
from kvist.proto.slot import payload_of
from sim.world.forest import BLOCKS, PAYLOADS, SLOT_BYTES, name_of
from sim.world.medium import Medium
from sim.world.worker import SimClient

_WORD = struct.Struct("<Q")
Row: TypeAlias = tuple[int, BlockKey, int | None, int | None]
"""Row, key, slot in DRAM, slot on flash; those included that were cleared and not yet dropped."""

# Counted block by block; counted once for all that stands on it.
_ONE_BY_ONE = ("dram_evicted", "flash_evicted", "expired", "flash_let_go")
_REASONS = (*_ONE_BY_ONE, "dram_corrupt", "flash_corrupt")


class Model:
    """What was committed, and what the world did to it.

    Attributes:
        committed: keys that were ever committed, in any life.
        spoiled: keys whose copy in DRAM the world, or a worker, has damaged at some time.
        spoiled_slots: slot of the arena -> its generation when that happened.
        present: keys that were stored at the last look.
    """

    def __init__(self, medium: Medium) -> None:
        self.committed: set[BlockKey] = set()
        self.spoiled: set[BlockKey] = set()
        self.spoiled_slots: dict[int, int] = {}
        self.present: set[BlockKey] = set()
        self._medium = medium
        self._reasons = [0] * len(_REASONS)

    def new_life(self, parts: Parts | None) -> None:
        """What was in memory is gone; what a life begins with was committed before."""
        self.spoiled_slots.clear()
        self._reasons = [0] * len(_REASONS)
        self.present = set()
        if parts is not None:
            self.present = shown_keys(parts, table_of(parts))
            self._reasons = [getattr(parts.placement.counts, name) for name in _REASONS]

    @property
    def hurt(self) -> bool:
        """Whether the world has damaged anything yet."""
        return bool(self.spoiled) or self._medium.hurt

    def space(self, key: BlockKey) -> bytes:
        """Digest of a block's namespace."""
        return BLOCKS[key].header.namespace

    def check_record(self, key: BlockKey, record: memoryview) -> None:
        """What a remote reader got, if it is whole, is what was committed."""
        try:
            header = unpack_header(record)
            is_whole = checksum(payload_of(record, header)) == header.checksum
        except (BlockCorrupt, FormatRefused):
            is_whole = False
        if is_whole:
            assert header == replace(BLOCKS[key].header, created_s=header.created_s)
            assert payload_of(record, header).tobytes() == PAYLOADS[key]
        else:
            assert key in self.spoiled, f"{name_of(key)} was sent damaged"

    def check(self, store: Store, clients: Sequence[SimClient], cleared: bool = False) -> None:
        """Between two steps of the sidecar's thread. cleared: the last one was Clear."""
        parts = store._parts
        if parts is None:
            return
        rows = table_of(parts)
        shown = [row for row in rows if not parts.index.hidden.of[row[0]]]
        assert len(shown) == len(parts.placement.blocks)
        check_hidden(parts, rows)
        check_closures(parts, rows)
        check_slots(store, parts, rows)
        check_rises(parts)
        check_holders(store, clients)
        self._check_dram(parts, rows)
        self._check_flash(shown)
        self._check_gone(parts, shown_keys(parts, rows), cleared)

    def _check_dram(self, parts: Parts, rows: Sequence[Row]) -> None:
        """Readable slots hold what the index says, and no other slot can be read."""
        view = parts.dram._view
        shown = {dram: key for _, key, dram, _ in rows}
        for slot in range(parts.dram.slots):
            at = slot * SLOT_BYTES
            (generation,) = _WORD.unpack_from(view, at)
            key = shown.get(slot)
            assert (generation & 1 == 0) == (key is not None), f"slot {slot} of {key}"
            if key is None or self.spoiled_slots.get(slot) == generation:
                continue
            payload = PAYLOADS[key]
            start = at + PAGE_BYTES
            is_right = view[at + 24 : at + 40] == key
            is_right = is_right and view[start : start + len(payload)] == payload
            assert is_right, f"slot {slot} does not hold {name_of(key)}"

    def _check_flash(self, rows: Sequence[Row]) -> None:
        """What is shown on flash is in the flash index, and there."""
        medium = self._medium
        for _, key, _, slot in rows:
            if slot is None:
                continue
            entry = medium.rows.get(key)
            assert entry is not None, f"{name_of(key)} is not in the flash index"
            assert entry.slot == slot, f"{name_of(key)} is elsewhere in the flash index"
            if slot not in medium.damaged and key not in self.spoiled:
                at = slot * SLOT_BYTES
                assert medium.data[at + 24 : at + 40] == key, f"{name_of(key)} is not on flash"

    def _check_gone(self, parts: Parts, now: set[BlockKey], cleared: bool) -> None:
        counts = parts.placement.counts
        reasons = [getattr(counts, name) for name in _REASONS]
        grown = [new - old for new, old in zip(reasons, self._reasons, strict=True)]
        gone = self.present - now
        if gone and not cleared and not any(grown[len(_ONE_BY_ONE) :]):
            names = sorted(map(name_of, gone))
            assert len(gone) <= sum(grown), f"{names} went, {grown} blocks for a reason"
        strange = sorted(map(name_of, now - self.committed))
        assert not strange, f"{strange} are visible and were never committed"
        self._reasons, self.present = reasons, now


def table_of(parts: Parts) -> list[Row]:
    """All that the index holds."""
    index, rows = parts.index, []
    words, mapped = index._words, index._map
    first = index._position(0)
    for bucket in range(index.buckets):
        ways = words[first : first + BUCKET_ROWS].tolist()
        first += BUCKET_BYTES // 8
        if not any(ways):
            continue
        start = HEADER_BYTES + bucket * BUCKET_BYTES
        for way, word in enumerate(ways):
            if word:
                at = start + way * KEY_BYTES
                low, high = dram_half(word), word >> 32
                row = bucket * BUCKET_ROWS + way
                written = BlockKey(mapped[at : at + KEY_BYTES])
                key = index.key(row)
                assert (written == key) == (not index.hidden.of[row])
                rows.append((row, key, low - 1 if low else None, high - 1 if high else None))
    return rows


def rows_of(parts: Parts) -> list[int]:
    """Rows of what can be found."""
    return [row for row, _, _, _ in table_of(parts) if not parts.index.hidden.of[row]]


def shown_keys(parts: Parts, rows: Sequence[Row]) -> set[BlockKey]:
    """Keys that can be found."""
    return {key for row, key, _, _ in rows if not parts.index.hidden.of[row]}


def check_hidden(parts: Parts, rows: Sequence[Row]) -> None:
    """What was cut cannot be found, nothing is made of it, and somebody will drop it."""
    index, blocks = parts.index, parts.placement.blocks
    hidden = [(row, key) for row, key, _, _ in rows if index.hidden.of[row]]
    assert not hidden or parts.moves.clearing.busy, "cleared blocks that nobody drops"
    for row, key in hidden:
        assert index.locate(key) != row, f"{name_of(key)} was cleared and is found"
        assert row not in parts.placement.jobs, f"{name_of(key)} was cleared and moves"
    for row, key, _, _ in rows:
        parent = blocks.parent[row]
        assert parent == NO_ROW or index.hidden.of[row] == index.hidden.of[parent], name_of(key)


def check_closures(parts: Parts, rows: Sequence[Row]) -> None:
    """Parents are there, children are counted, eviction knows every leaf."""
    placement, blocks = parts.placement, parts.placement.blocks
    keys = {row: key for row, key, _, _ in rows}
    in_dram, on_flash = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
    for row, key, dram, flash in rows:
        parent, header = blocks.parent[row], BLOCKS[key].header
        assert blocks.depth[row] == header.depth
        assert blocks.namespace(row) == header.namespace
        if parent == NO_ROW:
            assert header.parent == NO_KEY or parts.index.hidden.of[row]
            continue
        assert parent in keys, "a block without the one before it"
        assert keys[parent] == header.parent
        reaches = flash is not None or blocks._sinking[row]
        assert not reaches or blocks.reaches_flash(parent), "a block on flash without its parent"
        in_dram[parent] += dram is not None
        on_flash[parent] += bool(reaches)
    for row in keys:
        assert blocks.dram_children[row] == in_dram[row]
        assert blocks.flash_children[row] == on_flash[row]
        if parts.index.hidden.of[row]:  # it is dropped anyway, and before others are evicted
            continue
        if placement.may_leave_dram(row):
            known = row in placement._dram_leaves or is_set_aside(placement._dram_wards, row)
            assert known, "a leaf that eviction does not know"
        if placement.may_leave_flash(row):
            assert placement._flash_leaves is not None
            known = row in placement._flash_leaves or is_set_aside(placement._flash_wards, row)
            assert known, "a leaf that eviction does not know"


def is_set_aside(wards: Wards, row: int) -> bool:
    """Whether a leaf that came up is kept from eviction for a while, by a floor or a pin."""
    parked = any(row in rows for rows in wards._parked.values())
    return parked or any(row == each for _, each in wards._aside)


def check_slots(store: Store, parts: Parts, rows: Sequence[Row]) -> None:
    """Every slot is free, held, on a move, or in exactly one row."""
    moves = parts.moves
    dram = [slot for _, _, slot, _ in rows if slot is not None]
    dram += [slot for session in store._sessions.each() for slot in session.reserved]
    free = parts.dram._free
    assert len(set(dram)) == len(dram), "a DRAM slot is used twice"
    assert all(free._used[slot] for slot in dram), "a DRAM slot in use counts as free"
    used = parts.dram.slots - free.count - len(free.doomed.difference(dram))
    assert used == len(dram) + moves._rising, f"{used} DRAM slots taken, {len(dram)} in use"
    if parts.flash is None:
        return
    flash = [slot for _, _, _, slot in rows if slot is not None]
    flash += [job.flash_slot for job in moves._sinking]
    free = parts.flash._free
    assert len(set(flash)) == len(flash), "a flash slot is used twice"
    assert all(free._used[slot] for slot in flash), "a flash slot in use counts as free"
    used = parts.flash.slots - free.count - len(free.doomed.difference(flash))
    assert used == len(flash), f"{used} flash slots taken, {len(flash)} in use"


def check_rises(parts: Parts) -> None:
    """The index says of a block that it rises as long as it is followed, and of no other."""
    shown = {}
    for bucket in range(parts.index.buckets):
        for row in range(bucket * BUCKET_ROWS, (bucket + 1) * BUCKET_ROWS):
            place = unpack_location(parts.index._words[parts.index._position(row)])
            if place is not None and place.rising is not None:
                shown[row] = place.rising
    jobs = parts.placement.jobs
    followed = {
        row: job.dram_slot
        for row, job in jobs.items()
        if isinstance(job, Rise) and job.part_bytes and parts.index.dram(row) is None
    }
    assert shown == followed, f"{followed} rise, {shown} are shown"


def check_holders(store: Store, clients: Sequence[SimClient]) -> None:
    """A slot that a living worker may write is in no other hands, session open or not."""
    for client in clients:
        if client.held and client.life is not None:
            session = store._sessions._sessions.get(client.life.session)
            assert session is not None, f"{client.name} lives and its session is gone"
            reserved = {slot: each.key for slot, each in session.reserved.items()}
            assert reserved == client.held, f"{client.name} may write {client.held}"
