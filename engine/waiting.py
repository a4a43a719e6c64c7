"""The queue: who waits, in the order of class and arrival, and who may grow older."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from kvist.engine.priority import PRIORITIES
from kvist.engine.sequence import Sequence


class Waiting:
    """Sequences in the order in which they will be admitted: by rank, then by arrival."""

    def __init__(self) -> None:
        self._lines: list[list[Sequence]] = [[] for _ in PRIORITIES]
        self._classes: list[list[Sequence]] = [[] for _ in PRIORITIES]

    def __len__(self) -> int:
        return sum(self.by_class)

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines:
            yield from line

    @property
    def by_class(self) -> tuple[int, ...]:
        """How many wait, by the class that they came with."""
        return tuple(len(line) for line in self._classes)

    @property
    def highest(self) -> int:
        """The highest class that somebody came with; below all classes when nobody waits."""
        present = (number for number, line in enumerate(self._classes) if line)
        return next(present, len(PRIORITIES))

    @property
    def oldest(self) -> list[Sequence | None]:
        """Of each class that they came with, who came first."""
        return [line[0] if line else None for line in self._classes]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self._lines[sequence.rank], sequence, key=_number)
        insort(self._classes[sequence.priority], sequence, key=_number)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, to be admitted or because it has ended."""
        _take_out(self._lines[sequence.rank], sequence)
        _take_out(self._classes[sequence.priority], sequence)

    def rise(self, sequence: Sequence) -> None:
        """Raise a sequence that waits by a class."""
        self.remove(sequence)
        sequence.rank -= 1
        self.add(sequence)


class Ages:
    """Waiting raises the oldest of a class, and of each class one in `aging_s`.

    So nobody waits for ever, and whoever is raised takes little from those above: were all raised
    that have waited long enough, a backlog of batch requests would soon be ahead of every realtime
    one.

    Args:
        aging_s: seconds of waiting that are worth a class, > 0.
    """

    def __init__(self, aging_s: float) -> None:
        self._aging_s = aging_s
        self._next_s = [0.0] * len(PRIORITIES)

    def due(
        self, now: float, oldest: list[Sequence | None], running: Iterable[Sequence]
    ) -> Iterator[Sequence]:
        """Who rises by a class now.

        Args:
            oldest: of those that wait, see Waiting.
            running: those whose prompt is being computed wait too: for their part of a step.
        """
        oldest = list(oldest)
        for one in running:
            first = oldest[one.priority]
            if one.since_s is not None and (first is None or one.number < first.number):
                oldest[one.priority] = one
        for priority, first in enumerate(oldest):
            if first is None or now < self._next_s[priority]:
                continue
            if first.rank_at(now, self._aging_s) < first.rank:
                self._next_s[priority] = now + self._aging_s
                yield first


def by_class(sequences: Iterable[Sequence]) -> tuple[int, ...]:
    """How many there are of each class that they came with."""
    counts = [0] * len(PRIORITIES)
    for sequence in sequences:
        counts[sequence.priority] += 1
    return tuple(counts)


def _take_out(line: list[Sequence], sequence: Sequence) -> None:
    at = bisect_left(line, sequence.number, key=_number)
    assert line[at] is sequence, "it does not wait"
    del line[at]


def _number(sequence: Sequence) -> int:
    return sequence.number
