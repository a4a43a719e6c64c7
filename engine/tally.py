"""The account of lookups: every prompt token once, as a hit of a tier or a miss with a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kvist.engine.request import CachedTokens
from kvist.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Lookup:
    """How one request's lookup ended, in tokens; requested = sum(hits) + sum(misses).

    Attributes:
        requested: tokens of the prompt.
        hits: tier -> tokens, none of them 0.
        misses: reason -> tokens, none of them 0.
    """

    requested: int
    hits: Counter[str]
    misses: Counter[str]

    @property
    def cached(self) -> CachedTokens:
        """The hits as a request's deltas tell them."""
        return CachedTokens(self.hits["hbm"], self.hits["dram"], self.hits["flash"])


def hit_tiers(sequence: Sequence, loaded: int) -> tuple[str, ...]:
    """Where the first blocks of `found` were when their request arrived, "dram" or "flash"."""
    found = enumerate(sequence.found[:loaded], sequence.registered)
    return tuple("flash" if block in sequence.rose else tier for block, tier in found)


def outcome(sequence: Sequence, loaded: int, reason: str) -> Lookup:
    """Say what became of each token of a prompt that has just been admitted.

    Args:
        sequence: with `registered` blocks from the pool, before the loaded ones are added.
        loaded: blocks that came from the cache.
        reason: why the others of `found` did not.
    """
    size = sequence.limits.block_tokens
    usable, found = sequence.usable_blocks, sequence.found
    hits = Counter({"hbm": sequence.registered * size})
    for tier in hit_tiers(sequence, loaded):
        hits[tier] += size
    misses = Counter({"tail": sequence.prompt_tokens - usable * size})
    misses[reason] += (len(found) - loaded) * size
    skipped = sequence.choice.skipped if sequence.choice is not None else 0
    misses["cheaper"] += skipped * size
    misses[sequence.found_end] += (usable - sequence.registered - len(found) - skipped) * size
    return Lookup(sequence.prompt_tokens, +hits, +misses)


class Tally:
    """Running totals over all lookups.

    Attributes:
        queries_tokens: prompt tokens looked up.
        hits_tokens: by tier.
        misses_tokens: by reason.
    """

    def __init__(self) -> None:
        self.queries_tokens = 0
        self.hits_tokens: Counter[str] = Counter()
        self.misses_tokens: Counter[str] = Counter()

    def add(self, lookup: Lookup) -> None:
        """Count one lookup."""
        self.queries_tokens += lookup.requested
        self.hits_tokens.update(lookup.hits)
        self.misses_tokens.update(lookup.misses)
