"""The scheduler's half: which blocks of a request come from the cache and which go into it.

Everything here is a look into shared memory; no call is made, nothing waits. A request whose
blocks are partly on flash is put off (None) while they rise, for FLASH_WAIT_S at most, and then
takes what has come. A request whose load failed once is computed, whatever the cache says.

Each worker of a tensor-parallel group has blocks of its own, with keys of its own. A block can be
loaded when every rank has its part of it, and a load has come as far as that of the worst rank.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvist.cachesvc.client import CacheClient
from kvist.engine.plugins.vllm.lookups import (
    Adapters,
    Load,
    Names,
    Save,
    digest_of,
    media_of,
    unnamed,
)
from kvist.engine.plugins.vllm.pool import PoolGauge
from kvist.proto.keys import BlockKey, Namespace, tenant_of

# A block of 3 MB rises from a disk that is not busy in 2 to 4 ms.
FLASH_WAIT_S = 2.0


@dataclass(slots=True)
class _Tracked:
    """One request, from its first look-up to its end.

    Attributes:
        request: vLLM's, whose tokens grow.
        ranks: its names, for each rank; empty when its blocks have none.
        local: leading blocks that vLLM has itself, at the last look-up.
        ready: blocks behind them that can be loaded.
        end: why there are no more, a miss reason.
        risen: blocks that were on flash when they were first seen.
        rise_until: until when flash is waited for; None while nothing is.
        loading: ranks whose load is under way.
        came: leading blocks that came to each rank whose load has ended, and why no more.
        computes: a load has failed: no more from the cache.
        saved: leading blocks that need not be stored; None before its first step.
        counted: its look-up is in the accounts.
    """

    request: Any
    ranks: tuple[Names, ...]
    local: int = 0
    ready: int = 0
    end: str = "no_cache"
    risen: set[int] = field(default_factory=set)
    rise_until: float | None = None
    loading: int = 0
    came: tuple[int, str] = (0, "")
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


@dataclass(slots=True)
class Work:
    """What one worker copies beside a step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


