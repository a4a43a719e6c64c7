"""Eviction: which block of a tier goes first. The contract, and the base line: leaf-LRU.

    Uses (policy/uses)    turns what workers do into requests and tells the policy of them
    Policy                     learns from requests; one for all tiers
    Order                      the candidates of one tier, in the policy's order

Only leaves go, so that no block is kept that cannot be reached. The service and `kvist cache
replay` run this code, the same objects; only what a leaf is, and what time it is, comes from them.

The policies: LeafLru here, run-ghost Gittins in cachesvc/policy/rgg.py, for hits or for saved work.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.policy.shadow import Shadow
from kvist.proto.hints import Hint

Rows: TypeAlias = NDArray[np.int64]
"""Row numbers of a chain of blocks, each standing on the one before it; first block first."""

PolicyName = Literal["rgg", "cost", "lru"]
POLICIES: tuple[PolicyName, ...] = ("rgg", "cost", "lru")

BLOCK_TOKENS = 64
EVEN_TOKENS = 30518
"""Tokens before a token that cost as much to attend to as its own share of the weights: 2 * 8.0e9
operations for the parameters of a Llama 3 8B, 4 * 4096 * 32 for each token attended to. 53,000 for
a 70B, 11,000 for a 0.5B."""

TICKS_PER_S = 32
TICK_MASK = 0xFFFFFFFF
"""Times are ticks of 1/32 s modulo 2**32, 4 bytes a row; an age is right up to 4 years."""

_DEPTH_BITS = 20
_DEPTH_MAX = (1 << _DEPTH_BITS) - 1
_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1


class Tree(Protocol):
    """The stored blocks, by row; what a policy may look up of them."""

    @property
    def parent(self) -> memoryview:
        """Row of the block before, or NO_ROW."""
        ...

    @property
    def depth(self) -> memoryview:
        """Blocks before each block."""
        ...

    def name(self, row: int) -> int:
        """64 bits that stand for the block, whatever row it may get another time."""
        ...


class History:
    """Which request used each block last, and when. 12 bytes a row; written by Uses only.

    Attributes:
        request: (rows,), int64; numbers grow with each request.
        at: (rows,), uint32, ticks.
        request_of, at_of: the same memory, for single values.
    """

    def __init__(self, rows: int) -> None:
        self.request = np.zeros(rows, np.int64)
        self.at = np.zeros(rows, np.uint32)
        self.request_of = self.request.data
        self.at_of = self.at.data


class Learner(Protocol):
    """Told of every request, as it goes on, before History is. One thread.

    A row belongs to one block from stored to removed. A request's events come in the order of
    its prompt; between two of them may come those of other requests.
    """

    def found(self, rows: Rows, request: int, at: int) -> None:
        """Blocks of a prompt were found by a request and used; mostly all the way from its first.

        Args:
            rows: a chain.
            request: that uses them; a number not heard before begins one.
            at: ticks.
        """
        ...

    def stored(self, rows: Rows, request: int, at: int) -> None:
        """New blocks go on with a prompt; the tree knows what the first of them stands on."""
        ...

    def hinted(self, rows: Rows, request: int, hint: Hint) -> None:
        """What a request's sender says of it; may be told more than once, or wrong.

        Args:
            rows: the chain that the request has found, which is told of already; what it stores
                comes after. It has found nothing where this is empty.
        """
        ...

    def restored(self, rows: Rows, at: int) -> None:
        """Blocks of an earlier life, of any prompts; they count as used by request 0."""
        ...

    def removed(self, row: int) -> None:
        """The block is in no tier any more; the tree still knows it."""
        ...


class Order(Protocol):
    """The candidates of one tier."""

    def __len__(self) -> int:
        """Rows known, some of which may turn out not to be candidates any more."""
        ...

    def __contains__(self, row: int) -> bool:
        """Whether a row is known."""
        ...

    def offer(self, row: int) -> None:
        """Something about the row has changed: it is a candidate if its copy may go now.

        A row that may not go any more need not be told of; it is dropped when it comes up.
        """
        ...

    def take(self, at: int, than: int = NO_ROW) -> int:
        """Take out the candidate that goes first.

        Args:
            at: ticks.
            than: a row that somebody waits for; leave alone what was used after it: by a later
                request, or by the same one nearer to its beginning. NO_ROW: any may go.

        Returns: its row; NO_ROW when there is no such candidate.
        """
        ...


class Policy(Learner, Protocol):
    """Learns from requests what is worth keeping.

    Attributes:
        name: of the policy.
        shadows: leaf-LRU counted beside it, one for each order; none beside leaf-LRU itself.
        block_tokens: tokens of a block, once it is known.
    """

    name: PolicyName
    shadows: list[Shadow]
    block_tokens: int

    def order(
        self, may_go: Callable[[int], bool], held: Callable[[Rows], int], capacity: int
    ) -> Order:
        """The candidates of a tier.

        Args:
            may_go: whether a row's copy in this tier may go now.
            held: how many of some rows the tier holds.
            capacity: blocks that fit the tier.
        """
        ...


class LeafLru:
    """The block used longest ago goes first; of those used together the deepest.

    All it needs is in History, so it has no memory of its own.
    """

    name: PolicyName = "lru"

    def __init__(self, tree: Tree, history: History) -> None:
        self.block_tokens = BLOCK_TOKENS
        self.shadows: list[Shadow] = []
        self._request = history.request_of
        self._depth = tree.depth

    def found(self, rows: Rows, request: int, at: int) -> None:
        """See Learner."""

    def stored(self, rows: Rows, request: int, at: int) -> None:
        """See Learner."""

    def hinted(self, rows: Rows, request: int, hint: Hint) -> None:
        """See Learner."""

    def restored(self, rows: Rows, at: int) -> None:
        """See Learner."""

    def removed(self, row: int) -> None:
        """See Learner."""

    def order(
        self,
        may_go: Callable[[int], bool],
        held: Callable[[Rows], int],  # noqa: ARG002 - see Policy
        capacity: int,  # noqa: ARG002
    ) -> LruOrder:
        """See Policy."""
        return LruOrder(self.rank, len(self._request), may_go)

    def rank(self, row: int) -> int:
        """How worthy of being kept; never falls while the row lives."""
        return self._request[row] << _DEPTH_BITS | _DEPTH_MAX - min(self._depth[row], _DEPTH_MAX)


class LruOrder:
    """Candidates by rank, exactly.

    A use is not put into the order at once; an entry that turns out to be used since is moved
    when it comes up, once for all its uses. So one take may have to move every leaf (64 ms for
    100,000 of them, all used since; 0.8 us when none was), but each of those moves stands for
    uses that cost nothing. Memory: 44 bytes a leaf, in ints, which the garbage collector does
    not visit.

    Args:
        rank: of a row; never falls while the row lives.
        rows: row numbers are below this.
        may_go: whether a row's copy in this tier may go now.
    """

    def __init__(
        self, rank: Callable[[int], int], rows: int, may_go: Callable[[int], bool]
    ) -> None:
        self._rank = rank
        self._may_go = may_go
        self._heap: list[int] = []
        self._is_in = bytearray(rows)

    def __len__(self) -> int:
        """See Order."""
        return len(self._heap)

    def __contains__(self, row: int) -> bool:
        """See Order."""
        return bool(self._is_in[row])

    def offer(self, row: int) -> None:
        """See Order."""
        if not self._is_in[row] and self._may_go(row):
            self._is_in[row] = 1
            heapq.heappush(self._heap, self._entry(row))

    def take(self, at: int, than: int = NO_ROW) -> int:  # noqa: ARG002 - see Order
        """See Order."""
        heap = self._heap
        while heap:
            entry = heap[0]
            row = entry & _ROW_MASK
            if not self._may_go(row):
                heapq.heappop(heap)
                self._is_in[row] = 0
                continue
            current = self._entry(row)
            if current != entry:
                heapq.heapreplace(heap, current)
                continue
            if than != NO_ROW and current >> _ROW_BITS >= self._rank(than):
                return NO_ROW
            heapq.heappop(heap)
            self._is_in[row] = 0
            return row
        return NO_ROW

    def _entry(self, row: int) -> int:
        return self._rank(row) << _ROW_BITS | row
