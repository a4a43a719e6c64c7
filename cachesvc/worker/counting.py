"""The account of a worker's requests: every prompt token once, with a session or without."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping

from kvist.cachesvc.worker.life import Life

# While detached so many tenants are told apart; the others count together.
TENANTS_KEPT = 64


def account(hits: Mapping[str, int], misses: Mapping[str, int]) -> dict[str, int]:
    """One request's account, by name of proto.shm.TENANT_COUNTERS."""
    counts = {"lookups": 1}
    counts.update((f"hit_tokens.{tier}", tokens) for tier, tokens in hits.items())
    counts.update((f"miss_tokens.{reason}", tokens) for reason, tokens in misses.items())
    return counts


class Counting:
    """Puts accounts into a session's ring, and keeps them while there is none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: defaultdict[str | None, Counter[str]] = defaultdict(Counter)

    def add(
        self, life: Life | None, tenant: str, requested_tokens: int, counts: Mapping[str, int]
    ) -> None:
        """Count a request; life is entered, or None when detached."""
        if life is not None:
            life.add_for(tenant, requested_tokens, counts)
            return
        with self._lock:
            is_known = tenant in self._kept or len(self._kept) < TENANTS_KEPT
            self._kept[tenant if is_known else None].update(counts)

    def settle(self, life: Life) -> None:
        """A session has begun: tell it what was kept."""
        with self._lock:
            kept, self._kept = self._kept, defaultdict(Counter)
        for tenant, counts in kept.items():
            tokens = sum(count for name, count in counts.items() if "_tokens." in name)
            life.add_for(tenant, tokens, counts)