class Planner:
    """Plans of one vLLM scheduler; used by its thread only.

    Args:
        cache: closed by close.
        namespaces: of the blocks of each worker, by rank; of one geometry.
        roles: what is done at all.

    Attributes:
        watch: told of each block that is stored or was found, with the request, the block's place
            in it and its keys of each rank; None where nobody wants to know.
    """

    def __init__(self, cache: CacheClient, namespaces: Sequence[Namespace], roles: Roles) -> None:
        self.watch: Callable[[Any, int, list[BlockKey]], None] | None = None
        self._cache = cache
        self._namespaces = list(namespaces)
        self._roles = roles
        self._size = namespaces[0].format.block_tokens
        self._adapters = Adapters()
        self._tracked: dict[str, _Tracked] = {}
        self._put_off: dict[str, float] = {}  # request id -> since when
        self._loads: list[list[Load]] = [[] for _ in namespaces]
        self._counts: dict[str, float] = defaultdict(float)

    # In the order in which vLLM asks.

    def arrive(self, request: Any) -> None:
        """A request has come: what of it is on flash begins to rise while it waits its turn."""
        tracked = self._track(request)
        if self._roles.loads:
            self._look(tracked, 0)
            tracked.rise_until = None  # its patience begins when its turn comes

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
        self._count_rise(tracked, is_known)
        return tracked.ready * self._size if is_known else None

    def admitted(self, request: Any, block_ids: list[int], external_tokens: int) -> None:
        """vLLM has given a request its blocks.

        Args:
            block_ids: all blocks of the request, vLLM's numbers.
            external_tokens: of them to load; 0 is nothing.
        """
        tracked = self._track(request)
        tracked.rise_until = None
        self._put_off.pop(request.request_id, None)  # vLLM did not ask again: it wants nothing
        blocks = external_tokens // self._size
        if blocks < tracked.ready:
            # vLLM does not want them all, like for a request with prompt_logprobs.
            tracked.ready, tracked.end = blocks, "no_cache"
        if blocks and tracked.ranks:
            tokens, first = request.all_token_ids, tracked.local
            into = block_ids[first : first + blocks]
            for loads, names in zip(self._loads, tracked.ranks, strict=True):
                wanted = [names.wanted(tokens, first + at) for at in range(blocks)]
                loads.append(Load(request.request_id, wanted, into))
            tracked.loading, tracked.came = len(tracked.ranks), (blocks, "")
        elif not tracked.loading:
            self._count(tracked, 0, "")

    def sources(self, request: Any, external_tokens: int) -> dict[str, int]:
        """Tokens of a load by the tier in which their blocks were found."""
        tracked, blocks = self._track(request), external_tokens // self._size
        tiers = Counter(tracked.tier(tracked.local + at) for at in range(blocks))
        return {tier: count * self._size for tier, count in tiers.items()}

    @property
    def rising(self) -> bool:
        """Whether a request is put off while its blocks rise from flash."""
        return bool(self._put_off)

    def plan(self, output: Any) -> list[Work]:
        """What each worker shall bring in and take out beside a step.

        Args:
            output: vLLM's SchedulerOutput of the step, before it is added to the requests.
        """
        works = [Work(loads) for loads in self._loads]
        self._loads = [[] for _ in self._namespaces]
        if self._roles.saves and self._cache.state == "attached":
            for name, tokens in output.num_scheduled_tokens.items():
                tracked = self._tracked.get(name)
                if tracked is not None and tracked.ranks:
                    self._save(tracked, tokens, output, works)
        return works

    def loaded(self, results: Mapping[str, Sequence[tuple[int, str]]]) -> None:
        """Loads have ended: request id -> for each rank that says so, leading blocks that came and
        why no more. Ranks may say it in different steps."""
        for name, ended in results.items():
            tracked = self._tracked.get(name)
            if tracked is not None and tracked.loading:
                tracked.loading -= len(ended)
                tracked.came = min(tracked.came, *ended, key=lambda one: one[0])
                if not tracked.loading:
                    self._end_load(tracked, *tracked.came)

    def _end_load(self, tracked: _Tracked, came: int, reason: str) -> None:
        if reason:
            tracked.computes = True
            # What is computed is stored, though the index may still show what could not be loaded.
            tracked.saved = tracked.local + came
        self._count(tracked, came, reason)

    def finished(self, name: str) -> None:
        """A request has ended, however it did."""
        self._tracked.pop(name, None)
        self._put_off.pop(name, None)

    def reset(self) -> None:
        """Nothing that is cached so far may be used by this engine any more, as after a change of
        its weights: from now on its blocks are of a namespace that nobody has had."""
        nonce = secrets.token_hex(8)
        self._namespaces = [replace(one, model=f"{one.model}/{nonce}") for one in self._namespaces]
        for tracked in self._tracked.values():
            tracked.ranks = ()  # computed in part before, so of neither namespace

    def tell(self, gauge: PoolGauge) -> None:
        """Go on with telling how full vLLM's own pool is."""
        gauge.step(self._cache, len(self._namespaces))

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

    def _names(self, request: Any) -> tuple[Names, ...]:
        reason = unnamed(request, self._adapters)
        if reason:
            self._counts[f"unnamed_requests.{reason}"] += 1
            return ()
        salt, media = request.cache_salt or "", media_of(request)
        return tuple(
            Names(digest_of(one, request, self._adapters), one.format, salt, media)
            for one in self._namespaces
        )

    def _look(self, tracked: _Tracked, local: int) -> bool:
        """Look up what is behind the blocks that vLLM has; False while it rises from flash."""
        tracked.ready, tracked.end = 0, "no_cache"
        # The last token is always computed, for its logits.
        usable = (tracked.request.num_tokens - 1) // self._size
        if not tracked.ranks or usable <= local:
            return True
        tokens = tracked.request.all_token_ids
        asked = [names.keys(tokens)[local:usable] for names in tracked.ranks]
        tiers, tracked.end = self._find(tracked, asked, local)
        tracked.ready = len(tiers)
        if "flash" not in tiers:
            return True
        tracked.risen |= {local + at for at, tier in enumerate(tiers) if tier == "flash"}
        if tracked.rise_until is None:
            tracked.rise_until = time.monotonic() + FLASH_WAIT_S
            for keys in asked:
                self._cache.prefetch(keys, len(tiers))
        if time.monotonic() < tracked.rise_until:
            return False
        tracked.ready, tracked.end = tiers.index("flash"), "flash_late"
        return True

    def _find(
        self, tracked: _Tracked, asked: list[list[BlockKey]], local: int
    ) -> tuple[list[str], str]:
        """Where each of the leading blocks is that every rank has, and why there are no more."""
        tiers: list[str] | None = None
        end = ""
        for keys, names in zip(asked, tracked.ranks, strict=True):
            first = None if local else names.first(tracked.request.all_token_ids)
            found = self._cache.lookup(keys, first)
            own = self._cache.tiers(keys[: found.blocks])
            if tiers is None or len(own) < len(tiers):
                # Should a found block be gone before its tier was read, it was evicted in between.
                end = found.reason or "evicted"
            pairs = zip(own if tiers is None else tiers, own, strict=False)
            tiers = ["flash" if "flash" in pair else "dram" for pair in pairs]
        return tiers or [], end

    def _count_rise(self, tracked: _Tracked, is_known: bool) -> None:
        """Account for a request that is put off, and for how long it was."""
        name = tracked.request.request_id
        if not is_known and name not in self._put_off:
            self._put_off[name] = time.monotonic()
            self._counts["rise_waits"] += 1
        elif is_known and name in self._put_off:
            self._counts["rise_wait_seconds"] += time.monotonic() - self._put_off.pop(name)

    def _save(self, tracked: _Tracked, scheduled: int, output: Any, works: Sequence[Work]) -> None:
        """Plan to store the blocks that are full after a step and whose tokens are known.

        With steps under way the last sampled tokens are not: their block is stored a step later.
        """
        request = tracked.request
        tokens = request.all_token_ids
        full = min(request.num_computed_tokens + scheduled, request.num_tokens) // self._size
        if tracked.saved is None:
            # What vLLM has itself and the cache has not any more is stored again: without it no
            # child of it could be.
            tracked.saved = min(
                self._cache.lookup(names.keys(tokens)).blocks for names in tracked.ranks
            )
        first, tracked.saved = tracked.saved, max(full, tracked.saved)
        if first >= full:
            return
        (blocks,) = output.kv_connector_block_state.get_block_ids(request.request_id)
        for work, names in zip(works, tracked.ranks, strict=True):
            work.saves += [Save(names.item(tokens, at), blocks[at]) for at in range(first, full)]
        self._watch(tracked, range(first, full))

    def _watch(self, tracked: _Tracked, blocks: range) -> None:
        if self.watch is not None and blocks and tracked.ranks:
            chains = [names.keys(tracked.request.all_token_ids) for names in tracked.ranks]
            for at in blocks:
                self.watch(tracked.request, at, [keys[at] for keys in chains])

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
        self._watch(tracked, range(tracked.local, tracked.local + came))
        for names in tracked.ranks:
            self._cache.touch(names.keys(tracked.request.all_token_ids), tracked.local + came)
