"""What the next step computes: one token budget for decodes and prompts, pages never overdrawn.

A step takes the decodes of all classes first, then prompts, begun or new, in the order of their
rank (class, raised by waiting) and then of arrival, while budget, seats and pages last. Everything
here is a decision on state; no tensors, no threads, and the time is told.

A step may be planned while the one before it still runs. Its tokens are then counted, but not
known: see Sequence.planned and pending. Nothing that a step under way writes to or reads
goes to somebody else before it has landed.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from itertools import islice

from kvist.engine.pages import Pages
from kvist.engine.sequence import Sequence, State
from kvist.engine.step import PREEMPTIONS, Bounds, Finder, Step, Work
from kvist.engine.waiting import Ages, Waiting
from kvist.proto.kv_events import GPU

RESERVE_SHARE = 32
"""One page in this many stays free at an admission (one per running request at most), so that
the next decode that needs a page does not throw out the request that has just been let in."""


class Scheduler:
    """All sequences that have not ended, and who may compute what next.

    Args:
        pages: the pool's books; only the scheduler allocates from it.
        finder: see there.
        bounds: of a step.

    Attributes:
        waiting: in the order in which they will be admitted.
        running: by place: the first is the last to be preempted.
        loading: have pages and wait for blocks.
        deferred: those of waiting that the last schedule passed over, because somebody else
            computes what they lack.
        preemptions: see PREEMPTIONS -> how often.
        resumed: tokens that preempted sequences had, by the tier that gave them back, or
            "computed".
    """

    def __init__(self, pages: Pages, finder: Finder, bounds: Bounds) -> None:
        assert bounds.tokens >= bounds.seats, "a decode could not run although it has a seat"
        self._pages = pages
        self._finder = finder
        self._bounds = bounds
        self.waiting = Waiting()
        self._ages = Ages(bounds.aging_s)
        self.running: list[Sequence] = []
        self.loading: list[Sequence] = []
        self.deferred: set[Sequence] = set()
        self.preemptions: Counter[str] = Counter(dict.fromkeys(PREEMPTIONS, 0))
        self.resumed: Counter[str] = Counter()
        self._under_way: deque[Step] = deque()
        self._now = 0.0
        self._budget = 0
        self._work: dict[Sequence, tuple[int, int]] = {}
        self._tight = False

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. It must fit the pool when it is alone (the core checks)."""
        self.waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, whatever it is doing; its pages go back as soon as nothing uses them."""
        self._leave(sequence)
        self._give_back(sequence)
        sequence.state = State.FINISHED

    def schedule(self, now: float) -> Step:
        """Decide the next step. Pages for all of its tokens are allocated afterwards.

        Args:
            now: seconds, never less than before.

        Returns:
            the step; if it has work, land it once it was computed, after those before it.
        """
        self._now, self._budget, self._tight = now, self._bounds.tokens, False
        self._work = {}
        self.deferred = set()
        self._age()
        prompts: list[Sequence] = []
        for sequence in tuple(self.running):
            if sequence.gate is not None:
                continue
            remaining = sequence.remaining
            if remaining > 1:
                prompts.append(sequence)
            elif remaining == 1 and not sequence.ending and self._make_room(sequence):
                self._work[sequence] = (sequence.planned, 1)
                self._budget -= 1
        loads: list[Sequence] = []
        for sequence in prompts:
            self._let_in(loads, sequence)
            if sequence.state is State.RUNNING and self._budget:
                self._take(sequence)
        self._let_in(loads, None)
        work = [self._plan(one, *part) for one, part in self._work.items()]
        step = Step(work, loads, self._tight)
        if step.work:
            self._under_way.append(step)
        return step

    def loaded(self, sequence: Sequence, blocks: int) -> None:
        """The cache's blocks have come; the rest is computed.

        Args:
            sequence: in LOADING, or it has a gate. What was computed behind the gate is void when
                blocks are missing, and planned again.
            blocks: how many of its `found` blocks are in its pages, from the first on.
        """
        self._count_resumed(sequence, sequence.found[:blocks])
        sequence.computed = (sequence.registered + blocks) * self._bounds.block_tokens
        gated, sequence.gate = sequence.gate is not None, None
        if not gated or blocks < len(sequence.found):
            self.give_up(sequence)
        self._register(sequence)
        if not gated:
            self.loading.remove(sequence)
            self._run(sequence)

    def advance(self, work: Work) -> range:
        """A piece of work that is not void is done; call it before its token is appended.

        Returns:
            blocks that it completed, each now in the index of pages.
        """
        assert not work.void, "what is void is not published"
        assert work.sequence.gate is None, "what is provisional is not published"
        work.sequence.computed = work.start + work.count
        work.sequence.pending -= work.last
        return self._register(work.sequence)

    def give_up(self, sequence: Sequence) -> None:
        """What steps under way compute of it is void; it is planned again from what it has."""
        sequence.life += 1
        sequence.planned, sequence.pending = sequence.computed, 0
        if sequence.since_s is None:
            sequence.since_s = self._now

    def land(self, step: Step) -> None:
        """The oldest step under way has ended, well or not: what was kept for it goes back."""
        assert self._under_way.popleft() is step, "steps land in the order of their planning"
        self._pages.release(step.kept)

    def _age(self) -> None:
        for sequence in list(self._ages.due(self._now, self.waiting.oldest, self.running)):
            if sequence.state is State.WAITING:
                self.waiting.rise(sequence)
            else:
                self.running.remove(sequence)
                sequence.rank -= 1
                insort(self.running, sequence, key=_place)

    def _take(self, sequence: Sequence) -> None:
        """Give a running sequence its part of the step."""
        count = self._chunk(sequence, self._budget)
        self._work[sequence] = (sequence.planned, count)
        self._budget -= count

    def _plan(self, sequence: Sequence, start: int, count: int) -> Work:
        last = start + count == sequence.length
        sequence.planned += count
        sequence.pending += last
        if last and sequence.since_s is not None:
            sequence.stop_waiting(self._now)
        return Work(sequence, start, count, last, sequence.life)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens to compute next; a cut prompt is cut at a page's end if that is not nothing."""
        size = self._bounds.block_tokens
        count = min(sequence.remaining, budget)
        if count < sequence.remaining:
            end = (sequence.planned + count) // size * size
            count = end - sequence.planned if end > sequence.planned else count
        return count

    def _make_room(self, sequence: Sequence) -> bool:
        """See that a running sequence has a page for its next token, at the last one's expense.

        A lone sequence waits a step when no page is left: those that are missing are with loads
        and copies, which end by themselves. The first in place comes first, so whoever is
        preempted has no work in this step yet.
        """
        if sequence.state is not State.RUNNING:
            return False  # preempted earlier in this step
        while len(sequence.pages) * self._bounds.block_tokens < sequence.length:
            if self._pages.available:
                sequence.pages += self._pages.allocate(1)
            elif len(self.running) == 1:
                return False
            else:
                last = self.running[-1]
                if self._flies(last):
                    self._tight = True
                    return False
                self._preempt(last, "decode")
                if last is sequence:
                    return False
        return True

    def _preempt(self, sequence: Sequence, why: str) -> None:
        if (part := self._work.pop(sequence, None)) is not None:
            self._budget += part[1]
        self._finder.keep(sequence)
        self._leave(sequence)
        self._give_back(sequence)
        sequence.state = State.WAITING
        sequence.preempted += 1
        self.waiting.add(sequence)
        self.preemptions[why] += 1

    def _let_in(self, loads: list[Sequence], before: Sequence | None) -> None:
        """Admit those that wait and whose place is before another's; all when it is None."""
        while self._budget > 0 and (admitted := self._admit(before)) is not None:
            if admitted.found:
                loads.append(admitted)
            else:
                self._count_resumed(admitted, ())
            if admitted.found and admitted.gate is None:
                self.loading.append(admitted)
                admitted.state = State.LOADING
                continue
            admitted.planned += len(admitted.found) * self._bounds.block_tokens
            self._run(admitted)
            self._take(admitted)

    def _admit(self, before: Sequence | None) -> Sequence | None:
        """Take the first waiting sequence if there is a seat and all its pages can be had.

        One whose next block is being computed or loaded by another, here or in another engine,
        lets those behind it pass: it takes the finished block later. As many as there are seats
        are looked at in a step. When seats or pages lack, a request takes them from running ones
        of a rank below its own class (which waiting does not raise: peers do not take turns).
        """
        full, behind = len(self.running) + len(self.loading) >= self._bounds.seats, False
        for sequence in islice(self.waiting, self._bounds.seats):
            if (full or behind) and not self._outranks(self.waiting.highest):
                return None
            if before is not None and sequence.place > before.place:
                return None
            if (full or behind) and not self._outranks(sequence.priority):
                behind = True
                continue
            pages = self._pages.lookup(sequence.keys()[: sequence.usable_blocks])
            if self._follows(sequence, len(pages)):
                self.deferred.add(sequence)
                continue
            victims = self._victims(sequence, pages, behind)
            if victims is None:
                behind = True
                continue
            if self._finder.defers(sequence, len(pages)):
                self.deferred.add(sequence)
                continue
            if victims:
                return self._take_place(sequence, pages, victims)
            self.waiting.remove(sequence)
            self._seat(sequence, pages)
            return sequence
        return None

    def _outranks(self, priority: int) -> bool:
        return bool(self.running) and priority < self.running[-1].rank

    def _victims(self, sequence: Sequence, found: list[int], behind: bool) -> list[Sequence] | None:
        """Who has to go so that a waiting sequence can be seated; None when it cannot be.

        Args:
            found: pages of the pool that it would share.
            behind: others before it lack something, so it may have only what victims give.
        """
        taken = len(self.running) + len(self.loading)
        missing = sequence.pages_needed - len(found)
        missing += min(taken, self._pages.total // RESERVE_SHARE)
        seats = 0 if behind else self._bounds.seats - taken
        room = 0 if behind else self._pages.available - self._pages.idle(found)
        victims: list[Sequence] = []
        holds: Counter[int] = Counter()
        for victim in (None, *reversed(self.running)):
            if victim is not None:
                if victim.rank <= sequence.priority:
                    return None
                if self._flies(victim):
                    self._tight = True
                    return None
                victims.append(victim)
                seats += 1
                holds.update(victim.pages)
            freed = self._pages.freed(holds.keys() - set(found), holds)
            if seats > 0 and room + freed >= missing:
                return victims
        return None

    def _take_place(
        self, sequence: Sequence, pages: list[int], victims: list[Sequence]
    ) -> Sequence | None:
        """Preempt, then seat; None when the pages are still held by copies."""
        free = self._bounds.seats - len(self.running) - len(self.loading)
        for victim in victims:
            self._preempt(victim, "pages" if free > 0 else "seat")
            free += 1
        missing = sequence.pages_needed - len(pages)
        if missing > self._pages.available - self._pages.idle(pages):
            return None
        self.waiting.remove(sequence)
        self._seat(sequence, pages)
        return sequence

    def _follows(self, sequence: Sequence, blocks: int) -> bool:
        """Another one, not of a lower rank, is about to complete the first block it lacks."""
        if blocks >= sequence.usable_blocks or not sequence.reuses:
            return False
        key = sequence.keys()[blocks]
        for other in (*self.running, *self.loading):
            keys = other.keys()
            if other.rank > sequence.rank and other.state is State.RUNNING:
                continue  # it may get no part of a step for long
            if other.registered <= blocks < len(keys) and keys[blocks] == key:
                return True
        return False

    def _seat(self, sequence: Sequence, pages: list[int]) -> None:
        """Give a sequence its pages: those found in the pool, and new ones for the rest."""
        self._pages.hold(pages)
        sequence.registered = len(pages)
        sequence.computed = sequence.planned = len(pages) * self._bounds.block_tokens
        sequence.pages = pages + self._pages.allocate(sequence.pages_needed - len(pages))
        sequence.found, sequence.found_end = (), ""
        sequence.gate = sequence.choice = None
        self._finder.find(sequence, len(pages))

    def _count_resumed(self, sequence: Sequence, loaded: tuple[str, ...]) -> None:
        if not sequence.preempted:
            return
        size = self._bounds.block_tokens
        self.resumed["hbm"] += sequence.registered * size
        for tier in loaded:
            self.resumed[tier] += size
        known = (sequence.registered + len(loaded)) * size
        self.resumed["computed"] += len(sequence.tokens) - known

    def _register(self, sequence: Sequence) -> range:
        """Put pages that have become complete into the index."""
        first, full = sequence.registered, sequence.computed // self._bounds.block_tokens
        if not sequence.reuses or full == first:
            return range(0)
        keys = sequence.keys()
        for block in range(first, full):
            own = sequence.pages[block]
            self._pages.pin((own,))
            page = self._pages.register(own, keys[block], sequence.parent(block), block)
            if page == own and self._pages.journal is not None:
                self._pages.journal.stored(keys[block], GPU, sequence.facts(block))
            if page != own and self._flies(sequence):
                self._under_way[-1].kept.append(own)  # a step under way reads it
            else:
                self._pages.unpin((own,))
            sequence.pages[block] = page
        sequence.registered = full
        return range(first, full)

    def _flies(self, sequence: Sequence) -> bool:
        """A step under way writes to its pages or reads them, if only in vain."""
        return any(work.sequence is sequence for step in self._under_way for work in step.work)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_place)

    def _leave(self, sequence: Sequence) -> None:
        """Take it off the list that its state says."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.LOADING:
            self.loading.remove(sequence)
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        if self._flies(sequence):
            self._under_way[-1].kept.extend(sequence.pages)
        else:
            self._pages.release(sequence.pages)
        sequence.pages, sequence.gate = [], None
        sequence.computed = sequence.registered = 0
        self.give_up(sequence)


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.place
