"""Admission to flash: which blocks are worth a write, and how much may be written at all.

    always        every block sinks when it is stored
    second_use    a block sinks when it is used again: a worker found it, or it is stored anew after
                  it was evicted (the departed table remembers that). As long as flash has free
                  slots, blocks sink at their first use too: nothing has to make room for them, a
                  young cache is filled, and a restart finds it

Flash writes wear the device out, and most prompts never come back: on a full tier only what was
asked for twice displaces something. A budget bounds the bytes written in a day, whatever is
asked; a block that is over it stays in DRAM and gets another chance at its next use.
"""

from __future__ import annotations

from functools import partial

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.core.host import Threads
from kvist.cachesvc.flash.budget import AdmissionMode, Wear, WearBook, WriteBudget
from kvist.cachesvc.placing.moves import Moves
from kvist.cachesvc.placing.placement import Placement


class Admission:
    """Decides what sinks, and has moves do it. One thread.

    Attributes:
        moves: what brings blocks to flash.
        written_bytes: given to flash to write, in this life; whole slots.

    Args:
        placement: the blocks.
        mode: see the top of the file.
        budget: of writes.
        book: what earlier lives wrote into the folder; None without a flash tier.
    """

    def __init__(
        self,
        placement: Placement,
        moves: Moves,
        mode: AdmissionMode,
        budget: WriteBudget,
        book: WearBook | None,
    ) -> None:
        self.written_bytes = 0
        self._budget = budget
        self._book = book
        self._placement = placement
        self.moves = moves
        self._mode = mode

    @property
    def wear(self) -> Wear:
        """What was written, and what still may be."""
        earlier = self._book.earlier_bytes if self._book else 0
        budget, folder_bytes = self._budget, earlier + self.written_bytes
        return Wear(self.written_bytes, folder_bytes, budget.left_bytes, budget.bytes_per_day)

    def open_book(self) -> None:
        """The flash folder is open: go on with what earlier lives wrote into it."""
        if self._book is not None:
            self._book.read()
            if self._book.left_bytes is not None:
                self._budget.start_with(self._book.left_bytes)

    def tick(self, now_s: float, threads: Threads) -> None:
        """Write the book once a minute, on a thread of its own: a disk may hang."""
        if self._book is not None and self._book.is_due(now_s, self.written_bytes):
            save = partial(self._book.save, self.written_bytes, self._budget.left_bytes)
            threads.start(save, "kvist-wear")

    def close(self) -> None:
        """Write the book."""
        if self._book is not None:
            self._book.save(self.written_bytes, self._budget.left_bytes)

    def stored(self, row: int) -> None:
        """A block has just been stored, for the first time or anew."""
        if self.moves.state == "off" or self._has_ttl(row):
            return
        if not self._is_worth_it(row):
            self._placement.counts.sinks_first_use += 1
            self._placement.passed_over[row] = 1
        elif not self._sink(row):
            self._placement.passed_over[row] = 1

    def used(self, row: int) -> None:
        """A block was found by a worker, and so all before it: they sink if they have not."""
        reaches = self._placement.blocks.reaches_flash(row)
        if self.moves.state == "ready" and not reaches and not self._has_ttl(row):
            self._sink(row)

    def _has_ttl(self, row: int) -> bool:
        group = self._placement.group(row)
        return group is not None and group.limits.ttl is not None

    def _is_worth_it(self, row: int) -> bool:
        flash = self._placement.flash
        if self._mode == "always" or (flash is not None and flash.free_slots):
            return True
        index = self._placement.index
        return index.departed.reason(index.key(row)) in ("evicted", "not_admitted")

    def _sink(self, row: int) -> bool:
        """Sink a block and what before it is not on flash, from the top, as far as the budget goes.

        Counts it if the block stays behind; whether it does not.
        """
        blocks, counts = self._placement.blocks, self._placement.counts
        missing, above = [], row
        while above != NO_ROW and not blocks.reaches_flash(above):
            missing.append(above)
            above = blocks.parent[above]
        slot_bytes, left = self._placement.dram.slot_bytes, self._budget.left_bytes
        paid = len(missing) if left is None else min(len(missing), left // slot_bytes)
        if paid:
            self.moves.sink(missing[-paid])
            begun = sum(blocks.reaches_flash(each) for each in missing[-paid:])
            self._budget.spend(begun * slot_bytes)
            self.written_bytes += begun * slot_bytes
            counts.sinks_begun += begun
        if paid < len(missing):
            counts.sinks_over_budget += 1
        elif not blocks.reaches_flash(row):
            counts.sinks_dropped += 1
        return blocks.reaches_flash(row)
