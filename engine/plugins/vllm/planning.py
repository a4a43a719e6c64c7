"""The scheduler's half: which blocks of a request come from the cache and which go into it.

Everything here is a look into shared memory; no call is made, nothing waits. A request whose
blocks are partly on flash is put off (None) while they rise, for FLASH_WAIT_S at most, and then
takes what has come. A request whose load failed once is computed, whatever the cache says.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvist.cachesvc.client import CacheClient
from kvist.engine.plugins.vllm.lookups import Adapters, Load, Names, Save, digest_of, unnamed
from kvist.proto.keys import Namespace, tenant_of

# A block of 3 MB rises from a disk that is not busy in 2 to 4 ms.
FLASH_WAIT_S = 2.0


@dataclass(slots=True)
class _Tracked:
    """One request, from its first look-up to its end.

    Attributes:
        request: vLLM's, whose tokens grow.
        names: None when its blocks have none.
        local: leading blocks that vLLM has itself, at the last look-up.
        ready: blocks behind them that can be loaded.
        end: why there are no more, a miss reason.
        risen: blocks that were on flash when they were first seen.
        rise_until: until when flash is waited for; None while nothing is.
        loading: a load is under way.
        computes: a load has failed: no more from the cache.
        saved: leading blocks that need not be stored; None before its first step.
        counted: its look-up is in the accounts.
    """

    request: Any
    names: Names | None
    local: int = 0
    ready: int = 0
    end: str = "no_cache"
    risen: set[int] = field(default_factory=set)
    rise_until: float | None = None
    loading: bool = False
    computes: bool = False
    saved: int | None = None
    counted: bool = False

    def tier(self, block: int) -> str:
        """Where a block was when it was first seen."""
        return "flash" if block in self.risen else "dram"


@dataclass(frozen=True, slots=True)
class Roles:
    """What vLLM's kv_role allows."""

    loads: bool
    saves: bool


