"""The queue: who waits, in the order of class and arrival, and how waiting raises a class."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from kvist.engine.priority import PRIORITIES
from kvist.engine.sequence import Sequence


class Waiting:
    """Sequences in the order in which they will be admitted: by rank, then by arrival.

    A sequence's rank rises by a class for each `aging_s` that it has waited, so whoever waits
    long enough is ahead of everybody who came later, and nobody waits for ever.

    Args:
        aging_s: seconds of waiting that are worth a class, > 0.
    """

    def __init__(self, aging_s: float) -> None:
        self._aging_s = aging_s
        self._lines: list[list[Sequence]] = [[] for _ in PRIORITIES]
        self._classes = [0] * len(PRIORITIES)
        # (when its rank rises, a number that is never the same, sequence); stale once it has left
        # or risen.
        self._due: list[tuple[float, int, Sequence]] = []
        self._entries = itertools.count()
        self._due_at: dict[Sequence, float] = {}

    def __len__(self) -> int:
        return sum(self._classes)

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines:
            yield from line

    @property
    def by_class(self) -> tuple[int, ...]:
        """How many wait, by the class that they came with."""
        return tuple(self._classes)

    @property
    def highest(self) -> int:
        """The highest class that somebody came with; below all classes when nobody waits."""
        present = (number for number, count in enumerate(self._classes) if count)
        return next(present, len(PRIORITIES))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has begun to wait (since_s is set)."""
        insort(self._lines[sequence.rank], sequence, key=_number)
        self._classes[sequence.priority] += 1
        self._await_rise(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, to be admitted or because it has ended."""
        self._take_out(sequence)
        self._classes[sequence.priority] -= 1
        self._due_at.pop(sequence, None)

    def age(self, now: float) -> None:
        """Move up those whose waiting has raised them."""
        while self._due and self._due[0][0] <= now:
            due, _, sequence = heapq.heappop(self._due)
            if self._due_at.get(sequence) != due:
                continue
            self._take_out(sequence)
            sequence.rank = max(0, sequence.rank - 1)
            insort(self._lines[sequence.rank], sequence, key=_number)
            del self._due_at[sequence]
            self._await_rise(sequence)

    def _await_rise(self, sequence: Sequence) -> None:
        if sequence.rank == 0:
            return
        assert sequence.since_s is not None, "only who waits grows old"
        wait_s = (sequence.priority - sequence.rank + 1) * self._aging_s - sequence.waited_s
        due = sequence.since_s + wait_s
        self._due_at[sequence] = due
        heapq.heappush(self._due, (due, next(self._entries), sequence))
        if len(self._due) > 2 * len(self._due_at) + 64:
            self._due = [(at, next(self._entries), one) for one, at in self._due_at.items()]
            heapq.heapify(self._due)

    def _take_out(self, sequence: Sequence) -> None:
        line = self._lines[sequence.rank]
        at = bisect_left(line, sequence.number, key=_number)
        assert line[at] is sequence, "it does not wait"
        del line[at]


def by_class(sequences: Iterable[Sequence]) -> tuple[int, ...]:
    """How many there are of each class that they came with."""
    counts = [0] * len(PRIORITIES)
    for sequence in sequences:
        counts[sequence.priority] += 1
    return tuple(counts)


def _number(sequence: Sequence) -> int:
    return sequence.number
