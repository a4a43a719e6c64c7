"""A scheduler with a pool, a model and a cache that are plain lists, one step at a time.

The model is a hash of the whole prefix as the pages hold it, without torch: a page in the wrong
place, written by two or not filled gives a wrong token or an assertion.

Steps may overlap, as on a device: one is under way while the next is planned. When it is computed
meanwhile is the test's choice (`late`): at once, or only when its results are asked for, after
pages have been given out, filled by loads and freed by aborts behind its back.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from dataclasses import dataclass, field

from kvist.engine.loading import LoadGate
from kvist.engine.pages import Pages
from kvist.engine.priority import INTERACTIVE
from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.scheduler import Scheduler
from kvist.engine.sequence import Limits, Sequence, State
from kvist.engine.step import Bounds, Step, Work
from kvist.proto.keys import BlockKey

SIZE = 4
DIGEST = bytes(32)
LIMITS = Limits(max_model_len=64, block_tokens=SIZE)


def next_token(prefix: list[int]) -> int:
    return hashlib.sha256(bytes(prefix)).digest()[0]


def alone(prompt: list[int], count: int) -> list[int]:
    """What a request gets when nobody else is there."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def prompt(length: int, start: int = 1) -> list[int]:
    return [(start + 7 * i) % 251 for i in range(length)]


class FakeFinder:
    """Holds blocks as the cache would. A load brings all of them but for those in `broken`.

    Attributes:
        gates: what is found is loaded beside the step that needs it.
        kept: blocks of sequences that were about to lose their pages.
    """

    def __init__(self) -> None:
        self.blocks: dict[BlockKey, list[int]] = {}
        self.broken: set[BlockKey] = set()
        self.deferred: set[Sequence] = set()
        self.gates = False
        self.kept: list[BlockKey] = []

    def defers(self, sequence: Sequence, blocks: int) -> bool:
        assert blocks <= sequence.usable_blocks
        return sequence in self.deferred

    def find(self, sequence: Sequence, blocks: int) -> None:
        tiers = []
        for key in sequence.keys()[blocks : sequence.usable_blocks]:
            if key not in self.blocks:
                break
            tiers.append("dram")
        sequence.found, sequence.found_end = tuple(tiers), "never_stored"
        sequence.gate = LoadGate() if self.gates and tiers else None

    def keep(self, sequence: Sequence) -> None:
        assert len(sequence.pages) >= sequence.registered
        for block, key in enumerate(sequence.keys()[: sequence.registered]):
            self.kept.append(key)
            self.blocks.setdefault(key, sequence.tokens[block * SIZE : (block + 1) * SIZE])

    def put(self, tokens: list[int], blocks: int) -> None:
        """Have the first blocks of a prompt; the sixth is broken."""
        keys = Sequence(NewRequest("", tokens, SamplingParams()), 0, LIMITS, DIGEST, 0.0).keys()
        for i in range(blocks):
            self.blocks[keys[i]] = tokens[i * SIZE : (i + 1) * SIZE]
            if i == 5:
                self.broken.add(keys[i])


@dataclass(eq=False)
class Input:
    """A work as the device sees it, whatever becomes of its sequence."""

    work: Work
    tokens: list[int]
    before: list[int]
    pages: list[int]
    gate: LoadGate | None
    found: int
    token: int | None = None


@dataclass(eq=False)
class Flight:
    """A step that was launched."""

    step: Step
    inputs: list[Input]
    computed: bool = False
    bad: set[Sequence] = field(default_factory=set)


