"""Which blocks of this vLLM are in the cache now, and what has changed since the last look.

Blocks that are being stored and blocks that were found are watched. A look asks the shared index
for a few of them, in turn, so it makes no call and costs the same however many are watched; what
the sidecar evicts, or moves between DRAM and flash, is noticed when its turn comes.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from kvist.cachesvc.client import CacheClient
from kvist.proto.keys import BlockKey

# Looked up at each look, of those that are awaited and of those that are held: 64 probes of 2 us.
LOOKS = 32
# Until a block that is being stored must be there; the queue of a sidecar that hangs is longer.
STORE_PATIENCE_S = 30.0
# A sidecar that is away for longer than this takes its blocks with it.
RESTART_S = 10.0
# About 1 KB each. Whoever holds more tells of the blocks that were told of or seen last.
HELD_MAX = 50_000

Block = TypeVar("Block", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Change(Generic[Block]):
    """A block came, went, or moved.

    Attributes:
        before, now: "dram" or "flash"; None is nowhere.
    """

    block: Block
    before: str | None
    now: str | None


@dataclass(slots=True)
class _Awaited(Generic[Block]):
    block: Block
    keys: Sequence[BlockKey]
    until: float


class Held(Generic[Block]):
    """Blocks watched by one scheduler, and used by its thread only.

    Args:
        cache: asked where blocks are.
        now: clock, seconds.
    """

    def __init__(
        self, cache: CacheClient, now: Callable[[], float] = time.monotonic, most: int = HELD_MAX
    ) -> None:
        self._cache = cache
        self._now = now
        self._most = most
        self._awaited: deque[_Awaited[Block]] = deque()
        self._held: OrderedDict[Block, tuple[Sequence[BlockKey], str]] = OrderedDict()
        self._forgotten: list[Change[Block]] = []
        self._detached_s: float | None = None  # since when; None while attached

    def watch(self, block: Block, keys: Sequence[BlockKey]) -> None:
        """Watch a block from now on; one that is watched already stays as it is.

        Args:
            block: what to tell of.
            keys: its key of each rank; it is held when all are.
        """
        if block not in self._held:
            self._awaited.append(_Awaited(block, keys, self._now() + STORE_PATIENCE_S))

    def look(self) -> list[Change[Block]]:
        """What changed, as far as it was this look's turn; in the order in which it was watched."""
        if self._cache.state == "attached":
            self._detached_s = None
        elif self._is_back_soon():
            return []
        held = [(block, self._tier(keys)) for block, (keys, _) in islice(self._held.items(), LOOKS)]
        awaited = [(one, self._tier(one.keys)) for one in islice(self._awaited, LOOKS)]
        if self._detached_s is None and self._cache.state != "attached":
            return []  # it went meanwhile, and what was seen since is nothing
        changes, self._forgotten = self._forgotten, []
        changes += self._seen(held)
        changes += self._arrived(awaited)
        while len(self._held) > self._most:
            block, (_, before) = self._held.popitem(last=False)
            changes.append(Change(block, before, None))
        return changes

    def _seen(self, held: Sequence[tuple[Block, str | None]]) -> Iterator[Change[Block]]:
        for block, tier in held:
            keys, before = self._held.pop(block)
            if tier is not None:
                self._held[block] = keys, tier  # to the end: its turn is over
            if tier != before:
                yield Change(block, before, tier)

    def _arrived(
        self, awaited: Sequence[tuple[_Awaited[Block], str | None]]
    ) -> Iterator[Change[Block]]:
        for one, tier in awaited:
            self._awaited.popleft()
            if tier is None and self._now() < one.until:
                self._awaited.append(one)
            elif tier is not None and one.block not in self._held:
                self._held[one.block] = one.keys, tier
                yield Change(one.block, None, tier)

    def _is_back_soon(self) -> bool:
        """Whether the sidecar may just be restarting: what is on flash is there again after it."""
        now = self._now()
        self._detached_s = self._detached_s if self._detached_s is not None else now
        return now - self._detached_s < RESTART_S

    def forget(self) -> None:
        """All of them are of no use to this vLLM any more; the next look says that they went."""
        self._forgotten += [Change(block, tier, None) for block, (_, tier) in self._held.items()]
        self._held.clear()
        self._awaited.clear()

    def _tier(self, keys: Sequence[BlockKey]) -> str | None:
        tiers = [self._cache.tiers([key]) for key in keys]
        if not all(tiers):
            return None
        return "flash" if ("flash",) in tiers else "dram"
