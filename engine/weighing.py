"""How a found prefix reaches its pages: what of it is loaded, and whether the computation waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvist.cachesvc.worker.cost import Choice, CostModel, decision_of
from kvist.engine.copying import Loaded, Stored
from kvist.engine.loading import LoadGate
from kvist.engine.request import LoadCost, LoadStats
from kvist.engine.sequence import Sequence
from kvist.engine.step import Work
from kvist.transfer.pace import Pace
from kvist.transfer.pipeline import layer_cuts


class Weigher:
    """Chooses for each request, from what was measured, and keeps the account of it.

    Used by the core's thread only.

    Args:
        layers: of the model.
        block_bytes: bytes of a block.
        block_tokens: tokens of a block.

    Attributes:
        cuts: see transfer.pipeline.layer_cuts.
        cost: the measured rates.
        by_layers: loads may run beside the computation.
        beside: requests that are computing; the core says it before each step.
        queued: blocks of loads under way.
        rates: what was measured, by name of proto.shm.RATES, as of the last look.
    """

    def __init__(self, layers: int, block_bytes: int, block_tokens: int) -> None:
        self.cuts = layer_cuts(layers, block_bytes)
        self.cost = CostModel(block_bytes, block_tokens)
        self.by_layers = True
        self.beside = 0
        self.queued = 0
        self.rates: dict[str, int] = {}
        self._block_tokens = block_tokens
        self._decisions: Counter[str] = Counter(load=0, part=0, compute=0)
        self._ways: Counter[str] = Counter(layers=0, blocks=0)
        self._undone = 0
        self._estimated_load_s = 0.0
        self._estimated_compute_s = 0.0
        self._load_s = 0.0
        self._gate_wait_s = 0.0
        self._gate_waits = 0

    def weigh(self, sequence: Sequence, first_block: int, tiers: tuple[str, ...]) -> Choice:
        """What would be chosen now; see choose."""
        first, tokens = first_block * self._block_tokens, len(sequence.tokens)
        return self.cost.choose(first, tiers, tokens, self.queued, not self.beside)

    def choose(self, sequence: Sequence, first_block: int, tiers: tuple[str, ...]) -> None:
        """Set a sequence's found, choice and gate.

        A prefix in DRAM is loaded layer by layer beside the sequence's own computation. Not when
        that would be shorter than the load and others compute as well: they would all be held up.

        Args:
            sequence: about to be admitted.
            first_block: where what was found begins.
            tiers: of each block that was found, at least one.
        """
        choice = self.weigh(sequence, first_block, tiers)
        self.cost.decided(choice)
        sequence.choice, sequence.found = choice, tiers[: choice.blocks]
        sequence.gate = None
        self._decisions[decision_of(choice)] += 1
        if not sequence.found:
            return
        self._estimated_load_s += choice.load_s
        self._estimated_compute_s += choice.compute_s
        hidden = choice.load_s <= choice.compute_s or not self.beside
        if self.by_layers and hidden and set(sequence.found) == {"dram"}:
            sequence.gate = LoadGate()
        self._ways["layers" if sequence.gate is not None else "blocks"] += 1
        self.queued += len(sequence.found)

    def loaded(self, loaded: Loaded) -> None:
        """A load has ended."""
        self.queued -= len(loaded.pages)
        sequence, gate = loaded.sequence, loaded.gate
        if gate is not None:
            self._gate_wait_s += gate.waited_s
            self._gate_waits += gate.waits
            self._undone += not gate.sound
        if loaded.reason or sequence.choice is None or len(sequence.found) != len(loaded.pages):
            return
        self._load_s += loaded.busy_s
        self.cost.loaded(sequence.found, loaded.busy_s)
        choice = sequence.choice
        sequence.cost = LoadCost(choice.load_s, choice.compute_s, loaded.busy_s, choice.skipped)

    def stored(self, stored: Stored) -> None:
        """A batch of stores has ended."""
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
        self.cost.prefill.observe(tokens, positions, seconds)

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
        )
