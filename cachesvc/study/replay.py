"""Replay: a trace against a cache of some size, with the service's own eviction.

    a block is a hit if it and all before it are cached; after each request all of its blocks are
    in, and leaves go until the cache fits again (so a block may go at once)

There is one tier, nothing takes time, and answers are not stored. Beside the policies stands OPT:
the leaf whose next use is furthest goes, which in this model no policy can beat (a block kept
from one use to the next is an interval, and dropping the interval that ends last is optimal; a
parent's next use is never later than its child's).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.policy.eviction import EVEN_TOKENS, History, PolicyName, Rows
from kvist.cachesvc.policy.rgg import make_policy
from kvist.cachesvc.policy.uses import Uses
from kvist.cachesvc.study.trace import Trace
from kvist.cachesvc.study.whatif import Estimate, WhatIf
from kvist.proto.hints import NO_HINT

Contender = PolicyName | Literal["opt"]


@dataclass(frozen=True, slots=True)
class Score:
    """What a cache would have hit.

    Attributes:
        capacity: blocks.
        blocks, tokens, work: percent of those asked for. work counts the operations of a
            prefill, which grow with the tokens before a block; see eviction.EVEN_TOKENS.
        shadow: percent of blocks that the policy says leaf-LRU had hit; None if it does not say.
        what_if: of leaf-LRU at multiples of the capacity, as estimated on the way; () for opt.
        seconds: of processor time that it took.
    """

    policy: Contender
    capacity: int
    blocks: float
    tokens: float
    work: float
    shadow: float | None
    what_if: tuple[Estimate, ...]
    seconds: float


class Cache(Protocol):
    """Something that a trace can be replayed against."""

    def request(self, at_s: float, number: int, prompt: Rows) -> int:
        """A request comes and its blocks go in; how many leading ones were there."""
        ...


class PolicyCache:
    """The blocks of a trace, in a cache run by a policy. Rows are the trace's block numbers.

    Attributes:
        policy: see eviction.Policy.
        what_if: the curve of this one tier.
    """

    def __init__(self, trace: Trace, capacity: int, policy: PolicyName, seed: int) -> None:
        self.trace = trace
        self.capacity = capacity
        history = History(trace.distinct)
        self.policy = make_policy(policy, self, history, capacity, seed)
        self._now_s = 0.0
        self.what_if = WhatIf(self, trace.distinct, [capacity])
        learners = (self.policy, self.what_if)
        self._uses = Uses(self, history, learners, lambda: self._now_s)
        self._is_in = np.zeros(trace.distinct, np.bool_)
        self._is_in_of = self._is_in.data
        self._children = np.zeros(trace.distinct, np.int32)
        self._children_of = self._children.data
        self._parent = trace.parent
        self._count = 0
        self._leaves = self.policy.order(self._may_go, len, capacity)

    # See eviction.Tree.

    @property
    def parent(self) -> memoryview:
        """Row of the block before."""
        return self.trace.parent

    @property
    def depth(self) -> memoryview:
        """Blocks before each block."""
        return self.trace.depth

    def name(self, row: int) -> int:
        """64 bits that stand for a block."""
        return self.trace.name_of(row)

    def _may_go(self, row: int) -> bool:
        return not self._children_of[row] and bool(self._is_in_of[row])

    def request(self, at_s: float, number: int, prompt: Rows) -> int:
        """See Cache."""
        self._now_s = at_s
        hits = _leading(self._is_in[prompt])
        hint = self.trace.hints.get(number, NO_HINT)
        if hits:
            self._uses.found(prompt[:hits], hint)
        elif hint != NO_HINT and len(prompt):
            self._uses.expected(self.name(int(prompt[0])), hint)
        if hits < len(prompt):
            self._store(prompt, hits)
            self._evict()
        return hits

    def _store(self, prompt: Rows, hits: int) -> None:
        new = prompt[hits:]
        self._is_in[new] = True
        self._children[new[:-1]] = 1
        self._count += len(new)
        for row in new.tolist():
            self._uses.stored(row)
        self._uses.tell_stored()
        if hits:
            before = int(prompt[hits - 1])
            self._children_of[before] += 1
            self._leaves.offer(before)
        self._leaves.offer(int(new[-1]))

    def _evict(self) -> None:
        at, take = self._uses.clock(), self._leaves.take
        while self._count > self.capacity:
            row = take(at)
            assert row != NO_ROW
            self._uses.removed(row)
            self._is_in_of[row] = False
            self._count -= 1
            parent = self._parent[row]
            if parent != NO_ROW:
                self._children_of[parent] -= 1
                self._leaves.offer(parent)


class OptCache:
    """The cache that knows what will be asked for."""

    def __init__(self, trace: Trace, capacity: int) -> None:
        self._capacity = capacity
        self._starts = trace.starts
        self._parent = trace.parent
        self._next_of_event = _next_requests(trace)
        self._next = np.zeros(trace.distinct, np.int64)
        self._next_of = self._next.data
        self._is_in = np.zeros(trace.distinct, np.bool_)
        self._is_in_of = self._is_in.data
        self._children = np.zeros(trace.distinct, np.int32)
        self._children_of = self._children.data
        self._count = 0
        self._heap: list[tuple[int, int]] = []

    def request(self, at_s: float, number: int, prompt: Rows) -> int:  # noqa: ARG002 - see Cache
        """See Cache."""
        hits = _leading(self._is_in[prompt])
        self._next[prompt] = self._next_of_event[self._starts[number] : self._starts[number + 1]]
        new = prompt[hits:]
        if len(new):
            self._is_in[new] = True
            self._children[new[:-1]] = 1
            self._count += len(new)
            if hits:
                self._children_of[int(prompt[hits - 1])] += 1
        if len(prompt):
            self._offer(int(prompt[-1]))
        while self._count > self._capacity:
            self._drop_one()
        return hits

    def _offer(self, row: int) -> None:
        if not self._children_of[row]:
            heapq.heappush(self._heap, (-self._next_of[row], row))

    def _drop_one(self) -> None:
        next_use, row = heapq.heappop(self._heap)
        is_stale = -next_use != self._next_of[row] or not self._is_in_of[row]
        if is_stale or self._children_of[row]:
            return
        self._is_in_of[row] = False
        self._count -= 1
        parent = self._parent[row]
        if parent != NO_ROW:
            self._children_of[parent] -= 1
            self._offer(parent)


def _leading(is_in: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(is_in) if is_in.all() else int(is_in.argmin())


def _next_requests(trace: Trace) -> NDArray[np.int64]:
    """For each event the request that uses its block next; one after the last if none does."""
    events = len(trace.blocks)
    request_of = np.repeat(np.arange(trace.requests), np.diff(trace.starts))
    order = np.argsort(trace.blocks, kind="stable")
    following = np.full(events, trace.requests)
    is_same = trace.blocks[order[1:]] == trace.blocks[order[:-1]]
    following[order[:-1][is_same]] = request_of[order[1:][is_same]]
    return following


def make_cache(trace: Trace, capacity: int, policy: Contender, seed: int) -> Cache:
    """A cache of that many blocks.

    Args:
        seed: of what a policy leaves to chance.
    """
    if policy == "opt":
        return OptCache(trace, capacity)
    return PolicyCache(trace, capacity, policy, seed)


def replay(
    trace: Trace, cache: Cache, progress: Callable[[int], None]
) -> tuple[NDArray[np.int64], float]:
    """Run a trace against a cache.

    Args:
        progress: told of requests done, now and then.

    Returns: hits of each request, in blocks; seconds of processor time.
    """
    hits = np.zeros(trace.requests, np.int64)
    times_s = trace.times_s.tolist()
    started = time.process_time()
    for number, at_s in enumerate(times_s):
        hits[number] = cache.request(at_s, number, trace.prompt(number))
        if not number % 512:
            progress(number)
    return hits, time.process_time() - started


def replay_policy(
    trace: Trace,
    capacity: int,
    policy: Contender,
    block_tokens: int,
    seed: int,
    progress: Callable[[int], None],
) -> Score:
    """What a cache would have hit.

    Args:
        capacity: blocks.
        block_tokens: tokens of a whole block.
        seed: of what the policy leaves to chance.
        progress: as for replay.
    """
    cache = make_cache(trace, capacity, policy, seed)
    ours = cache if isinstance(cache, PolicyCache) else None
    if ours is not None:
        ours.policy.block_tokens = block_tokens
    hits, seconds = replay(trace, cache, progress)
    lengths = np.diff(trace.starts)
    hit_tokens = np.minimum(hits * block_tokens, trace.tokens)
    before = np.arange(int(lengths.max()) + 1) * block_tokens
    # work[n]: of the first n blocks, in blocks that have nothing before them.
    work = np.concatenate([[0.0], np.cumsum(1 + before / EVEN_TOKENS)])
    shadows = ours.policy.shadows if ours else ()
    return Score(
        policy=policy,
        capacity=capacity,
        blocks=_percent(hits, lengths),
        tokens=_percent(hit_tokens, trace.tokens),
        work=_percent(work[hits], work[lengths]),
        shadow=100 * shadows[0].hits / shadows[0].asked if shadows else None,
        what_if=ours.what_if.curves[0].estimates() if ours else (),
        seconds=seconds,
    )


def _percent(part: NDArray[Any], whole: NDArray[Any]) -> float:
    return float(100 * part.sum() / max(1e-9, whole.sum()))
