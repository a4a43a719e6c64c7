"""What an engine asks of the cache beyond its pool: the contract of CacheClient's half of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvist.cachesvc.client import Claimant, Found
from kvist.cachesvc.worker.loading import LayerLoad
from kvist.cachesvc.worker.storing import StoreItem, StoreResult
from kvist.proto.hints import NO_HINT, Hint
from kvist.proto.keys import BlockKey
from kvist.proto.record import Bytes, Wanted
from kvist.transfer.device import Target
from kvist.transfer.pace import Pace


class Cache(Protocol):
    """The part of CacheClient that an engine uses; see there for threads and meaning."""

    reattaches: int
    pace: Pace

    @property
    def state(self) -> str:
        """ "attached" or "detached"."""
        ...

    def lookup(self, keys: Sequence[BlockKey], first: tuple[bytes, bytes] | None = None) -> Found:
        """Longest cached prefix; makes no call."""
        ...

    def tiers(self, keys: Sequence[BlockKey]) -> tuple[str, ...]:
        """Tier of each block of the longest cached prefix; makes no call."""
        ...

    def touch(self, keys: Sequence[BlockKey], blocks: int, hint: Hint = NO_HINT) -> None:
        """The first blocks were used; and what the request's sender says."""
        ...

    def prefetch(self, keys: Sequence[BlockKey], blocks: int, follow: bool = False) -> None:
        """The first blocks shall rise from flash; side by side when they are to be streamed
        meanwhile."""
        ...

    def risen(self, key: BlockKey) -> int | None:
        """Bytes of a block's record that can be streamed now, None if it is not on its way; makes
        no call."""
        ...

    def claim(self, keys: Sequence[BlockKey]) -> None:
        """These blocks are being computed here; makes no call."""
        ...

    def release(self, keys: Sequence[BlockKey]) -> None:
        """These blocks will not come from here; makes no call."""
        ...

    def claimant(self, key: BlockKey) -> Claimant:
        """Who is computing a block; makes no call."""
        ...

    def count_flight(self, tokens: int) -> None:
        """Account for one wait for another engine; tokens are those that came by it."""
        ...

    def show_rates(self, rates: Mapping[str, int]) -> None:
        """Say what was measured here; makes no call."""
        ...

    def load(self, wanted: Wanted, out: Bytes | Target, deadline: float) -> str | None:
        """Copy and verify one block; a miss reason when that failed."""
        ...

    def stream(self, load: LayerLoad) -> tuple[int, str]:
        """Copy blocks that are in DRAM, or rise, layer by layer and verify them at the end; how
        many came and why no more."""
        ...

    def store(self, items: Sequence[StoreItem]) -> StoreResult:
        """Copy blocks in, parents before children."""
        ...

    def count(
        self,
        requested_tokens: int,
        hits: Mapping[str, int],
        misses: Mapping[str, int],
        tenant: str = "",
    ) -> None:
        """Account for one request."""
        ...

    def measured(
        self, counts: Mapping[str, int], by_tenant: Mapping[str, Mapping[str, int]]
    ) -> None:
        """Say what was measured since the last time; makes no call."""
        ...

    def close(self) -> None:
        """Detach."""
        ...
