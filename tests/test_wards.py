"""Quotas and floors: a group over its quota makes room itself, and nobody goes below his floor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sim.blocks import SLOT_BYTES, Block
from sim.stores import Bench, Worker, keys_of, tree_block

from kvist.cachesvc.core.intake import Reserved
from kvist.cachesvc.core.sessions import First
from kvist.cachesvc.placing.tenancy import Limits, parse_tenants
from kvist.proto.shm import TOUCH

SLOTS = 12
A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


def chain(space: bytes, first: int, length: int) -> list[Block]:
    blocks: list[Block] = []
    for number in range(first, first + length):
        blocks.append(tree_block(number, blocks[-1] if blocks else None, space))
    return blocks


class Teller(Worker):
    """A worker that tells whose its first blocks are, as the client does."""

    def reserve(self, blocks: Sequence[Block]) -> list[Reserved]:
        names = [(block.header.key, block.header.parent) for block in blocks]
        heads = [block.header for block in blocks if not block.header.depth]
        firsts = {head.key: First(b"", head.namespace, "") for head in heads}
        return self.store.reserve(self.info.session, names, firsts)


def rules(**limits: Limits) -> dict[str, Limits]:
    return {f"ns:{name[1:] * 4}": each for name, each in limits.items()}


def slots(count: int) -> int:
    return count * SLOT_BYTES


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, SLOTS)
    yield made
    made.close()


def teller(bench: Bench) -> Teller:
    worker = Teller(bench.store)
    bench._workers.append(worker)
    return worker


def test_a_group_over_its_quota_drops_its_own_oldest_leaves(bench: Bench) -> None:
    bench.open(tenants=rules(n01=Limits(quota=slots(4))))
    worker = teller(bench)
    others, old, new = chain(B, 500, 6), chain(A, 0, 4), chain(A, 100, 2)
    assert worker.put(others) == ["stored"] * 6
    worker.put(old)
    assert worker.put(new) == ["stored"] * 2
    assert bench.tiers(others) == ["dram"] * 6, "there was room, and nothing of theirs went"
    assert bench.tiers(old) == ["dram"] * 2
    assert bench.tiers(new) == ["dram"] * 2
    assert bench.parts.dram.free_slots == 2
    worker.ring.push(TOUCH, 2, keys_of(old)[1])
    bench.store.tick()
    worker.put(chain(A, 200, 1))
    assert bench.tiers(old) == ["dram"] * 2, "used since"
    assert bench.tiers(new) == ["dram"]


def test_a_batch_larger_than_the_quota_is_stored_as_far_as_it_fits(bench: Bench) -> None:
    bench.open(tenants=rules(n01=Limits(quota=slots(3))))
    worker = teller(bench)
    assert worker.put(chain(A, 0, 5)) == ["stored"] * 3 + ["full", "no_parent"]


def test_others_take_nothing_from_a_group_at_its_floor(bench: Bench) -> None:
    bench.open(tenants=rules(n01=Limits(floor=slots(4))))
    worker = teller(bench)
    mine = chain(A, 0, 6)
    worker.put(mine)
    for first in range(500, 800, 100):
        worker.put(chain(B, first, 8))
        assert bench.tiers(mine) == ["dram"] * 4, "the two over the floor went, being older"
        assert bench.tiers(chain(B, first, 8)) == ["dram"] * 8
    assert worker.put(chain(A, 100, 2)) == ["stored"] * 2, "its own block may take their place"
    worker.put(chain(B, 900, 8))
    index = bench.parts.index
    left = [key for key in keys_of(mine + chain(A, 100, 2)) if index.locate(key) is not None]
    assert len(left) == 4


def test_a_tenant_is_who_the_worker_says(bench: Bench) -> None:
    bench.open(tenants=parse_tenants(f"acme quota={slots(2)}"))
    worker = teller(bench)
    blocks = chain(A, 0, 3)
    first = First(b"", A, "acme")
    names = [(block.header.key, block.header.parent) for block in blocks]
    answers = bench.store.reserve(worker.info.session, names, {names[0][0]: first})
    assert [each.outcome for each in answers] == ["reserved", "reserved", "refused"]
    assert answers[2].reason == "full"
    bench.store.abort(worker.info.session, [each.slot for each in answers if each.slot is not None])
    assert worker.put(chain(B, 500, 3)) == ["stored"] * 3


def test_flash_has_quotas_of_its_own(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SLOTS, 8)
    bench.open(tenants=rules(n01=Limits(flash_quota=slots(3))))
    worker = teller(bench)
    mine, others = chain(A, 0, 5), chain(B, 500, 4)
    for blocks in (others, mine):
        worker.put(blocks)
        bench.settle()
    found = [bench.parts.index.find(key) for key in keys_of(mine)]
    assert sum(each is not None and each.flash is not None for each in found) == 3
    assert all(each is not None and each.dram is not None for each in found)
    bench.close()


class Machine(RuleBasedStateMachine):
    """Three groups store and use blocks in any order; the model is only what the rules say."""

    quota, floor = 5, 4

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.bench = Bench(self.folder, SLOTS)
        limits = {"n01": Limits(quota=slots(self.quota)), "n02": Limits(floor=slots(self.floor))}
        self.bench.open(tenants=rules(**limits))
        self.worker = teller(self.bench)

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.close()
            shutil.rmtree(self.folder)

    def held(self, space: bytes) -> int:
        return len(self.bench.parts.placement.blocks.in_namespace(space))

    @rule(space=st.sampled_from([A, B, C]), first=st.integers(0, 9), length=st.integers(1, 5))
    def store(self, space: bytes, first: int, length: int) -> None:
        before = self.held(B)
        blocks = chain(space, 100 * first + 1000 * space[0], length)
        outcomes = self.worker.put(blocks)
        if space != B:
            assert self.held(B) >= min(before, self.floor), "others took from a floor"
        if space == C:  # no limits, and 4 + 5 slots at most are the others' for good
            assert set(outcomes[:3]) <= {"stored", "present"}

    @rule(space=st.sampled_from([A, B, C]), first=st.integers(0, 9))
    def use(self, space: bytes, first: int) -> None:
        key = keys_of(chain(space, 100 * first + 1000 * space[0], 1))[0]
        self.worker.ring.push(TOUCH, 1, key)
        self.bench.store.tick()

    @invariant()
    def rules_hold(self) -> None:
        if hasattr(self, "bench"):
            assert self.held(A) <= self.quota
            copies = self.bench.parts.placement.blocks.copies["dram"]
            assert sum(copies.values()) == sum(self.held(space) for space in (A, B, C))


TestRules = Machine.TestCase
TestRules.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
