"""Faults planted into the product, to see that the simulation finds such faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from kvist.cachesvc.catalog.blocks import Blocks
from kvist.cachesvc.catalog.hidden import Hidden
from kvist.cachesvc.catalog.index import IndexWriter, Location
from kvist.cachesvc.core import intake
from kvist.cachesvc.flash import flashio, restore
from kvist.cachesvc.placing import moves, placement
from kvist.cachesvc.worker.ring import RingReader
from kvist.proto.slot import publish
from kvist.tiers import flash_io
from kvist.tiers.dram import DramTier
from sim.world.forest import BLOCKS


class _FitsAll:
    """A checksum that agrees with every other."""

    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


class _NoSum:
    """A checksum under way that will fit."""

    def update(self, _: object) -> None:
        """Take no notice."""

    def intdigest(self) -> _FitsAll:
        """Whatever it should be."""
        return _FitsAll()


def _show_all_at_once(real: Callable[..., None]) -> Callable[..., None]:
    def show(dram: DramTier, slot: int, _length: int) -> None:
        real(dram, slot, dram.slot_bytes)

    return show


def _publish_before_fill(real: Callable[..., int]) -> Callable[..., int]:
    def allocate(dram: DramTier) -> int:
        slot = real(dram)
        publish(dram.slot_view(slot))
        return slot

    return allocate


def _commit_unfilled(real: Callable[..., str]) -> Callable[..., str]:
    def commit_one(self: Any, session: Any, slot: int, rows: list[int]) -> str:
        reservation = session.reserved.get(slot)
        parent = None if reservation is None else self._placement.index.locate(reservation.parent)
        if reservation is None or parent is None:
            return real(self, session, slot, rows)
        self._sessions.release(session, slot)
        rows.append(self._enter(BLOCKS[reservation.key].header, slot))
        return ""

    return commit_one


def _index_before_data(real: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: Any, job: flashio.Sink) -> Any:
        header = BLOCKS[job.key].header
        entry = flashio.FlashEntry(
            job.flash_slot, header.key, header.parent, header.namespace, header.depth,
            header.payload_bytes, header.shape.block_tokens,
        )  # fmt: skip
        self._flash.index_put([entry])
        return real(self, job)

    return write


def _forget_to_delete_first(_: object) -> Callable[..., None]:
    def delete(self: Any, key: bytes) -> None:
        del self, key

    return delete


def _sink_without_waking(_: object) -> Callable[..., None]:
    def sink(self: Any, job: flashio.Sink) -> None:
        self._sinks.append(job)

    return sink


def _free_twice_as_much(real: Callable[..., None]) -> Callable[..., None]:
    def undo_sink(self: Any, job: flashio.Sink) -> None:
        free = self._flash.free
        self._flash.free = lambda _: None
        try:
            real(self, job)
        finally:
            self._flash.free = free

    return undo_sink


def _evict_parents(_: object) -> Callable[..., bool]:
    def may_leave_dram(self: Any, row: int) -> bool:
        index = self.index
        return row not in self.jobs and index.dram(row) is not None

    return may_leave_dram


def _forget_flash_children(_: object) -> Callable[..., int]:
    def lose_flash(self: Blocks, row: int) -> int:
        location = Location(self.index.dram(row), self.index.flash(row))
        assert location.flash is not None
        if location.dram is None:
            self._forget(row)
        else:
            self.index.set_location(row, location.dram, None)
        return location.flash

    return lose_flash


def _leave_it_shown(real: Callable[..., None]) -> Callable[..., None]:
    def show_rise(index: IndexWriter, row: int, slot: int | None) -> None:
        if slot is not None:
            real(index, row, slot)

    return show_rise


def _unlist_what_was_cleared_again(real: Callable[..., None]) -> Callable[..., None]:
    def drop_flash(self: Any, row: int, why: str = "evicted") -> None:
        if self.index.hidden.of[row]:
            self.unlisted.append(self.index.key(row))
        real(self, row, why)

    return drop_flash


# name -> owner, attribute, what takes its place.
PLANTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "publish before fill": (DramTier, "allocate", _publish_before_fill),
    "no checksum on rise": (flash_io, "xxhash", lambda _: SimpleNamespace(xxh3_64=_NoSum)),
    "all of a rise is shown with its first part": (DramTier, "show", _show_all_at_once),
    "a rise that has failed is still shown": (IndexWriter, "show_rise", _leave_it_shown),
    "slot of a living worker freed": (RingReader, "worker_is_gone", lambda _: lambda _: True),
    "commit of an unfilled slot": (intake.Intake, "_commit_one", _commit_unfilled),
    "index before data": (flashio.FlashIo, "_write", _index_before_data),
    "eviction not taken out of the flash index": (
        flashio.FlashIo, "delete", _forget_to_delete_first,
    ),
    "risen block not compared": (moves, "check_risen", lambda _: lambda *_: None),
    "lost wake-up": (flashio.FlashIo, "sink", _sink_without_waking),
    "flash slot of a failed sink leaked": (moves.Moves, "_undo_sink", _free_twice_as_much),
    "a block evicted before what stands on it": (
        placement.Placement, "may_leave_dram", _evict_parents,
    ),
    "children on flash not counted": (Blocks, "lose_flash", _forget_flash_children),
    "what is in a folder that is opened late is not read": (
        restore.Restore, "load_late", lambda _: lambda self: self._finish(None),
    ),
    "what is cleared stays in the flash index": (
        Hidden, "keys_on_flash", lambda _: lambda *_: b"",
    ),
    "what a tree that was cut stood on still counts it": (
        Blocks, "_detach", lambda _: lambda *_: None,
    ),
    "a cleared block takes one stored anew out of the flash index": (
        placement.Placement, "drop_flash", _unlist_what_was_cleared_again,
    ),
    "generation stays even in a freed slot": (
        DramTier, "free", lambda _: lambda self, slot: self._free.push(slot),
    ),
}  # fmt: skip


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Put a fault in; take it out again."""
    owner, attribute, make = PLANTS[name]
    real = vars(owner)[attribute]
    setattr(owner, attribute, make(real))
    try:
        yield
    finally:
        setattr(owner, attribute, real)
