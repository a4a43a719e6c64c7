"""Shadow: what leaf-LRU would have hit, counted beside the policy that decides; and the guard.

Leaf-LRU keeps the blocks of the latest requests whole, and of one request before them the first
few: blocks that were used together go from the end of their chain. So to know what it holds it is
enough to know, per request, how many blocks were used by it last. A block that is used again
tells its last request, which either is among those held or not. Exact but for blocks that nobody
remembers (see ghosts.py), which count as misses: within 0.2 points of a simulated leaf-LRU on two
traces at six sizes. O(1) per run of blocks with the same last request.

A block that leaf-LRU holds and the policy has let go is at stake: the most that can be lost by it
is one hit. So the policy may go its own way as far as what it stakes, times the risk that leaf-LRU
hits a staked block, is covered by what it has won lately and a little more; beyond that leaf-LRU's
order holds, from one eviction to the next. The risk is learned from what became of stakes. That
bounds a loss before it is made; the guard ends one that goes on nevertheless.
"""

from __future__ import annotations

import numpy as np

# The guard. Half of what happened before 2,800 requests is forgotten. It waits until the cache has
# been turned over twice: in the fill and soon after, a policy still learns what it will win with.
# On 14 replays (2 real traces, 5 made up) waiting for 4 turnovers and a loss of 0.5 points was up
# to 0.15 points worse where the policy loses, and up to 0.17 better where it is one of the two.
_DECAY = 1 - 1 / 4096
_LOSS = 0.003
_REQUESTS_MIN = 1024
_TURNOVERS_MIN = 2
_PENALTY_REQUESTS = 1024
_PENALTY_MAX = 65536
# The stake. What 8 requests ask for may be lost, 0.2 % of what _DECAY remembers. Before anything is
# known one staked block in 4 is taken to be lost, as if seen of 1 % of the cache. On made-up traces
# of 2,500 to 12,000 requests 6 or 1/2 were as good but for chance; an allowance that had to grow
# with time first cost 4 points where a policy must lose a little to win later (agents at 2 %).
_ALLOWED_REQUESTS = 8
_RISK = 1 / 4
_RISK_OF_CAPACITY = 0.01


