"""A step as the schedule decides it, and what the schedule asks of the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from kvist.engine.sequence import Sequence

PREEMPTIONS = ("decode", "seat", "pages")
"""For whom a sequence lost its pages: a decode of a higher place that needed one, or a waiting
request of a higher class that needed a seat, or pages."""


class Finder(Protocol):
    """Tells the scheduler what the cache beyond the pool holds, and takes what leaves the pool."""

    def defers(self, sequence: Sequence, blocks: int) -> bool:
        """Whether it shall wait, for a bounded time, because what it lacks is being computed by
        another engine; asked in each step, when it could be admitted.

        Args:
            sequence: waiting. blocks: see find.
        """
        ...

    def find(self, sequence: Sequence, blocks: int) -> None:
        """Set the sequence's found and found_end, and its gate if it need not wait for the load.

        Args:
            sequence: about to be admitted.
            blocks: leading blocks that it has already, of its usable_blocks.
        """
        ...

    def keep(self, sequence: Sequence) -> None:
        """It is about to lose its pages and will want its complete blocks again."""
        ...


@dataclass(slots=True, eq=False)
class Work:
    """Tokens [start, start + count) of a sequence, computed in a step.

    Nobody changes one. It is not frozen because there is one for each running request in each
    step, and a frozen one takes 1.5 us to make instead of 0.4.

    Attributes:
        last: the sequence's next token comes out of this.
        life: of the sequence when it was planned; once they differ, what comes out is void.
    """

    sequence: Sequence
    start: int
    count: int
    last: bool
    life: int

    @property
    def void(self) -> bool:
        """The sequence has ended, or what this was planned on was given up."""
        return self.life != self.sequence.life


@dataclass(frozen=True, slots=True)
class Step:
    """One decision.

    Attributes:
        work: what to compute, at most one per sequence.
        loads: sequences that have their pages now and whose blocks are to be loaded. Those with a
            gate have work in this step, so their loads must begin before it is computed.
        tight: somebody has to go and could not, because a step under way computes it: nothing
            should be under way at the next schedule.
        kept: pages whose holder left while this step could still use them.
    """

    work: list[Work]
    loads: list[Sequence]
    tight: bool = False
    kept: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(work.count for work in self.work)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one step may take.

    Attributes:
        tokens: of one step at most, >= seats.
        seats: sequences with pages at most.
        block_tokens: tokens per page.
        aging_s: see waiting.Ages.
    """

    tokens: int
    seats: int
    block_tokens: int
    aging_s: float
