"""Admission to flash: which blocks are worth a write, and how much may be written at all.

    always        every block sinks when it is stored
    second_use    a block sinks when it is used again: a worker found it, or it is stored anew after
                  it was evicted (the departed table remembers that). As long as flash has free
                  slots, blocks sink at their first use too: nothing has to make room for them, a
                  young cache is filled, and a restart finds it

Flash writes wear the device out, and most prompts never come back: on a full tier only what was
asked for twice displaces something. A budget bounds the bytes written in a day, whatever is
asked; a block that is over it stays in DRAM and gets another chance at its next use.

What was stored while flash was away (failed, or its index was made anew) is offered again when it
is ready: parents first, a few at each tick, within the budget, behind what is stored meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.core.host import Threads
from kvist.cachesvc.flash.budget import AdmissionMode, Wear, WearBook, WriteBudget
from kvist.cachesvc.placing.moves import Moves
from kvist.cachesvc.placing.placement import Placement

# Offered again in one tick: 0.15 ms; 20,000 blocks took 1.6 s on a tmpfs. Rows that are looked at
# for them in one tick: 1.6 ms.
_AGAIN_BLOCKS = 8
_AGAIN_ROWS = 1 << 16


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
        self._was_away = False
        self._again: Iterator[int] = iter(())

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
        """Write the book once a minute, on a thread of its own: a disk may hang. Offer again."""
        self._offer_again()
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

    def _offer_again(self) -> None:
        moves, slot_bytes = self.moves, self._placement.dram.slot_bytes
        if moves.state != "ready":
            self._was_away = moves.state != "off"
            return
        if self._was_away:
            self._was_away, self._again = False, self._only_in_dram()
        for _ in range(_AGAIN_BLOCKS):
            left = self._budget.left_bytes
            is_over = left is not None and left < slot_bytes
            if is_over or moves.queued["write"] >= min(_AGAIN_BLOCKS, moves.sinks_max):
                return
            row = next(self._again, NO_ROW)
            if row == NO_ROW:
                return
            if self._is_missing(row):
                self._sink(row)

    def _only_in_dram(self) -> Iterator[int]:
        """Rows of blocks that have no copy on flash, parents first; NO_ROW to pause."""
        index, found = self._placement.index, [np.empty(0, np.int64)]
        for first in range(0, index.rows, _AGAIN_ROWS):
            rows = np.arange(first, min(first + _AGAIN_ROWS, index.rows))
            in_dram, on_flash = index.copies(rows)
            found.append(rows[in_dram & ~on_flash])
            yield NO_ROW
        yield from self._placement.blocks.deepest_first(np.concatenate(found))[::-1].tolist()

    def _is_missing(self, row: int) -> bool:
        """Whether a block, if there is still one in a row, should be on flash and is not."""
        blocks, index = self._placement.blocks, self._placement.index
        if index.dram(row) is None or index.hidden.of[row] or blocks.reaches_flash(row):
            return False
        parent = blocks.parent[row]
        has_way = parent == NO_ROW or blocks.reaches_flash(parent)
        return has_way and not self._has_ttl(row) and self._is_worth_it(row)

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
        elif blocks.reaches_flash(row):
            return True
        elif self.moves.state == "ready":
            counts.sinks_dropped += 1
        else:
            counts.sinks_failed += 1
        return blocks.reaches_flash(row)