class Shadow:
    """Leaf-LRU's contents by request, and whether the policy beside it loses. 5 to 10 bytes a
    block.

    Attributes:
        hits: blocks that leaf-LRU would have found.
        own_hits: blocks that were found.
        asked: blocks of all requests.
        is_losing: the policy has lost 0.3 points and more lately: leaf-LRU's order shall hold.
        falls: times that this came to be so.

    Args:
        capacity: blocks that fit.
        is_guarding: leaf-LRU's order may hold; else there are figures only.
    """

    def __init__(self, capacity: int, is_guarding: bool = True) -> None:
        self._is_guarding = is_guarding
        self.hits = 0
        self.own_hits = 0
        self.asked = 0
        self.is_losing = False
        self.falls = 0
        self._capacity = capacity
        # Each request held has a block at least, unless all were used again since.
        self._size = 1 << max(10, (capacity - 1).bit_length())
        self._mask = self._size - 1
        self._blocks = np.zeros(self._size, np.int32).data
        self._staked = np.zeros(self._size, np.int32).data
        self._is_broken = bytearray(self._size)
        self._stake = 0
        self._lost = 0.0  # staked blocks that leaf-LRU then hit
        self._kept = 0.0  # and such that it dropped too
        self._newest = 0
        self._oldest = 0  # held whole
        self._whole = 0  # blocks of those
        self._part = 0  # blocks of the request before the oldest
        self._lead = 0.0
        self._weight = 0.0
        self._stored = 0
        self._since = 0
        self._penalty = _PENALTY_REQUESTS

    @property
    def points(self) -> float:
        """Points of hit ratio won over leaf-LRU lately; a request counts half after 2,800 more."""
        return 100 * self._lead / self._weight if self._weight else 0.0

    def begin(self, request: int) -> None:
        """A new request: what the one before it used is whole now."""
        self.settle()
        if request - self._oldest >= self._size:  # very many small ones
            self._shed(request - self._size + 1)
        self._blocks[request & self._mask] = 0
        self._staked[request & self._mask] = 0
        self._is_broken[request & self._mask] = 0
        self._newest = request
        self._lead *= _DECAY
        self._weight *= _DECAY
        self._lost *= _DECAY
        self._kept *= _DECAY
        self._judge(request)

    @property
    def is_cautious(self) -> bool:
        """Whether leaf-LRU's order shall hold now: the policy loses, or stakes all it may."""
        prior = _RISK_OF_CAPACITY * self._capacity
        risk = (self._lost + _RISK * prior) / (self._lost + self._kept + prior)
        allowed = _ALLOWED_REQUESTS * self.asked / max(1, self._newest)
        is_over = risk * self._stake > self._lead + allowed
        return self._is_guarding and (self.is_losing or is_over)

    def evicted(self, last: int) -> None:
        """The policy lets go a block that a request used last."""
        if last >= self._oldest and self._newest - last < self._size:
            self._staked[last & self._mask] += 1
            self._stake += 1

    def _unstake(self, last: int, blocks: int) -> int:
        """Blocks of a request are not at stake any more; how many of them were."""
        if last < self._oldest or self._newest - last >= self._size:
            return 0
        blocks = min(blocks, self._staked[last & self._mask])
        self._staked[last & self._mask] -= blocks
        self._stake -= blocks
        return blocks

    def found(self, blocks: int) -> None:
        """The policy's own hits."""
        self.own_hits += blocks
        self._lead += blocks

    def used(self, request: int, last: int, blocks: int, gone: int) -> None:
        """A request uses blocks that another one used last; the tier lacks some of them."""
        self._lost += self._unstake(last, gone)
        ours = self._take(last, blocks)
        broken, place = self._is_broken, request & self._mask
        if not broken[place]:
            self.hits += ours
            self._lead -= ours
            broken[place] = ours < blocks
        self._add(request, blocks)

    def stored(self, request: int, blocks: int) -> None:
        """A request stores blocks that nobody remembers."""
        self._is_broken[request & self._mask] = 1
        self._stored += blocks
        self._add(request, blocks)

    def forget(self, last: int, blocks: int) -> None:
        """Blocks will not be heard of again."""
        self._unstake(last, blocks)
        if self._newest - last < self._size:
            self._blocks[last & self._mask] -= blocks
            if last >= self._oldest:
                self._whole -= blocks

    def settle(self) -> None:
        """Let go what is too much."""
        while (over := self._whole + self._part - self._capacity) > 0:
            gone = min(self._part, over)
            self._part -= gone
            if gone == over:
                return
            self._shed(self._oldest + 1)

    def _shed(self, oldest: int) -> None:
        while self._oldest < oldest:
            self._part = self._blocks[self._oldest & self._mask]
            self._whole -= self._part
            self._kept += self._unstake(self._oldest, self._capacity)
            self._oldest += 1

    def _take(self, last: int, blocks: int) -> int:
        """Blocks leave their last request; how many of them leaf-LRU holds."""
        if self._newest - last >= self._size:
            return 0
        self._blocks[last & self._mask] -= blocks
        if last >= self._oldest:
            self._whole -= blocks
            return blocks
        if last == self._oldest - 1:
            held = min(self._part, blocks)
            self._part -= held
            return held
        return 0

    def _add(self, request: int, blocks: int) -> None:
        self.asked += blocks
        self._weight += blocks
        if self._newest - request < self._size:
            self._blocks[request & self._mask] += blocks
            if request >= self._oldest:
                self._whole += blocks

    def _judge(self, request: int) -> None:
        if self.is_losing:
            if request - self._since < self._penalty:
                return
            self.is_losing = False
            self._penalty = min(2 * self._penalty, _PENALTY_MAX)
            self._lead = self._weight = 0.0
            self._since = request
        elif (
            self._is_guarding
            and request - self._since >= _REQUESTS_MIN
            and self._stored >= _TURNOVERS_MIN * self._capacity
            and self._lead < -_LOSS * self._weight
        ):
            self.is_losing = True
            self.falls += 1
            self._since = request
