"""Any order of stores, uses, moves, damage, deaths and restarts keeps the store whole.

A hypothesis machine drives a real store with real files and flash threads; results of the threads
are delivered when the machine says so. After each step: the set of stored keys is closed under
prefix, so is flash, no slot is lost or used twice, eviction knows every leaf (sim.stores.check);
and what is served is right, and no more than the model says was stored.

Fault budget: any DRAM copy or flash record may be damaged, workers may die with slots reserved,
the sidecar may restart at any moment. Data may be lost by this, as the model allows; a byte of it
may not be wrong.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sim.blocks import NAMESPACE, SLOT_BYTES, Block
from sim.flash import flip
from sim.stores import Bench, Worker, check, tree_block

from kvist.proto.keys import BlockKey
from kvist.proto.shm import CORRUPT, PREFETCH, TOUCH
from kvist.proto.slot import fill_slot

OTHER = b"another namespace".ljust(32)
NUMBERS = st.integers(0, 39)


def make_forest() -> dict[int, Block]:
    """40 blocks: two namespaces, trunks with branches of various depths."""
    forest: dict[int, Block] = {}
    for number in range(40):
        namespace = OTHER if number % 4 == 3 else NAMESPACE
        parents = [n for n in forest if forest[n].header.namespace == namespace]
        # Three in four stand on a block of their own namespace, not far back.
        parent = forest[parents[-1 - number % min(3, len(parents))]] if parents else None
        if number % 7 == 0:
            parent = None
        forest[number] = tree_block(number, parent, namespace)
    return forest


FOREST = make_forest()
NUMBER_OF = {block.header.key: number for number, block in FOREST.items()}


class StoreMachine(RuleBasedStateMachine):
    """The machine; the model is the set of numbers that were ever committed and may be there."""

    @initialize(dram=st.sampled_from([4, 8, 12]), flash=st.sampled_from([0, 6, 16]))
    def begin(self, dram: int, flash: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.bench = Bench(self.folder, dram, flash)
        self.bench.open(flash_queue_blocks=4)
        self.workers = [self.bench.worker(), self.bench.worker()]
        self.reserved: dict[int, tuple[int, Worker]] = {}
        self.may_be_there: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            try:
                self.bench.settle()
                check(self.bench)
            finally:
                self.bench.close()
                shutil.rmtree(self.folder)

    def is_stored(self, number: int) -> bool:
        return self.bench.parts.index.locate(FOREST[number].header.key) is not None

    def parent_of(self, number: int) -> int | None:
        return NUMBER_OF.get(FOREST[number].header.parent)

    @rule(number=NUMBERS, who=st.integers(0, 1))
    def reserve(self, number: int, who: int) -> None:
        worker, parent = self.workers[who], self.parent_of(number)
        was_stored = self.is_stored(number)
        has_parent = parent is None or self.is_stored(parent)
        has_parent |= parent in self.reserved and self.reserved[parent][1] is worker
        (answer,) = worker.reserve([FOREST[number]])
        if was_stored or number in self.reserved:
            assert answer.outcome == "present"
        elif not has_parent:
            assert answer.reason == "no_parent"
        elif answer.slot is None:
            assert answer.reason in ("full", "share")
        else:
            worker.fill(answer.slot, FOREST[number])
            self.reserved[number] = (answer.slot, worker)

    # What is drawn depends on no state, for threads make that differ from run to run.

    @rule(which=st.integers(0, 7))
    def commit(self, which: int) -> None:
        if not self.reserved:
            return
        number = sorted(self.reserved)[which % len(self.reserved)]
        slot, worker = self.reserved.pop(number)
        parent = self.parent_of(number)
        has_parent = parent is None or self.is_stored(parent)
        assert worker.commit([slot]) == [has_parent]
        assert self.is_stored(number) == has_parent
        if has_parent:
            self.may_be_there.add(number)

    @rule(which=st.integers(0, 7))
    def abort(self, which: int) -> None:
        if not self.reserved:
            return
        number = sorted(self.reserved)[which % len(self.reserved)]
        slot, worker = self.reserved.pop(number)
        self.bench.store.abort(worker.info.session, [slot])

    @rule(number=NUMBERS, who=st.integers(0, 1))
    def store_down_to(self, number: int, who: int) -> None:
        """What an engine does: all blocks of a prompt in one batch."""
        numbers: list[int] = []
        each: int | None = number
        while each is not None:
            numbers.insert(0, each)
            each = self.parent_of(each)
        outcomes = self.workers[who].put([FOREST[each] for each in numbers])
        lost: set[int] = set()
        for each, outcome in zip(numbers, outcomes, strict=True):
            if outcome == "stored":
                self.may_be_there.add(each)
            elif outcome == "lost":  # on top of what the same worker has only reserved
                assert self.parent_of(each) in {*self.reserved, *lost}
                lost.add(each)
            else:
                assert outcome in ("present", "full", "share", "no_parent")

    @rule(number=NUMBERS)
    def put_record(self, number: int) -> None:
        block = FOREST[number]
        record = memoryview(bytearray(SLOT_BYTES))
        fill_slot(record, block.header, block.payload)
        if self.bench.store.put_record(record) == "stored":
            self.may_be_there.add(number)

    @rule(number=NUMBERS, kind=st.sampled_from([TOUCH, PREFETCH, CORRUPT]))
    def report(self, number: int, kind: int) -> None:
        self.workers[0].ring.push(kind, 1, FOREST[number].header.key)
        self.bench.store.tick()

    @rule(results=st.integers(1, 4))
    def deliver(self, results: int) -> None:
        for _ in range(results):
            self.bench.deliver(0.002)

    @rule()
    def settle(self) -> None:
        self.bench.settle()

    @rule(namespace=st.sampled_from([None, NAMESPACE, OTHER]))
    def clear(self, namespace: bytes | None) -> None:
        self.bench.store.clear(namespace)
        self.may_be_there = {
            number
            for number in self.may_be_there
            if namespace not in (None, FOREST[number].header.namespace)
        }

    @rule(number=NUMBERS)
    def damage_dram(self, number: int) -> None:
        location = self.bench.parts.index.find(FOREST[number].header.key)
        if location is not None and location.dram is not None:
            self.bench.settle()  # what is on its way to flash would take the damage along
            location = self.bench.parts.index.find(FOREST[number].header.key)
            if location is not None and location.dram is not None:
                self.bench.parts.dram.slot_view(location.dram)[5000] ^= 0xFF
                self.report(number, CORRUPT)
                assert self.bench.tiers([FOREST[number]]) != ["dram"]

    @rule(number=NUMBERS)
    def damage_flash(self, number: int) -> None:
        location = self.bench.parts.index.find(FOREST[number].header.key)
        if location is not None and location.flash is not None:
            flip(self.folder / "flash" / "segment-00000", location.flash * SLOT_BYTES + 5000)

    @rule(who=st.integers(0, 1))
    def worker_dies(self, who: int) -> None:
        dead = self.workers[who]
        self.bench._workers.remove(dead)
        dead.close()
        self.bench.store.tick()
        self.reserved = {
            number: held for number, held in self.reserved.items() if held[1] is not dead
        }
        self.workers[who] = self.bench.worker()

    @rule()
    def restart(self) -> None:
        parts = self.bench.parts
        self.bench.store.tick()
        expected = {
            number
            for number in FOREST
            if (row := parts.index.locate(FOREST[number].header.key)) is not None
            and parts.placement.blocks.reaches_flash(row)
        }
        self.bench.close()
        self.bench.open()
        self.workers = [self.bench.worker(), self.bench.worker()]
        self.reserved.clear()
        assert {number for number in FOREST if self.is_stored(number)} == expected
        assert self.bench.parts.placement.counts.orphans_dropped == 0

    @invariant()
    def is_whole(self) -> None:
        if hasattr(self, "bench"):
            check(self.bench)

    @invariant()
    def holds_nothing_but_what_was_stored(self) -> None:
        if hasattr(self, "bench"):
            stored = {number for number in FOREST if self.is_stored(number)}
            assert stored <= self.may_be_there
            assert len(stored) == len(self.bench.parts.placement.blocks)

    @rule(number=NUMBERS)
    def read(self, number: int) -> None:
        self.workers[0].reads(FOREST[number])

    @rule(number=NUMBERS)
    def rise_and_read(self, number: int) -> None:
        """A chain that was stored and not damaged comes back whole, as far as it fits."""
        keys: list[BlockKey] = []
        each: int | None = number
        while each is not None:
            keys.insert(0, FOREST[each].header.key)
            each = self.parent_of(each)
        self.bench.store.prefetch(keys)
        self.bench.settle()
        for key in keys:
            self.workers[1].reads(FOREST[NUMBER_OF[key]])


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
