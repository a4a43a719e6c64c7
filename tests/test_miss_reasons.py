"""Every lookup ends as hit(tier) or miss(reason), the sums agree, and the reason is the true one.

A hypothesis machine drives the real client on a real store: prompts of two namespaces and two
tenants are looked up, loaded, stored and counted while blocks are evicted, cleared, damaged, the
flash tier fails and comes back and the session ends. The model remembers by which operation each
block left, and what may be said of it follows from that.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sim.direct import WAIT_S, StoreControl, attached
from sim.disk import FaultyDisk
from sim.sidecar import BLOCK_TOKENS, Prompt, namespace
from sim.stores import Bench, chain

from kvist.proto.keys import BlockKey, Namespace, origin_of
from kvist.proto.record import RecordShape
from kvist.proto.shm import MISS_REASONS, TIERS

# The same tokens under: two models of one tenant, and one of them for another tenant.
SPACES = (namespace(), namespace(layers=1), namespace("salt"))
SLOT_BYTES = RecordShape(SPACES[0].format.payload_bytes, BLOCK_TOKENS).record_bytes
LARGEST = SPACES[0].format.payload_bytes
BLOCKS = 4
SEEDS = 3


class Ask:
    """A prompt as a request asks for it."""

    def __init__(self, seed: int, space: int) -> None:
        prompt = Prompt(seed, BLOCKS, SPACES[space])
        self.name = f"Ask({seed}, {space})"
        self.keys, self.wanted, self.items = prompt.keys, prompt.wanted, prompt.items
        self.first = origin_of(SPACES[space].salt, self.items[0].tokens), SPACES[space].digest()
        self.items[0] = replace(self.items[0], origin=self.first[0])

    def __repr__(self) -> str:
        return self.name


ASKS = [Ask(seed, space) for seed in range(SEEDS) for space in range(len(SPACES))]
ANY = st.sampled_from(ASKS)
SOME = st.lists(ANY, min_size=1, max_size=5)
ALL_KEYS = [key for ask in ASKS for key in ask.keys]


class LookupMachine(RuleBasedStateMachine):
    """The machine; gone says by which operation a block left, and so what a miss may say."""

    @initialize(dram=st.sampled_from([5, 8, 16]), flash=st.sampled_from([0, 0, 12]))
    def begin(self, dram: int, flash: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.bench = Bench(self.folder, dram, flash)
        self.disk = FaultyDisk()
        sizes = {"slot_bytes": SLOT_BYTES, "dram_bytes": dram * SLOT_BYTES}
        self.bench.open(self.disk, **sizes, flash_bytes=flash * SLOT_BYTES)
        self.control = StoreControl(self.bench.store)
        self.client = attached(self.control, SPACES[0])
        self.worker = self.bench.worker()
        self.present: set[BlockKey] = set()
        self.gone: dict[BlockKey, set[str]] = {}
        self.first_stored: dict[bytes, set[bytes]] = {}
        self.asked_tokens = 0
        self.counts: Counter[str] = Counter()

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.client.close()
            self.bench.close()
            shutil.rmtree(self.folder)

    @property
    def failed(self) -> bool:
        return bool(self.disk.broken)

    def moved(self, *reasons: str) -> None:
        """An operation is over: what vanished by it may be said to be gone for these reasons."""
        self.bench.settle()
        self.bench.store.tick()
        locate = self.bench.parts.index.locate
        present = {key for key in ALL_KEYS if locate(key) is not None}
        for key in self.present - present:
            self.gone[key] = set(reasons)
        for key in present:
            self.gone.pop(key, None)
        self.present = present

    def reasons(self, ask: Ask, block: int) -> set[str]:
        """What may be said of a block that is not offered."""
        key = ask.keys[block]
        if self.control.away:
            return {"detached"}
        if key in self.present:
            assert self.failed
            return {"flash_off"}
        if key in self.gone:
            return self.gone[key]
        spaces = self.first_stored.get(ask.first[0], set())
        elsewhere = not block and spaces and ask.first[1] not in spaces
        return {"namespace" if elsewhere else "never_stored"}

    @rule(asks=SOME, blocks=st.integers(1, BLOCKS))
    def request(self, asks: Sequence[Ask], blocks: int) -> None:
        """Look up, load, count and touch, as the engine does."""
        for ask in asks:
            self.request_one(ask, blocks)
            self.moved("evicted", "not_admitted")

    def request_one(self, ask: Ask, blocks: int) -> None:
        found = self.client.lookup(ask.keys[:blocks], ask.first)
        tiers = self.client.tiers(ask.keys[: found.blocks])
        assert len(tiers) == found.blocks
        hits: Counter[str] = Counter()
        misses: Counter[str] = Counter({"tail": 3})
        if found.blocks < blocks:
            assert found.reason in self.reasons(ask, found.blocks)
            misses[found.reason] = (blocks - found.blocks) * BLOCK_TOKENS
        else:
            assert not found.reason
        self.client.prefetch(ask.keys, found.blocks)
        self.bench.store.tick()
        self.bench.settle()
        for tier, wanted in zip(tiers, ask.wanted, strict=False):
            out = np.empty(wanted.payload_bytes, np.uint8)
            reason = self.client.load(wanted, out, time.monotonic())
            # What rises may take the place of what was found; a device that fails may look well.
            allowed = {None, "flash_late", "evicted", "not_admitted"}
            assert reason in allowed | ({"flash_off"} if self.failed else set())
            if reason is None:
                hits[tier] += BLOCK_TOKENS
            else:
                misses[reason] += BLOCK_TOKENS
        asked = blocks * BLOCK_TOKENS + 3
        self.client.count(asked, hits, misses)
        self.asked_tokens += asked
        self.counts.update(hits)
        self.counts.update(misses)
        self.client.touch(ask.keys, found.blocks)

    @rule(asks=SOME, blocks=st.integers(1, BLOCKS))
    def store(self, asks: Sequence[Ask], blocks: int) -> None:
        """Store some prompts, one after the other."""
        for ask in asks:
            self.store_one(ask, blocks)

    @rule(ask=ANY)
    def store_too_much(self, ask: Ask) -> None:
        """All slots are held by others, so nothing is admitted; then they are given back."""
        slots = self.bench.parts.dram.slots
        others = chain(0, slots + 1)
        held = [answer.slot for answer in self.worker.reserve(others) if answer.slot is not None]
        self.moved("evicted", "not_admitted")
        self.store_one(ask, BLOCKS)
        self.bench.store.abort(self.worker.info.session, held)

    def store_one(self, ask: Ask, blocks: int) -> None:
        """What is refused by the store is not admitted, its children never stored."""
        before = set(self.present)
        result = self.client.store(ask.items[:blocks])
        assert result.stored + result.present + sum(result.dropped.values()) == blocks
        if result.stored and ask.keys[0] not in before:
            self.first_stored.setdefault(ask.first[0], set()).add(ask.first[1])
        self.moved("evicted", "not_admitted")
        if result.dropped and not self.control.away:
            assert set(result.dropped) <= {"full", "share", "no_parent"}
            # None: they are on flash, which is off, and did not get a copy in DRAM.
            refused = next((key for key in ask.keys if key not in self.present), None)
            assert refused is not None or self.failed
            if refused is not None:
                self.gone[refused] = {"not_admitted"}

    @rule(space=st.sampled_from([None, *SPACES, *SPACES]))
    def clear(self, space: Namespace | None) -> None:
        """Drop a namespace, or all."""
        self.bench.store.clear(None if space is None else space.digest())
        self.moved("cleared")

    @rule(which=st.integers(0, 1 << 20))
    def damage(self, which: int) -> None:
        """Flip a byte of a copy in DRAM; who loads it, and who asks again, is told."""
        find = self.bench.parts.index.find
        there = [
            (ask, block, location.dram)
            for ask in ASKS
            for block, key in enumerate(ask.keys)
            if (location := find(key)) is not None and location.dram is not None
        ]
        if not there:
            return
        ask, block, slot = there[which % len(there)]
        self.bench.parts.dram.slot_view(slot)[SLOT_BYTES - 1] ^= 1
        out = np.empty(ask.wanted[block].payload_bytes, np.uint8)
        reason = self.client.load(ask.wanted[block], out, time.monotonic())
        # A shorter record does not reach to the end of its slot.
        assert reason == ("corrupt" if ask.wanted[block].payload_bytes == LARGEST else None)
        self.moved("corrupt")
        self.request([ask], BLOCKS)

    @precondition(lambda self: self.bench.config.flash_path and not self.failed)
    @rule(asks=SOME)
    def flash_fails(self, asks: Sequence[Ask]) -> None:
        """The device is gone."""
        self.disk.broken = dict.fromkeys(("pread", "pwrite", "sync", "fallocate"), errno.EIO)
        self.bench.parts.moves._fail("the sim was asked to fail")
        self.request(asks, BLOCKS)

    @precondition(lambda self: self.failed)
    @rule()
    def flash_is_back(self) -> None:
        """The probe finds it working."""
        self.disk.broken = {}
        self.bench.clock_s += 2  # the tier is probed once a second
        self.bench.run_until(lambda: self.bench.parts.moves.state == "ready")
        self.moved("evicted", "not_admitted")

    @rule(asks=SOME, blocks=st.integers(1, BLOCKS))
    def sidecar_is_away(self, asks: Sequence[Ask], blocks: int) -> None:
        """The session ends; what is asked meanwhile is counted in the next one."""
        self.control.away = True
        self.control.hang_up()
        deadline = time.monotonic() + WAIT_S
        while self.client.state == "attached":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self.request(asks, blocks)
        self.store(asks, blocks)
        self.control.away = False
        assert self.client.wait_attached(WAIT_S)

    @invariant()
    def sums_agree(self) -> None:
        """Every token asked for is in exactly one counter of the store."""
        if not hasattr(self, "bench"):
            return
        stats = self.bench.store.stats()
        assert stats.requested_tokens == self.asked_tokens
        shown = Counter({**stats.hit_tokens, **stats.miss_tokens})
        assert set(shown) == {*TIERS, *MISS_REASONS}
        assert +shown == +self.counts
        assert sum(shown.values()) == self.asked_tokens


TestLookups = LookupMachine.TestCase
TestLookups.settings = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
