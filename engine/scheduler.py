"""What the next step computes: one token budget for decodes and prompts, pages never overdrawn.

A step takes decodes first, then prompts in the order of arrival, then new requests while budget,
seats and pages last. Everything here is a decision on state; no tensors, no clock, no threads.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from kvist.engine.pages import Pages
from kvist.engine.sequence import Sequence, State

RESERVE_SHARE = 32
"""One page in this many stays free at an admission (one per running request at most), so that
the next decode that needs a page does not throw out the request that has just been let in."""


class Finder(Protocol):
    """Tells the scheduler what the cache beyond the pool holds."""

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


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens [start, start + count) of a sequence, computed in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        """The sequence's next token comes out of this."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """One decision.

    Attributes:
        work: what to compute, at most one per sequence.
        loads: sequences that have their pages now and whose blocks are to be loaded. Those with a
            gate have work in this step, so their loads must begin before it is computed.
    """

    work: list[Work]
    loads: list[Sequence]

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(work.count for work in self.work)

    @property
    def standing(self) -> list[Work]:
        """What may be published, once the loads behind gates have been told to `loaded`: not what
        was computed on blocks that proved to be damaged."""
        return [work for work in self.work if work.start == work.sequence.computed]


class Scheduler:
    """All sequences that have not ended, and who may compute what next.

    Args:
        pages: the pool's books; only the scheduler allocates from it.
        finder: see there.
        block_tokens: tokens per page.
        max_tokens: tokens of one step at most, >= max_seqs.
        max_seqs: sequences with pages at most.

    Attributes:
        waiting: in the order in which they will be admitted.
        running: oldest first.
        loading: have pages and wait for blocks.
        preemptions: times that a sequence lost its pages to an older one.
    """

    def __init__(
        self, pages: Pages, finder: Finder, block_tokens: int, max_tokens: int, max_seqs: int
    ) -> None:
        assert max_tokens >= max_seqs, "a decode could not run although it has a seat"
        self._pages = pages
        self._finder = finder
        self._block_tokens = block_tokens
        self._max_tokens = max_tokens
        self._max_seqs = max_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.loading: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. It must fit the pool when it is alone (the core checks)."""
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, whatever it is doing; its pages go back now."""
        self._leave(sequence)
        self._give_back(sequence)
        sequence.state = State.FINISHED

    def schedule(self) -> Step:
        """Decide the next step. Pages for all of its tokens are allocated afterwards."""
        work: list[Work] = []
        budget = self._max_tokens
        for decode in (True, False):
            for sequence in [s for s in self.running if (s.remaining == 1) == decode]:
                count = self._chunk(sequence, budget)
                if count and self._make_room(sequence):
                    work.append(Work(sequence, sequence.computed, count))
                    budget -= count
        loads: list[Sequence] = []
        while budget > 0 and (admitted := self._admit()) is not None:
            if admitted.found:
                loads.append(admitted)
            if admitted.found and admitted.gate is None:
                self.loading.append(admitted)
                admitted.state = State.LOADING
                continue
            admitted.computed += len(admitted.found) * self._block_tokens
            self._run(admitted)
            count = self._chunk(admitted, budget)
            work.append(Work(admitted, admitted.computed, count))
            budget -= count
        return Step(work, loads)

    def loaded(self, sequence: Sequence, blocks: int) -> None:
        """The cache's blocks have come; the rest is computed.

        Args:
            sequence: in LOADING, or it has a gate. In that case it is called between the step that
                computed behind the gate and advance; when blocks are missing, advance drops that
                work.
            blocks: how many of its `found` blocks are in its pages, from the first on.
        """
        sequence.computed = (sequence.registered + blocks) * self._block_tokens
        self._register(sequence)
        if sequence.gate is not None:
            sequence.gate = None
        else:
            self.loading.remove(sequence)
            self._run(sequence)

    def advance(self, work: Work) -> range:
        """A piece of work is done; call it before the token it gave is appended.

        Returns:
            blocks that it completed, each now in the index of pages.
        """
        assert work.sequence.gate is None, "what is provisional is not published"
        assert work.start == work.sequence.computed, "the work does not stand"
        work.sequence.computed = work.start + work.count
        return self._register(work.sequence)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens to compute next; a cut prompt is cut at a page's end if that is not nothing."""
        count = min(sequence.remaining, budget)
        if count < sequence.remaining:
            end = (sequence.computed + count) // self._block_tokens * self._block_tokens
            count = end - sequence.computed if end > sequence.computed else count
        return count

    def _make_room(self, sequence: Sequence) -> bool:
        """See that a running sequence has a page for its next token, at the youngest's expense.

        A lone sequence waits a step when no page is left: those that are missing are with loads
        and copies, which end by themselves. The oldest comes first, so whoever is preempted has
        no work in this step yet.
        """
        if sequence.state is not State.RUNNING:
            return False  # preempted earlier in this step
        while len(sequence.pages) < sequence.pages_needed:
            if self._pages.available:
                sequence.pages += self._pages.allocate(1)
            elif len(self.running) == 1:
                return False
            else:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._give_back(sequence)
        sequence.state = State.WAITING
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self) -> Sequence | None:
        """Take the first waiting sequence if there is a seat and all its pages can be had.

        One whose next block is being computed or loaded by another, here or in another engine,
        lets those behind it pass: it takes the finished block later. As many as there are seats
        are looked at in a step.
        """
        if len(self.running) + len(self.loading) >= self._max_seqs:
            return None
        for sequence in islice(self.waiting, self._max_seqs):
            pages = self._pages.lookup(sequence.keys()[: sequence.usable_blocks])
            if self._follows(sequence, len(pages)):
                continue
            missing = sequence.pages_needed - len(pages)
            spare = min(len(self.running) + len(self.loading), self._pages.total // RESERVE_SHARE)
            if missing + spare > self._pages.available - self._pages.idle(pages):
                return None
            if self._finder.defers(sequence, len(pages)):
                continue
            self.waiting.remove(sequence)
            self._seat(sequence, pages, missing)
            return sequence
        return None

    def _follows(self, sequence: Sequence, blocks: int) -> bool:
        """Another sequence is about to complete the first block that this one lacks."""
        if blocks >= sequence.usable_blocks or not sequence.reuses:
            return False
        key = sequence.keys()[blocks]
        for other in (*self.running, *self.loading):
            keys = other.keys()
            if other.registered <= blocks < len(keys) and keys[blocks] == key:
                return True
        return False

    def _seat(self, sequence: Sequence, pages: list[int], missing: int) -> None:
        self._pages.hold(pages)
        sequence.registered = len(pages)
        sequence.computed = len(pages) * self._block_tokens
        sequence.pages = pages + self._pages.allocate(missing)
        sequence.found, sequence.found_end = (), ""
        sequence.gate = sequence.choice = None
        self._finder.find(sequence, len(pages))

    def _register(self, sequence: Sequence) -> range:
        """Put pages that have become complete into the index."""
        first, full = sequence.registered, sequence.computed // self._block_tokens
        if not sequence.reuses or full == first:
            return range(0)
        keys = sequence.keys()
        for block in range(first, full):
            sequence.pages[block] = self._pages.register(
                sequence.pages[block], keys[block], sequence.parent(block), block
            )
        sequence.registered = full
        return range(first, full)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_number)

    def _leave(self, sequence: Sequence) -> None:
        """Take it off the list that its state says."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.LOADING:
            self.loading.remove(sequence)
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._pages.release(sequence.pages)
        sequence.pages, sequence.gate = [], None
        sequence.computed = sequence.registered = 0


def _number(sequence: Sequence) -> int:
    return sequence.number