class Planner:
    """Plans of one vLLM scheduler; used by its thread only.

    Args:
        cache: closed by close.
        namespace: of the worker's blocks.
        roles: what is done at all.
    """

    def __init__(self, cache: CacheClient, namespace: Namespace, roles: Roles) -> None:
        self._cache = cache
        self._namespace = namespace
        self._roles = roles
        self._size = namespace.format.block_tokens
        self._adapters = Adapters()
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[Load] = []
        self._counts: dict[str, float] = defaultdict(float)

    # In the order in which vLLM asks.

    def arrive(self, request: Any) -> None:
        """A request has come: what of it is on flash begins to rise while it waits its turn."""
        tracked = self._track(request)
        if self._roles.loads:
            self._look(tracked, 0)

    def matched(self, request: Any, computed_tokens: int) -> int | None:
        """Tokens to load behind those that vLLM has; None: ask again. May be asked repeatedly.

        Args:
            computed_tokens: that vLLM has itself, in whole blocks.
        """
        tracked = self._track(request)
        tracked.local = computed_tokens // self._size
        if not self._roles.loads or tracked.computes:
            tracked.ready = 0
            return 0
        is_known = self._look(tracked, tracked.local)
        return tracked.ready * self._size if is_known else None

    def admitted(self, request: Any, block_ids: list[int], external_tokens: int) -> None:
        """vLLM has given a request its blocks.

        Args:
            block_ids: all blocks of the request, vLLM's numbers.
            external_tokens: of them to load; 0 is nothing.
        """
        tracked = self._track(request)
        blocks = external_tokens // self._size
        if blocks < tracked.ready:
            # vLLM does not want them all, like for a request with prompt_logprobs.
            tracked.ready, tracked.end = blocks, "no_cache"
        if blocks and tracked.names is not None:
            tokens, first = request.all_token_ids, tracked.local
            wanted = [tracked.names.wanted(tokens, first + at) for at in range(blocks)]
            load = Load(request.request_id, wanted, block_ids[first : first + blocks])
            self._loads.append(load)
            tracked.loading = True
        elif not tracked.loading:
            self._count(tracked, 0, "")

    def sources(self, request: Any, external_tokens: int) -> dict[str, int]:
        """Tokens of a load by the tier in which their blocks were found."""
        tracked, blocks = self._track(request), external_tokens // self._size
        tiers = Counter(tracked.tier(tracked.local + at) for at in range(blocks))
        return {tier: count * self._size for tier, count in tiers.items()}

    def plan(self, output: Any) -> tuple[list[Load], list[Save]]:
        """What the worker shall bring in and take out beside a step.

        Args:
            output: vLLM's SchedulerOutput of the step, before it is added to the requests.
        """
        loads, self._loads = self._loads, []
        saves: list[Save] = []
        if self._roles.saves and self._cache.state == "attached":
            for name, tokens in output.num_scheduled_tokens.items():
                tracked = self._tracked.get(name)
                if tracked is not None and tracked.names is not None:
                    saves += self._saves(tracked, tracked.names, tokens, output)
        return loads, saves

    def loaded(self, results: Mapping[str, tuple[int, str]]) -> None:
        """Loads have ended: request id -> leading blocks that came and why no more."""
        for name, (came, reason) in results.items():
            tracked = self._tracked.get(name)
            if tracked is not None:
                tracked.loading, tracked.computes = False, bool(reason)
                self._count(tracked, came, reason)

    def finished(self, name: str) -> None:
        """A request has ended, however it did."""
        self._tracked.pop(name, None)

    def reset(self) -> None:
        """Nothing that is cached so far may be used by this engine any more, as after a change of
        its weights: from now on its blocks are of a namespace that nobody has had."""
        model = f"{self._namespace.model}/{secrets.token_hex(8)}"
        self._namespace = replace(self._namespace, model=model)
        for tracked in self._tracked.values():
            tracked.names = None  # computed in part before, so of neither namespace

    def take_counts(self) -> dict[str, float]:
        """What was looked up since the last call; see metrics.COUNTERS."""
        counts, self._counts = dict(self._counts), defaultdict(float)
        return counts

    def close(self) -> None:
        """Detach."""
        self._cache.close()

    # Behind it.

    def _track(self, request: Any) -> _Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = _Tracked(request, self._names(request))
            self._tracked[request.request_id] = tracked
        return tracked

    def _names(self, request: Any) -> Names | None:
        reason = unnamed(request, self._adapters)
        if reason:
            self._counts[f"unnamed_requests.{reason}"] += 1
            return None
        digest = digest_of(self._namespace, request, self._adapters)
        payload = self._namespace.format.payload_bytes
        return Names(digest, self._size, request.cache_salt or "", payload)

    def _look(self, tracked: _Tracked, local: int) -> bool:
        """Look up what is behind the blocks that vLLM has; False while it rises from flash."""
        tracked.ready, tracked.end = 0, "no_cache"
        if tracked.names is None:
            return True
        # The last token is always computed, for its logits.
        usable = (tracked.request.num_tokens - 1) // self._size
        tokens = tracked.request.all_token_ids
        asked = tracked.names.keys(tokens)[local:usable]
        if not asked:
            return True
        found = self._cache.lookup(asked, None if local else tracked.names.first(tokens))
        tiers = self._cache.tiers(asked[: found.blocks])
        # Should a found block be gone before its tier was read, it was evicted in between.
        tracked.ready, tracked.end = len(tiers), found.reason or "evicted"
        if "flash" not in tiers:
            return True
        tracked.risen |= {local + at for at, tier in enumerate(tiers) if tier == "flash"}
        if tracked.rise_until is None:
            tracked.rise_until = time.monotonic() + FLASH_WAIT_S
            self._cache.prefetch(asked, len(tiers))
        if time.monotonic() < tracked.rise_until:
            return False
        tracked.ready, tracked.end = tiers.index("flash"), "flash_late"
        return True

    def _saves(self, tracked: _Tracked, names: Names, scheduled: int, output: Any) -> list[Save]:
        """Blocks that are full after a step and whose tokens are known.

        With steps under way the last sampled tokens are not: their block is stored a step later.
        """
        request = tracked.request
        tokens = request.all_token_ids
        full = min(request.num_computed_tokens + scheduled, request.num_tokens) // self._size
        if tracked.saved is None:
            # What vLLM has itself and the cache has not any more is stored again: without it no
            # child of it could be.
            tracked.saved = self._cache.lookup(names.keys(tokens)).blocks
        first, tracked.saved = tracked.saved, max(full, tracked.saved)
        if first >= full:
            return []
        (blocks,) = output.kv_connector_block_state.get_block_ids(request.request_id)
        return [Save(names.item(tokens, at), blocks[at]) for at in range(first, full)]

    def _count(self, tracked: _Tracked, came: int, reason: str) -> None:
        """Account for a request's prompt, at its first admission only."""
        if tracked.counted:
            return
        tracked.counted = True
        size, prompt = self._size, tracked.request.num_prompt_tokens
        usable = (prompt - 1) // size
        local = min(tracked.local, usable)
        hits = Counter({"hbm": local * size})
        for at in range(came):
            hits[tracked.tier(local + at)] += size
        misses = Counter({"tail": prompt - usable * size})
        misses[reason] += (tracked.ready - came) * size
        misses[tracked.end] += (usable - local - tracked.ready) * size
        tenant = tenant_of(tracked.request.cache_salt or "")
        self._cache.count(prompt, +hits, +misses, tenant)
        for tier, tokens in (+hits).items():
            self._counts[f"hit_tokens.{tier}"] += tokens
        for why, tokens in (+misses).items():
            self._counts[f"miss_tokens.{why}"] += tokens
        if tracked.names is not None:
            keys = tracked.names.keys(tracked.request.all_token_ids)
            self._cache.touch(keys, tracked.local + came)
