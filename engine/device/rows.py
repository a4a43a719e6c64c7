"""Which row of a persistent batch is whose: a request keeps its row from step to step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from kvist.engine.sequence import Sequence
from kvist.engine.step import Work


@dataclass(slots=True, eq=False)
class Row:
    """A seated request, as the device has it.

    Attributes:
        number: of the row.
        life: of the sequence when it was seated, see step.Work.
        length: positions with that of the token that its next step computes.
        pages: that the device was told.
        registered: leading pages that cannot change any more.
    """

    number: int
    life: int
    length: int
    pages: list[int] = field(default_factory=list)
    registered: int = 0

    def continues(self, work: Work) -> bool:
        """A work is what comes next on this row, whatever its token is."""
        return work.count == 1 and work.life == self.life and work.start + 1 == self.length

    def new_pages(self, pages: list[int], registered: int) -> int | None:
        """From which page on the device knows others than the request has now; None: they agree.

        A page that became complete is exchanged for an equal one that the pool had already, once.
        """
        first, self.registered = self.registered, registered
        mine = self.pages
        if len(mine) == len(pages) and mine[first:] == pages[first:]:
            return None
        while first < min(len(mine), len(pages)) and mine[first] == pages[first]:
            first += 1
        mine[first:] = pages[first:]
        return first


class Rows:
    """The rows of a batch; the lowest free one is given first, so that few are computed.

    Args:
        rows: of the batch.
    """

    def __init__(self, rows: int) -> None:
        self._free = list(range(rows))
        self._rows: dict[Sequence, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, sequence: Sequence) -> Row | None:
        """The row of a request, if it has one."""
        return self._rows.get(sequence)

    @property
    def end(self) -> int:
        """One more than the highest used row."""
        return max((row.number for row in self._rows.values()), default=-1) + 1

    def seat(self, work: Work, length: int, pages: list[int]) -> Row:
        """The row of a request, a free one if it has none; told what the device is told."""
        row = self._rows.get(work.sequence)
        number = heappop(self._free) if row is None else row.number
        registered = work.sequence.registered
        seated = Row(number, work.life, length, list(pages), registered)
        self._rows[work.sequence] = seated
        return seated

    def keep(self, sequences: Iterable[Sequence]) -> list[int]:
        """All others leave; their rows."""
        kept = set(sequences)
        gone = [one for one in self._rows if one not in kept]
        numbers = [self._rows.pop(one).number for one in gone]
        for number in numbers:
            heappush(self._free, number)
        return numbers

    def close_gaps(self, rows: int) -> list[tuple[int, int]]:
        """Have the first so many rows hold everybody, who must be no more.

        Returns:
            moves to make, each from a row to a free one.
        """
        moves = []
        for row in self._rows.values():
            if row.number >= rows:
                target = heappop(self._free)
                moves.append((row.number, target))
                row.number = target
        self._free += [source for source, _ in moves]
        heapify(self._free)
        return moves
