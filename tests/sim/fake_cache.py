"""A cache in a dict, with the faults that a test asks for.

What may go wrong: it is detached, a block is corrupt, a block is on flash and never rises, a load
waits until it is let go. Why that is recoverable: a miss is always a right answer.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from kvist.cachesvc.client import Claimant, Found
from kvist.cachesvc.worker.loading import LayerLoad
from kvist.cachesvc.worker.storing import StoreItem, StoreResult
from kvist.proto.hints import NO_HINT, Hint
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.record import Bytes, Wanted
from kvist.proto.shm import COUNTERS, MISS_REASONS, TENANT_COUNTERS, TIERS
from kvist.transfer.device import Source, Target
from kvist.transfer.pace import Pace


class FakeCache:
    """See connector.Cache.

    Attributes:
        blocks: what is stored.
        flash: keys that are on flash; a prefetch makes them rise unless `stuck`.
        corrupt: keys whose payload does not match.
        condemned: keys that are said to be corrupt as long as they are not stored.
        elsewhere: origins of first blocks that are said to be stored under another namespace.
        stuck: nothing rises from flash; shown: bytes of each block there that can be read,
            None while they are not on their way.
        gate: loads wait for it.
        store_gate: stores wait for it.
        alone: no other engine is attached.
        claims: who is computing a block: "self", or "other" where the test says so.
        flights: tokens that each wait for another engine brought.
        counted: (requested tokens, hits, misses) of each lookup; tenants: whose it was.
        measures: what was measured; measures_of: by tenant.
    """

    def __init__(self) -> None:
        self.state = "attached"
        self.reattaches = 0
        self.pace = Pace()
        self.rates: dict[str, int] = {}
        self.blocks: dict[BlockKey, tuple[StoreItem, bytes]] = {}
        self.flash: set[BlockKey] = set()
        self.corrupt: set[BlockKey] = set()
        self.condemned: set[BlockKey] = set()
        self.elsewhere: set[bytes] = set()
        self.stuck = False
        self.gate = threading.Event()
        self.gate.set()
        self.store_gate = threading.Event()
        self.store_gate.set()
        self.counted: list[tuple[int, dict[str, int], dict[str, int]]] = []
        self.tenants: list[str] = []
        self.measures: Counter[str] = Counter()
        self.measures_of: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.touched: list[BlockKey] = []
        self.hints: list[Hint] = []
        self.prefetched: list[BlockKey] = []
        self.followed: list[BlockKey] = []
        self.shown: int | None = None
        self.batches: list[int] = []
        self.alone = True
        self.claims: dict[BlockKey, Claimant] = {}
        self.flights: list[int] = []
        self.closed = False

    def lookup(self, keys: Sequence[BlockKey], first: tuple[bytes, bytes] | None = None) -> Found:
        """See CacheClient.lookup."""
        if self.state != "attached":
            return Found(0, "detached", b"")
        blocks = len(self.tiers(keys))
        if blocks == len(keys):
            return Found(blocks, "", b"1")
        if first is not None and not blocks and first[0] in self.elsewhere:
            return Found(blocks, "namespace", b"1")
        return Found(blocks, "corrupt" if keys[blocks] in self.condemned else "never_stored", b"1")

    def tiers(self, keys: Sequence[BlockKey]) -> tuple[str, ...]:
        """See CacheClient.tiers."""
        found: list[str] = []
        for key in keys if self.state == "attached" else ():
            if key not in self.blocks:
                break
            found.append("flash" if key in self.flash else "dram")
        return tuple(found)

    def touch(self, keys: Sequence[BlockKey], blocks: int, hint: Hint = NO_HINT) -> None:
        """See CacheClient.touch."""
        self.touched += keys[:blocks]
        self.hints.append(hint)

    def prefetch(self, keys: Sequence[BlockKey], blocks: int, follow: bool = False) -> None:
        """See CacheClient.prefetch."""
        self.prefetched += keys[:blocks]
        self.followed += keys[:blocks] if follow else ()
        if not self.stuck:
            self.flash -= set(keys[:blocks])

    def risen(self, key: BlockKey) -> int | None:
        """See CacheClient.risen."""
        return self.shown if key in self.flash else 1 << 20

    def claim(self, keys: Sequence[BlockKey]) -> None:
        """See CacheClient.claim; another engine's claims stand."""
        for key in keys:
            self.claims.setdefault(key, "self")

    def release(self, keys: Sequence[BlockKey]) -> None:
        """See CacheClient.release."""
        for key in keys:
            if self.claims.get(key) == "self":
                del self.claims[key]

    def claimant(self, key: BlockKey) -> Claimant:
        """See CacheClient.claimant."""
        if self.alone or self.state != "attached":
            return "alone"
        return self.claims.get(key, "none")

    def count_flight(self, tokens: int) -> None:
        """See CacheClient.count_flight."""
        self.flights.append(tokens)

    def show_rates(self, rates: Mapping[str, int]) -> None:
        """See CacheClient.show_rates."""
        self.rates.update(rates)

    def load(self, wanted: Wanted, out: Bytes | Target, deadline: float) -> str | None:
        """See CacheClient.load."""
        assert deadline > 0
        self.gate.wait()
        if self.state != "attached":
            return "detached"
        if wanted.key in self.flash and not self.shown:
            return "flash_late"
        if wanted.key not in self.blocks:
            return "never_stored"
        _fill(out, b"\xff" * wanted.payload_bytes)  # undefined after a miss
        item, payload = self.blocks[wanted.key]
        if wanted.key in self.corrupt:
            return "corrupt"
        asked = (wanted.namespace, wanted.tokens, wanted.payload_bytes)
        if asked != (item.namespace, item.tokens, len(payload)):
            return "corrupt"
        _fill(out, payload)
        return None

    def stream(self, load: LayerLoad) -> tuple[int, str]:
        """See CacheClient.stream."""
        for block, (wanted, out) in enumerate(zip(load.wanted, load.outs, strict=True)):
            reason = self.load(wanted, out, 1.0)
            if reason is not None:
                return block, reason
        load.reached(load.cuts[-1])
        return len(load.wanted), ""

    def store(self, items: Sequence[StoreItem]) -> StoreResult:
        """See CacheClient.store."""
        self.store_gate.wait()
        self.batches.append(len(items))
        stored = present = orphans = 0
        for item in items:
            if item.key in self.blocks:
                present += 1
            elif item.parent != NO_KEY and item.parent not in self.blocks:
                orphans += 1
            else:
                self.blocks[item.key] = (item, _bytes_of(item.payload))
                self.claims.pop(item.key, None)
                stored += 1
        return StoreResult(stored, present, {"no_parent": orphans} if orphans else {})

    def count(
        self,
        requested_tokens: int,
        hits: Mapping[str, int],
        misses: Mapping[str, int],
        tenant: str = "",
    ) -> None:
        """See CacheClient.count."""
        assert requested_tokens == sum(hits.values()) + sum(misses.values())
        assert set(hits) <= set(TIERS)
        assert set(misses) <= set(MISS_REASONS)
        self.counted.append((requested_tokens, dict(hits), dict(misses)))
        self.tenants.append(tenant)

    def measured(
        self, counts: Mapping[str, int], by_tenant: Mapping[str, Mapping[str, int]]
    ) -> None:
        """See CacheClient.measured."""
        assert set(counts) <= set(COUNTERS)
        self.measures.update(counts)
        for tenant, own in by_tenant.items():
            assert set(own) <= set(TENANT_COUNTERS)
            self.measures_of[tenant].update(own)

    def close(self) -> None:
        """See CacheClient.close."""
        self.closed = True


def _fill(out: Bytes | Target, payload: bytes) -> None:
    source = np.frombuffer(payload, np.uint8)
    if isinstance(out, np.ndarray):
        out[:] = source
    else:
        out.take(source, 0, None)
        out.settle()


def _bytes_of(payload: Bytes | Source) -> bytes:
    if isinstance(payload, np.ndarray):
        return payload.tobytes()
    got = np.zeros(payload.nbytes, np.uint8)
    payload.give(got)
    payload.settle()
    return got.tobytes()
