"""Load or compute: what a cached prefix costs either way, from what was measured here.

    load(n)    = START_S + bytes of its blocks / bytes per second, tier by tier
    compute    = c + a * tokens + b * sum of their positions      (of one step)

Rates are means that forget, the second line is fitted by recursive least squares that forget. A
load that runs beside the computation costs what is longer of the two; one that must rise from flash
before it, or would hold up the computation of others, costs both. Of all prefixes of what was found
the cheapest is loaded, the rest computed. Until both sides were measured, all of it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvist.proto.shm import NEVER

# Hand-over to a thread, headers, the result: 0.4 to 0.8 ms of a load, whatever its size.
START_S = 0.0006
# Until something was measured: a slow memory, a slow disk, a fast computation. They bound waits and
# are shown; no choice is made by them.
PRIOR_BYTES_PER_S = {"dram": 3e9, "flash": 0.5e9}
PRIOR_TOKEN_S = 1 / 5000
# A load of so many bytes moves the mean half-way.
HALF_BYTES = 16 << 20
WEIGHT_MAX = 0.5
# Steps with fewer tokens say more about decoding than about prompts.
STEP_TOKENS_MIN = 32
# The weight of a step after n others is FORGET ** n: some 20 count.
FORGET = 0.95
# Tokens of context that double the cost of one: 4,000 for a model of 135 M, 30,000 for 8 B. What b
# is believed to be, give or take as much, before two different steps were seen.
CROSSOVER = 4096
# Large steps that are fitted anew when the first small one has told c.
EARLY_MAX = 4
# Variance over the square of a: what nothing is heard of shall not be believed to be anything.
SPREAD_MAX = 1e4
WEIGHT_SMALL = 0.05
# Estimates are no better than that.
MARGIN = 1.1
# Variance of a step's time around what it should be, over its square.
NOISE = 0.1**2
# No prompt has so many tokens.
LENGTH_MAX = 1 << 30
# Prefixes that were computed although they were there, before one is loaded all the same, so that a
# rate that was bad once is looked at again.
TRY_AGAIN = 16


class Rate:
    """Bytes per second, a mean that forgets.

    Attributes:
        bytes_per_s: the mean; the prior until something was measured.
        measured: something was.
    """

    def __init__(self, prior: float) -> None:
        self.bytes_per_s = prior
        self.measured = False

    def add(self, count: int, seconds: float) -> None:
        """A copy of count bytes took so long, its start included."""
        if not count:
            return
        rate = count / max(seconds - START_S, seconds / 4, 1e-9)
        weight = min(WEIGHT_MAX, count / (count + HALF_BYTES)) if self.measured else 1.0
        self.bytes_per_s += weight * (rate - self.bytes_per_s)
        self.measured = True

    def late(self, count: int, seconds: float, weight: float) -> None:
        """A copy of count bytes had not ended after so long."""
        rate = count / max(seconds, 1e-9)
        if count and rate < self.bytes_per_s:
            self.bytes_per_s += weight * (rate - self.bytes_per_s)
            self.measured = True


class Prefill:
    """Seconds of a step: c + a * tokens + b * sum of their positions, fitted as steps come.

    Small steps tell c, large ones a and b; one alone tells both if CROSSOVER does. An engine that
    was just started sees the short ends of prompts that are cached: what of these is c must be
    known, or the whole of a prefix is taken for several times what it costs.

    Attributes:
        steps: large ones that were taken in.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._c = 0.0
        self._early: list[tuple[int, float, float]] = []
        self._theta = np.array([PRIOR_TOKEN_S, 0.0])
        self._spread = np.zeros((2, 2))

    def observe(self, tokens: int, positions: float, seconds: float) -> None:
        """A step took so long.

        Args:
            tokens: that it computed. positions: sum of theirs.
        """
        if seconds <= 0 or not tokens:
            return
        if tokens >= STEP_TOKENS_MIN:
            if not self._c and len(self._early) < EARLY_MAX:
                self._early.append((tokens, positions, seconds))
            self._fit(tokens, positions, seconds)
        elif not self._c:
            self._c, self.steps = seconds, 0
            # The first step of all also brings code and pages into memory.
            for each in self._early[len(self._early) > 1 :]:
                self._fit(*each)
            self._early = []
        else:
            rest = seconds - float(np.array([tokens, positions]) @ self._theta)
            self._c += WEIGHT_SMALL * (max(0.0, rest if self.steps else seconds) - self._c)

    @property
    def is_settled(self) -> bool:
        """Whether c is known, or will not be soon, and a and b are: so what a whole prefix costs
        may be said."""
        return bool(self.steps) and (bool(self._c) or self.steps >= EARLY_MAX)

    def _fit(self, tokens: int, positions: float, seconds: float) -> None:
        x = np.array([tokens, positions])
        target = max(seconds - self._c, seconds / 4)
        if not self.steps:
            each = target / (tokens + positions / CROSSOVER)
            self._theta = np.array([each, each / CROSSOVER])
            self._spread = np.diag([1.0, 1.0 / CROSSOVER**2]) * self._theta[0] ** 2
        self.steps += 1
        # Divided by the time: a step of 2,000 tokens is not worth more than one of 200.
        x, target = x / seconds, target / seconds
        gain = self._spread @ x
        gain /= FORGET * NOISE + x @ gain
        self._theta += gain * (target - x @ self._theta)
        self._spread = (self._spread - np.outer(gain, x @ self._spread)) / FORGET
        room = SPREAD_MAX * float(self._theta[0]) ** 2 / max(self._spread[0, 0], 1e-300)
        self._spread *= min(1.0, room)

    def seconds(self, tokens: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """What steps of so many tokens at positions of this sum take."""
        c, a, b = self.coefficients
        return c + a * np.asarray(tokens) + b * np.asarray(positions)

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """c, a, b in seconds; none is negative, whatever noise makes of the fit."""
        return self._c, max(0.0, float(self._theta[0])), max(0.0, float(self._theta[1]))


@dataclass(frozen=True, slots=True)
class Choice:
    """What is loaded of a found prefix, and what that was estimated to cost.

    Attributes:
        blocks: to load; the rest is computed.
        skipped: found, but computed because that is cheaper.
        load_s: to load them.
        compute_s: to compute what is not loaded.
    """

    blocks: int
    skipped: int
    load_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Ahead:
    """What goes before a load.

    Attributes:
        blocks: of other loads that are under way.
        rising_s: seconds until the flash tier has done what was asked of it before; math.inf if
            it shall not be asked for more.
        asked: leading blocks that do not wait for that, since they were asked for themselves.
    """

    blocks: int = 0
    rising_s: float = 0.0
    asked: int = 0


def decision_of(choice: Choice) -> str:
    """ "load" all that was found, "part" of it, or "compute" it."""
    return "compute" if not choice.blocks else "part" if choice.skipped else "load"


class CostModel:
    """Measured rates of one worker and the decisions that follow. Used by one thread.

    Args:
        block_bytes: bytes of a block.
        block_tokens: tokens of a block.

    Attributes:
        rates: tier -> rate of loads.
        store: rate of stores.
        prefill: the computation.
    """

    def __init__(self, block_bytes: int, block_tokens: int) -> None:
        self.rates = {tier: Rate(prior) for tier, prior in PRIOR_BYTES_PER_S.items()}
        self.store = Rate(PRIOR_BYTES_PER_S["dram"])
        self.prefill = Prefill()
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._avoided = 0

    def choose(
        self, first: int, tiers: Sequence[str], tokens: int, ahead: Ahead, alone: bool,
        followed: bool = False,
    ) -> Choice:  # fmt: skip
        """Decide how much of a found prefix is loaded; tell `decided` when that is done.

        Args:
            first: position where the found blocks begin.
            tiers: of each found block.
            tokens: of the whole sequence.
            ahead: what goes first.
            alone: nobody is held up when the load takes longer than the computation.
            followed: what is on flash rises beside the computation, as far as that is no longer;
                the rest of the rise is waited for in the queue, where it holds up nobody.
        """
        risen = np.array([0, *np.cumsum([tier == "flash" for tier in tiers])])
        waits = (risen > 0) & (np.arange(len(risen)) > ahead.asked)
        load_s = self._load_s(tiers, ahead.blocks) + np.where(waits, ahead.rising_s, 0.0)
        compute_s = self._compute_s(first, len(tiers), tokens)
        is_late = (load_s > compute_s) & (not alone)
        is_serial = np.where(risen > 0, not followed, is_late)
        total = np.where(is_serial, load_s + compute_s, np.maximum(load_s, compute_s))
        # Of those that are about as good the longest: it leaves the cores to others.
        best = int(np.flatnonzero(total <= MARGIN * total.min())[-1])
        known = self.prefill.steps and all(self.rates[tier].measured for tier in set(tiers))
        # With others before it there is more to wait for than one slow load, and they are a trial.
        is_next = not 0 < ahead.rising_s < math.inf
        if not known or (self._avoided >= TRY_AGAIN and is_next):
            best = int(np.flatnonzero(total < math.inf)[-1])
        return Choice(best, len(tiers) - best, float(load_s[best]), float(compute_s[best]))

    def decided(self, choice: Choice) -> None:
        """A choice is being carried out."""
        if choice.skipped:
            self._avoided += 1
        elif self._avoided >= TRY_AGAIN:
            self._avoided = 0

    def loaded(self, tiers: Sequence[str], seconds: float) -> None:
        """Blocks of these tiers have come, in so long; where they were when they were found."""
        flash = sum(tier == "flash" for tier in tiers)
        # While one rises others are copied, so the slower tier is what the time was spent on.
        tier, blocks = ("flash", flash) if flash else ("dram", len(tiers))
        self.rates[tier].add(blocks * self._block_bytes, seconds)

    def late(self, tiers: Sequence[str], seconds: float, given_up: bool = True) -> None:
        """Blocks of these tiers had not all risen in so long: flash is no faster than that.

        Args:
            given_up: they are waited for no more, which is long after the estimate; else it may
                have been a moment, and the mean is halved at most.
        """
        flash = sum(tier == "flash" for tier in tiers)
        weight = 1.0 if given_up else WEIGHT_MAX
        self.rates["flash"].late(flash * self._block_bytes, seconds, weight)

    def block_s(self, tier: str) -> float:
        """Seconds that a block of a tier takes."""
        return self._block_bytes / self.rates[tier].bytes_per_s

    def stored(self, blocks: int, seconds: float) -> None:
        """So many blocks were copied in, in so long."""
        self.store.add(blocks * self._block_bytes, seconds)

    def break_even_tokens(self, tier: str) -> float:
        """Length of a prefix from which loading it all from a tier beats computing it.

        Whole blocks; math.inf when no length does, up to LENGTH_MAX.
        """
        _, a, b = self.prefill.coefficients
        gain = a - self._block_bytes / self._block_tokens / self.rates[tier].bytes_per_s
        if gain <= 0 and not b:
            return math.inf
        root = math.sqrt(gain**2 + 2 * b * START_S)
        # gain * n + b * n^2 / 2 = START_S, in the form that does not cancel.
        tokens = 2 * START_S / (gain + root) if gain > 0 else (root - gain) / b
        if tokens > LENGTH_MAX:
            return math.inf
        return max(1, math.ceil(tokens / self._block_tokens)) * self._block_tokens

    def rates_shown(self) -> dict[str, int]:
        """What was measured, by name of proto.shm.RATES."""
        shown: dict[str, float] = {}
        for tier, rate in self.rates.items():
            if rate.measured:
                shown[f"load_bytes_per_s.{tier}"] = rate.bytes_per_s
        if self.store.measured:
            shown["store_bytes_per_s.dram"] = self.store.bytes_per_s
        if self.prefill.steps:
            for tokens in (512, 2048, 8192):
                seconds = float(self.prefill.seconds(tokens, tokens**2 / 2))
                shown[f"prefill_tokens_per_s.{tokens}"] = tokens / seconds
            for tier, rate in self.rates.items():
                if rate.measured:
                    shown[f"break_even_tokens.{tier}"] = self.break_even_tokens(tier)
        return {
            name: NEVER if value == math.inf else max(1, round(value))
            for name, value in shown.items()
        }

    def _load_s(self, tiers: Sequence[str], queued: int) -> npt.NDArray[np.float64]:
        """Seconds to load the first 0, 1, ... blocks."""
        seconds = {tier: self.block_s(tier) for tier in set(tiers)}
        each = [seconds[tier] for tier in tiers]
        waits = START_S + queued * self.block_s("dram")
        out = np.cumsum([waits, *each])
        out[0] = 0.0
        return out

    def _compute_s(self, first: int, blocks: int, tokens: int) -> npt.NDArray[np.float64]:
        """Seconds to compute what is left when the first 0, 1, ... blocks are loaded."""
        start = first + np.arange(blocks + 1) * self._block_tokens
        return self.prefill.seconds(tokens - start, (tokens**2 - start**2) / 2)