@dataclass
class Machine:
    """Scheduler, pool and model; a step takes a second."""

    pages: int = 16
    max_tokens: int = 16
    max_seqs: int = 4
    finder: FakeFinder = field(default_factory=FakeFinder)
    overlap: bool = False
    late: bool = False
    aging_s: float = 1e9

    def __post_init__(self) -> None:
        self.books = Pages(self.pages)
        self.pool: list[list[int | None]] = [[None] * SIZE for _ in range(self.pages)]
        bounds = Bounds(self.max_tokens, self.max_seqs, SIZE, self.aging_s)
        self.scheduler = Scheduler(self.books, self.finder, bounds)
        self.live: list[Sequence] = []
        self.computed = 0
        self.wasted = 0
        self.now = 0.0
        self.loads: list[tuple[Sequence, int]] = []
        self.came: dict[LoadGate, int] = {}
        self.passed: list[Sequence] = []
        self.went = 0
        self.flights: deque[Flight] = deque()
        self.latest: dict[Sequence, int] = {}

    def add(
        self,
        prompt: list[int],
        count: int,
        reuse: bool = True,
        stop: tuple[int, ...] = (),
        priority: int = INTERACTIVE,
    ) -> Sequence:
        params = SamplingParams(max_tokens=count, stop_token_ids=stop)
        number = len(self.live)
        request = NewRequest(str(number), prompt, params)
        digest = DIGEST if reuse else None
        sequence = Sequence(request, number, LIMITS, digest, self.now, priority)
        self.live.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.check()

    def step(self, end_loads: bool = True) -> Step:
        self.now += 1
        if end_loads:
            self.finish_loads()
        went = self.scheduler.preemptions.total()
        step = self.scheduler.schedule(self.now)
        self.went = self.scheduler.preemptions.total() - went
        assert step.tokens <= self.max_tokens
        self.check_writers(step)
        working = {work.sequence for work in step.work}
        self.passed = [
            one
            for one in self.scheduler.running
            if one.remaining > 1 and one.gate is None and one not in working
        ]
        self.begin_loads(step)
        before = list(self.flights)
        if step.work:
            self.flights.append(Flight(step, [self.input(work) for work in step.work]))
        if not self.late:
            self.compute(2)
        while self.flights and (self.flights[0] in before or not self.overlap or step.tight):
            self.land()
        self.check()
        return step

    def input(self, work: Work) -> Input:
        one, end = work.sequence, work.start + work.count
        pages = one.pages[: -(-end // SIZE)]
        tokens, before = one.tokens[work.start : end], one.tokens[: work.start]
        return Input(work, tokens, before, pages, one.gate, len(one.found))

    def compute(self, steps: int) -> None:
        """The device catches up with so many of those that were launched."""
        for flight in list(self.flights)[:steps]:
            if not flight.computed:
                self.compute_step(flight)
                flight.computed = True

    def compute_step(self, flight: Flight) -> None:
        for one in flight.inputs:
            if one.gate is not None and self.came[one.gate] < one.found:
                flight.bad.add(one.work.sequence)
            if len(one.tokens) < one.work.count:
                one.tokens.append(self.latest.get(one.work.sequence, 0))
            for position, token in enumerate(one.tokens, one.work.start):
                self.pool[one.pages[position // SIZE]][position % SIZE] = token
            self.computed += one.work.count
        self.latest = {}
        for one in flight.inputs:
            if one.work.last and one.work.sequence not in flight.bad:
                one.token = next_token(self.read(one))
                self.latest[one.work.sequence] = one.token

    def read(self, one: Input) -> list[int]:
        end = one.work.start + one.work.count
        prefix = [self.pool[one.pages[p // SIZE]][p % SIZE] for p in range(end)]
        if not one.work.void:
            wanted = (one.before + one.tokens)[: len(one.before)]
            assert prefix[: len(wanted)] == wanted, "the pages hold another prefix"
            assert prefix[one.work.start :] == one.tokens, "somebody else wrote to its pages"
        return [token or 0 for token in prefix]

    def land(self) -> None:
        """Process the results of the oldest step under way."""
        self.compute(1)
        flight = self.flights.popleft()
        for one in flight.inputs:
            sequence = one.work.sequence
            if one.gate is not None and sequence.gate is one.gate:
                self.scheduler.loaded(sequence, self.came[one.gate])
        for one in flight.inputs:
            if one.work.void:
                ended = one.work.sequence.state is State.FINISHED
                assert ended or one.work.sequence in flight.bad, "wasted for nothing"
                self.wasted += one.work.count
                continue
            self.scheduler.advance(one.work)
            if one.token is not None:
                one.work.sequence.append(one.token)
                if one.work.sequence.finish_reason:
                    self.scheduler.finish(one.work.sequence)
        self.scheduler.land(flight.step)

    def begin_loads(self, step: Step) -> None:
        """The threads that copy wait for nobody: what they bring is there at once."""
        for sequence in step.loads:
            came = self.copy_in(sequence)
            if sequence.gate is None:
                self.loads.append((sequence, came))
            else:
                self.came[sequence.gate] = came

    def finish_loads(self) -> None:
        for sequence, came in self.loads:
            if sequence.state is State.LOADING:
                self.scheduler.loaded(sequence, came)
        self.loads = []

    def copy_in(self, sequence: Sequence) -> int:
        """Fill a sequence's pages up to the first broken block; how many came."""
        for number, block in enumerate(range(len(sequence.found)), sequence.registered):
            key = sequence.keys()[number]
            if key in self.finder.broken:
                self.pool[sequence.pages[number]] = [255] * SIZE
                return block
            self.pool[sequence.pages[number]] = list(self.finder.blocks[key])
        return len(sequence.found)

    def check_writers(self, step: Step) -> None:
        written = [
            work.sequence.pages[block]
            for work in step.work
            for block in range(work.start // SIZE, -(-(work.start + work.count) // SIZE))
        ]
        for work in step.work:
            most = work.sequence.prompt_tokens + work.sequence.request.params.max_tokens
            assert work.start + work.count < min(most, LIMITS.max_model_len), "nobody asked for it"
        held = Counter(page for one in self.live for page in one.pages)
        held.update(page for flight in self.flights for page in flight.step.kept)
        assert len(set(written)) == len(written), "a page has two writers"
        assert all(held[page] == 1 for page in written), "a page is written that others use"

    def check(self) -> None:
        held = Counter(page for one in self.live for page in one.pages)
        held.update(page for flight in self.flights for page in flight.step.kept)
        self.books.check(held)
        scheduler = self.scheduler
        assert len(scheduler.running) + len(scheduler.loading) <= self.max_seqs
        for line in (scheduler.running, list(scheduler.waiting)):
            places = [one.place for one in line]
            assert places == sorted(places), "a line is out of order"

    def idle(self) -> bool:
        return all(one.state is State.FINISHED for one in self.live) and not self.flights

    def run(self, steps: int = 2000) -> None:
        for _ in range(steps):
            if self.idle():
                return
            self.step()
        raise AssertionError("somebody never finishes")
