"""How a found prefix reaches its pages: what of it is loaded, and whether the computation waits."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from itertools import groupby

from kvist.cachesvc.worker.cost import STEP_TOKENS_MIN, Ahead, Choice, CostModel, decision_of
from kvist.cachesvc.worker.meter import Meter
from kvist.engine.copying import Loaded, Stored
from kvist.engine.loading import LoadGate
from kvist.engine.request import LoadCost, LoadStats
from kvist.engine.sequence import Sequence
from kvist.engine.step import Work
from kvist.engine.tally import hit_tiers
from kvist.proto.shm import MOVED_TIERS, TIERS
from kvist.transfer.pace import Pace
from kvist.transfer.pipeline import RUN_BYTES, layer_cuts

# Lookups that wait for the first measurement.
UNVALUED_MAX = 256


def asked_blocks(sequence: Sequence, first_block: int, tiers: tuple[str, ...]) -> int:
    """Leading blocks of what was found that need not be asked to rise: they are in DRAM, or that
    was done when the request arrived."""
    if "flash" not in tiers:
        return len(tiers)
    fresh = (
        i
        for i, tier in enumerate(tiers)
        if tier == "flash" and first_block + i not in sequence.rose
    )
    return next(fresh, len(tiers))


class Weigher:
    """Chooses for each request, from what was measured, and keeps the account of it.

    Used by the core's thread only.

    Args:
        layers: of the model.
        block_bytes: bytes of a block.
        block_tokens: tokens of a block.
        run_bytes: see transfer.pipeline.layer_cuts.

    Attributes:
        block_bytes: of a block.
        cuts: see transfer.pipeline.layer_cuts.
        cost: the measured rates.
        by_layers: loads may run beside the computation.
        beside: requests that are computing; the core says it before each step.
        queued: blocks of loads under way.
        rates: what was measured, by name of proto.shm.RATES, as of the last look.
        meter: the rest of what was measured, for the sidecar.
    """

    def __init__(
        self, layers: int, block_bytes: int, block_tokens: int, run_bytes: int = RUN_BYTES
    ) -> None:
        self.cuts = layer_cuts(layers, block_bytes, run_bytes)
        self.cost = CostModel(block_bytes, block_tokens)
        self.by_layers = True
        self.beside = 0
        self.queued = 0
        self.rates: dict[str, int] = {}
        self.meter = Meter()
        self.block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._decisions: Counter[str] = Counter(load=0, part=0, compute=0)
        self._ways: Counter[str] = Counter(layers=0, rising=0, blocks=0)
        self._undone = 0
        self._estimated_load_s = 0.0
        self._estimated_compute_s = 0.0
        self._load_s = 0.0
        self._gate_wait_s = 0.0
        self._gate_waits = 0
        self._loaded_bytes = dict.fromkeys(MOVED_TIERS, 0)
        self._moved_s = dict.fromkeys(MOVED_TIERS, 0.0)
        self._saved_s = dict.fromkeys(TIERS, 0.0)
        self._unvalued: deque[tuple[str, tuple[str, ...]]] = deque(maxlen=UNVALUED_MAX)
        self._store_s = 0.0

    def weigh(
        self,
        sequence: Sequence,
        first_block: int,
        tiers: tuple[str, ...],
        followed: bool,
        rising_s: float = 0.0,
        asked: int = 0,
    ) -> Choice:
        """What would be chosen now; see choose.

        Args:
            followed: what is on flash rises beside the computation.
            rising_s, asked: see cost.Ahead.
        """
        first, tokens = first_block * self._block_tokens, len(sequence.tokens)
        ahead = Ahead(self.queued, rising_s, asked)
        return self.cost.choose(first, tiers, tokens, ahead, not self.beside, followed)

    def choose(
        self,
        sequence: Sequence,
        first_block: int,
        tiers: tuple[str, ...],
        rising_s: float = 0.0,
    ) -> None:
        """Set a sequence's found, choice and gate.

        A prefix in DRAM is loaded layer by layer beside the sequence's own computation. Not when
        that would be shorter than the load and others compute as well: they would all be held up.
        One that still rises is when the sequence was let in for that (engine/rising).

        Args:
            sequence: about to be admitted.
            first_block: where what was found begins.
            tiers: of each block that was found, at least one.
            rising_s: until what is on flash begins to rise if it was not asked for before.
        """
        asked = asked_blocks(sequence, first_block, tiers)
        follows = sequence.follow_until_s > 0
        # One that follows a rise waits at its gate, where nobody asks for more to rise.
        rising_s = math.inf if follows else rising_s
        choice = self.weigh(sequence, first_block, tiers, follows, rising_s, asked)
        self.cost.decided(choice)
        sequence.choice, sequence.found = choice, tiers[: choice.blocks]
        sequence.gate = None
        self._decisions[decision_of(choice)] += 1
        self.meter.count(f"decisions.{decision_of(choice)}", 1)
        if not sequence.found:
            return
        self._estimated_load_s += choice.load_s
        self._estimated_compute_s += choice.compute_s
        rises = "flash" in sequence.found
        if rises:
            hidden = sequence.follow_until_s > 0
        else:
            hidden = choice.load_s <= choice.compute_s or not self.beside
        if self.by_layers and hidden:
            sequence.gate = LoadGate()
        way = "rising" if rises else "layers"
        self._ways[way if sequence.gate is not None else "blocks"] += 1
        self.queued += len(sequence.found)

    def loaded(self, loaded: Loaded) -> None:
        """A load has ended."""
        self.queued -= len(loaded.pages)
        sequence, gate = loaded.sequence, loaded.gate
        if gate is not None:
            self._gate_wait_s += gate.waited_s
            self._gate_waits += gate.waits
            self._undone += not gate.sound
        tier = "flash" if "flash" in sequence.found else "dram"
        # What had not come when it was let in had begun to rise before.
        waited = asked_blocks(sequence, sequence.registered, sequence.found)
        before_s = sequence.rise_s if "flash" in sequence.found[:waited] else 0.0
        self._note_load(loaded)
        seconds = before_s + loaded.busy_s
        if loaded.reason == "flash_late":
            self.cost.late(sequence.found, seconds)
        if loaded.reason or sequence.choice is None or len(sequence.found) != len(loaded.pages):
            return
        self._load_s += seconds
        self.cost.loaded(sequence.found, seconds)
        choice = sequence.choice
        sequence.cost = LoadCost(choice.load_s, choice.compute_s, seconds, choice.skipped)
        if choice.load_s > 0:  # the estimate is of all of it, the wait for other loads included
            ratio = (before_s + loaded.seconds) / choice.load_s
            self.meter.observe(f"load_estimate_ratio.{tier}", ratio)

    def rose(self, blocks: int, seconds: float, all_came: bool) -> None:
        """Blocks have risen in so long, or not all of them yet; see rising.Rising."""
        if all_came:
            self.cost.loaded(["flash"] * blocks, seconds)
        else:
            self.cost.late(["flash"] * blocks, seconds, given_up=False)

    def _note_load(self, loaded: Loaded) -> None:
        """Time goes to the slower of the tiers that the blocks came from, as in CostModel.loaded,
        and bytes to each."""
        sequence = loaded.sequence
        tiers = hit_tiers(sequence, len(loaded.pages))
        rose = "flash" in tiers
        tier, seconds = (
            ("flash", loaded.busy_s + sequence.rise_s) if rose else ("dram", loaded.busy_s)
        )
        self.meter.observe(f"load_seconds.{tier}", seconds)
        self.meter.took(sequence.tenant, f"load_us.{tier}", seconds)
        self._moved_s[tier] += seconds
        for name, blocks in Counter(tiers[: loaded.blocks]).items():
            moved = blocks * self.block_bytes
            self.meter.count_for(sequence.tenant, f"load_bytes.{name}", moved)
            self._loaded_bytes[name] += moved
        sequence.rise_s = 0.0

    def saved(self, sequence: Sequence, loaded: int) -> None:
        """A lookup has been counted, of whose found blocks so many came: what its hits save.

        See cachesvc.core.accounts.worth_s. What came before a prefill was measured here is valued
        when one was.
        """
        tiers = ("hbm",) * sequence.registered + hit_tiers(sequence, loaded)
        if tiers:
            self._unvalued.append((sequence.tenant, tiers))
        self._value()

    def _value(self) -> None:
        if not self._unvalued or not self.cost.prefill.is_settled:
            return
        _, a, b = self.cost.prefill.coefficients
        for tenant, tiers in self._unvalued:
            start = 0
            for tier, run in groupby(tiers):
                end = start + self._block_tokens * sum(1 for _ in run)
                seconds = a * (end - start) + b * (end**2 - start**2) / 2
                self.meter.took(tenant, f"saved_us.{tier}", seconds)
                self._saved_s[tier] += seconds
                start = end
        self._unvalued.clear()

    def began(self, sequence: Sequence, seconds: float) -> None:
        """A sequence has its first token, so long after it arrived; see proto/histograms."""
        cached = sequence.cached
        tokens = {"hbm": cached.hbm, "dram": cached.dram, "flash": cached.flash}
        half = 2 * sum(tokens.values()) >= sequence.prompt_tokens
        tier = max(tokens, key=lambda each: tokens[each]) if half else "none"
        self.meter.observe(f"ttft_seconds.{tier}", seconds)

    def stored(self, stored: Stored) -> None:
        """A batch of stores has ended. Of one for several tenants, each has an even part of what
        it took, and of the blocks if not all were stored.
        """
        self.meter.observe("store_seconds", stored.seconds)
        self._store_s += stored.seconds
        total, first, told = len(stored.pages), 0, 0
        for tenant, blocks in stored.tenants.items():
            first += blocks
            upto = round(stored.result.stored * first / total)
            self.meter.count_for(tenant, "stored_blocks", upto - told)
            self.meter.took(tenant, "store_us", stored.seconds * blocks / total)
            told = upto
        if stored.result.stored == len(stored.pages):
            self.cost.stored(stored.result.stored, stored.seconds)

    def computed(self, works: Iterable[Work], seconds: float) -> None:
        """A step has been computed, in so many seconds; its gates have not been taken yet."""
        tokens, positions = 0, 0.0
        for work in works:
            tokens += work.count
            positions += work.count * (work.start + (work.count - 1) / 2)
            if work.sequence.gate is not None:
                seconds -= work.sequence.gate.waited_s
        if tokens >= STEP_TOKENS_MIN and self.cost.prefill.steps and seconds > 0:
            estimate = float(self.cost.prefill.seconds(tokens, positions))
            self.meter.observe("prefill_estimate_ratio", seconds / estimate)
        self.cost.prefill.observe(tokens, positions, seconds)
        self._value()

    def look(self) -> dict[str, int]:
        """Bring rates up to date: 0.1 ms, so not in every step."""
        self.rates = self.cost.rates_shown()
        return self.rates

    def stats(self, pace: Pace) -> LoadStats:
        """The account."""
        return LoadStats(
            decisions=dict(self._decisions),
            ways=dict(self._ways),
            undone=self._undone,
            estimated_load_s=self._estimated_load_s,
            estimated_compute_s=self._estimated_compute_s,
            load_s=self._load_s,
            gate_wait_s=self._gate_wait_s,
            gate_waits=self._gate_waits,
            store_yields=pace.yields,
            throttled_s=pace.throttled_s,
            rates=self.rates,
            loaded_bytes=dict(self._loaded_bytes),
            saved_s=dict(self._saved_s),
            moved_s=dict(self._moved_s),
            store_s=self._store_s,
        )
