"""Single flight: two engines that need the same missing prefix at once compute it once.

Who is about to compute a block claims it; the sidecar grants it to the first, and everybody sees
in shared memory to whom (core/claims). A request whose next block is being computed by another
engine waits for it, and those behind it pass:

    asking     it has claimed its first missing block and waits for the answer, CLAIM_WAIT_S at most
    waiting    another engine has it. As its blocks are stored, the request's first missing block
               moves on; it waits as long as that one is claimed too
    no more    the block it waits for is claimed by nobody: stored, or given up. Or its patience is
               over: the time that it would need to compute what is missing, as measured here

A request waits before it has a page or more than the one claim that it asks for, and claims more
only while it computes, which waits for nobody: so no two requests can wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvist.cachesvc.client import Claimant
from kvist.engine.cache import Cache
from kvist.engine.sequence import Sequence, State
from kvist.proto.keys import BlockKey

# A claim is granted in a fraction of a millisecond, unless the sidecar is busy or away.
CLAIM_WAIT_S = 0.005
# What takes less than a few such waits to compute is not worth one.
WORTH_S = 4 * CLAIM_WAIT_S
# Until a prompt was computed here, nothing is known about how long that takes.
UNMEASURED_S = 1.0
# Blocks claimed ahead of those computed: more than a step completes, so that no gap opens between
# what is stored and what is claimed.
WINDOW_BLOCKS = 64
# Weight of the latest prompt piece in the measured rate.
RATE_WEIGHT = 0.3
# Pieces of a prompt that are shorter say more about decoding than about prompts.
RATE_TOKENS_MIN = 64


@dataclass(slots=True)
class _Wait:
    """A request that asks or waits.

    Attributes:
        key: its first missing block, when it asked last.
        asked_s: when it asked for the key; None while it waits for another engine.
        since_s: when it began to wait; None while it has not.
        until_s: when its patience ends.
        first: leading blocks that it could have had when it began.
        late: the block that it waited for was given up.
    """

    key: BlockKey
    asked_s: float | None
    since_s: float | None
    until_s: float
    first: int
    late: bool = False


@dataclass(slots=True)
class _Flight:
    """A request that computes.

    Attributes:
        claimed: blocks before this one were claimed, or are cached.
        computed: positions that were computed when it was seen last.
        at_s: when that was; None when it was loading.
    """

    sequence: Sequence
    claimed: int
    computed: int
    at_s: float | None


class Flights:
    """Used by the core's thread only.

    Args:
        cache: where claims are seen.
        now: clock, seconds.

    Attributes:
        tokens_per_s: prompt tokens that a request here computes, measured; 0 when it was not.
    """

    def __init__(self, cache: Cache, now: Callable[[], float]) -> None:
        self._cache = cache
        self._now = now
        self._waits: dict[Sequence, _Wait] = {}
        self._flights: dict[Sequence, _Flight] = {}
        self.tokens_per_s = 0.0

    @property
    def waiting(self) -> int:
        """Requests that ask or wait."""
        return len(self._waits)

    def patience_s(self, tokens: int) -> float:
        """How long to wait for tokens at most: as long as it takes to compute them."""
        return tokens / self.tokens_per_s if self.tokens_per_s else UNMEASURED_S

    def defers(self, sequence: Sequence, blocks: int) -> bool:
        """Whether a request that could be admitted now shall wait; asked again in each step.

        Args:
            sequence: may reuse blocks.
            blocks: leading blocks that are in the pool.
        """
        keys = sequence.keys()[: sequence.usable_blocks]
        wait = self._waits.get(sequence)
        if blocks >= len(keys) or (wait is None and self._cache.claimant(keys[blocks]) == "alone"):
            return self._end(sequence, blocks)
        # First who claims it, then whether it is there: a block is stored before its claim ends.
        there = blocks + self._cache.lookup(keys[blocks:]).blocks
        while there < len(keys):
            claimant = self._cache.claimant(keys[there])
            now_there = blocks + self._cache.lookup(keys[blocks:]).blocks
            if now_there <= there:
                return self._decide(sequence, keys[there], there, claimant)
            there = now_there
        return self._end(sequence, there)

    def _decide(self, sequence: Sequence, key: BlockKey, there: int, claimant: Claimant) -> bool:
        """See defers.

        Args:
            key: of its first missing block, after so many that are there.
        """
        wait, now = self._waits.get(sequence), self._now()
        if wait is None:
            missing = sequence.prompt_tokens - there * sequence.limits.block_tokens
            patience_s = self.patience_s(missing)
            if patience_s < WORTH_S:
                return False
            wait = self._waits[sequence] = _Wait(key, None, None, now + patience_s, there)
        waited = wait.since_s is not None and wait.asked_s is None
        if wait.key != key:
            wait.key, wait.asked_s, wait.late = key, None, False
        elif waited and claimant != "other":
            wait.late = True
        if claimant == "other":
            wait.since_s = now if wait.since_s is None else wait.since_s
            wait.asked_s = None
            wait.late = now >= wait.until_s
            return not wait.late or self._end(sequence, there)
        if claimant == "none":
            if wait.asked_s is None:
                wait.asked_s = now
                self._cache.claim([key])
            if now - wait.asked_s < CLAIM_WAIT_S:
                return True
        return self._end(sequence, there)

    def _end(self, sequence: Sequence, there: int) -> bool:
        """The request waits no more; always False."""
        wait = self._waits.pop(sequence, None)
        if wait is not None and wait.since_s is not None:
            self._cache.count_flight((there - wait.first) * sequence.limits.block_tokens)
            sequence.flight_late = wait.late
        return False

    def computing(self, sequence: Sequence, loading: int = 0) -> None:
        """What a request computes next is claimed; called when it begins and after its steps.

        Args:
            loading: blocks that are on their way into its pages before it computes.
        """
        last = sequence.prompt_tokens // sequence.limits.block_tokens
        first = sequence.registered + loading
        flight = self._flights.get(sequence)
        if flight is None:
            if first >= last or self._cache.claimant(sequence.keys()[0]) == "alone":
                return
            began_s = None if loading else self._now()
            flight = _Flight(sequence, first, sequence.computed, began_s)
            self._flights[sequence] = flight
        elif not loading:
            self._measure(flight, sequence.computed)
        stop = min(first + WINDOW_BLOCKS, last)
        if flight.claimed < stop:
            self._cache.claim(sequence.keys()[flight.claimed : stop])
            flight.claimed = stop
        if first >= last:
            del self._flights[sequence]  # what is not stored yet ends with its store

    def _measure(self, flight: _Flight, computed: int) -> None:
        now, began_s = self._now(), flight.at_s
        tokens = computed - flight.computed
        flight.computed, flight.at_s = computed, now
        if began_s is not None and tokens >= RATE_TOKENS_MIN and now > began_s:
            rate, known = tokens / (now - began_s), self.tokens_per_s
            self.tokens_per_s = known + RATE_WEIGHT * (rate - known) if known else rate

    def dropped(self, sequence: Sequence, block: int) -> None:
        """A block that was computed will not be stored."""
        self._cache.release([sequence.keys()[block]])

    def prune(self) -> None:
        """Forget requests that have ended or lost their pages; their claims are given up."""
        for sequence, flight in list(self._flights.items()):
            if sequence.state in (State.FINISHED, State.WAITING):
                self._cache.release(sequence.keys()[sequence.registered : flight.claimed])
                del self._flights[sequence]
        for sequence, wait in list(self._waits.items()):
            if sequence.state is not State.WAITING:
                if wait.asked_s is not None:
                    self._cache.release([wait.key])
                del self._waits[sequence]
