"""What if a tier had another size: the hit ratio of leaf-LRU at some multiples of it, live.

SHARDS (Waldspurger et al., Efficient MRC construction with SHARDS, FAST 2015): of all blocks those
whose hashed name is below a threshold are watched, and reuse distances among them are scaled by
the sampling rate. Its correction for popular blocks that happen to be watched or not (SHARDS-adj)
is made too. The distance is that of Mattson et al. (Evaluation techniques for storage hierarchies,
1970) for leaf-LRU: blocks used by later requests, and those before it in the prompt that used it
last. A Fenwick tree over requests (BIT, Fenwick 1994) counts them.

The rate is such that SAMPLE blocks are watched out of the largest size asked for, so the memory is
bounded (4 MB for each tier) and the work is in proportion to the sample.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvist.cachesvc.policy.eviction import Rows, Tree
from kvist.proto.hints import Hint

MULTIPLES = (0.5, 1.0, 2.0, 4.0, 8.0)
# At half of the tier's size 1024 blocks are watched, and so many are counted to 3 % (1/sqrt(n)).
# The worst of 30 points of two traces was 0.57 off a full replay with 8192, 0.07 with 32768.
SAMPLE = 16384
# Older events count half, from then on.
_EVENTS_MAX = 1 << 24
_HASH_BITS = 32


@dataclass(frozen=True, slots=True)
class Estimate:
    """A point of the curve.

    Attributes:
        multiple: of the tier's size.
        capacity_blocks: that it is.
        hit_ratio: of blocks asked for, 0 to 1, with leaf-LRU.
    """

    multiple: float
    capacity_blocks: int
    hit_ratio: float


class Curve:
    """One tier's curve. Work: about 1 us for each watched block of a request.

    Args:
        capacity: blocks that fit the tier.
        sample: blocks to watch at most.

    Attributes:
        threshold: a block is watched if the high half of its name is below.
    """

    def __init__(self, capacity: int, sample: int = SAMPLE) -> None:
        largest = capacity * MULTIPLES[-1]
        rate = min(1.0, sample / largest)
        self.threshold: Final = int(rate * (1 << _HASH_BITS))
        self._rate = self.threshold / (1 << _HASH_BITS)
        self._capacity = capacity
        self._bounds = [multiple * capacity * self._rate for multiple in MULTIPLES]
        self._watched_max = int(largest * self._rate) + 1
        self._last: OrderedDict[int, int] = OrderedDict()  # name -> position, oldest first
        self._hits = [0.0] * len(MULTIPLES)
        self._seen = 0.0
        self._events = 0.0
        self._request = -1
        # Requests with watched blocks get positions; when none is left those in use are moved up.
        self._positions = 4 * self._watched_max
        self._position = 0
        self._tree = np.zeros(self._positions + 1, np.int32).data
        self._watched_upto = 0

    def count(self, events: int) -> None:
        """Blocks were asked for, watched or not."""
        self._events += events
        if self._events > _EVENTS_MAX:
            self._events /= 2
            self._seen /= 2
            self._hits = [hits / 2 for hits in self._hits]

    def use(self, names: list[int], request: int) -> None:
        """Watched blocks of a request, in the order of its prompt."""
        if not names:
            return
        if request != self._request:
            self._request = request
            self._next_position()
        last, position = self._last, self._position
        start = 0
        while start < len(names):
            owner = last.get(names[start], -1)
            stop = start + 1
            while stop < len(names) and last.get(names[stop], -1) == owner:
                stop += 1
            if owner >= 0:
                self._score(len(last) - self._upto(owner), stop - start)
                self._add(owner, start - stop)
            start = stop
        for name in reversed(names):
            last[name] = position
            last.move_to_end(name)
        self._add(position, len(names))
        self._seen += len(names)
        self._forget(len(last) - self._watched_max)

    def know(self, names: list[int]) -> None:
        """Blocks that were there at the start; nobody asked for them."""
        seen, self._seen = self._seen, 0.0
        self.use([name for name in names if name not in self._last], -2)
        self._seen = seen

    def estimates(self) -> tuple[Estimate, ...]:
        """The curve as it is now; empty before anything was asked for."""
        expected = self._events * self._rate
        if not expected:
            return ()
        # What was seen too little or too much of is popular blocks, which always hit.
        surplus = expected - self._seen
        return tuple(
            Estimate(
                multiple,
                round(multiple * self._capacity),
                round(min(1.0, max(0.0, (hits + surplus) / expected)), 4),
            )
            for multiple, hits in zip(MULTIPLES, self._hits, strict=True)
        )

    def _forget(self, blocks: int) -> None:
        """Let go the oldest, which mostly come from few requests."""
        last, of_request, request = self._last, 0, -1
        for _ in range(blocks):
            _, position = last.popitem(last=False)
            if position != request:
                if of_request:
                    self._add(request, -of_request)
                of_request, request = 0, position
            of_request += 1
        if of_request:
            self._add(request, -of_request)

    def _score(self, later: int, blocks: int) -> None:
        """Blocks of one run have distances later + 1, later + 2 and so on."""
        for place, bound in enumerate(self._bounds):
            self._hits[place] += min(blocks, max(0, int(bound) - later))

    # The Fenwick tree: watched blocks by position.

    def _add(self, position: int, blocks: int) -> None:
        tree, place, size = self._tree, position + 1, self._positions
        while place <= size:
            tree[place] += blocks
            place += place & -place

    def _upto(self, position: int) -> int:
        """Blocks at positions up to this one."""
        tree, place, blocks = self._tree, position + 1, 0
        while place:
            blocks += tree[place]
            place &= place - 1
        return blocks

    def _next_position(self) -> None:
        self._position += 1
        if self._position == self._positions:
            self._compact()

    def _compact(self) -> None:
        """Number the positions in use from 0 on; at most as many as blocks are watched."""
        used = sorted(set(self._last.values()))
        renumbered = {position: number for number, position in enumerate(used)}
        for name, position in self._last.items():
            self._last[name] = renumbered[position]
        counts = np.bincount(list(self._last.values()), minlength=self._positions)
        sums = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(1, self._positions + 1)
        tree = np.zeros(self._positions + 1, np.int32)
        tree[1:] = sums[places] - sums[places - (places & -places)]
        self._tree = tree.data
        self._position = len(used)


class WhatIf:
    """The curves of all tiers. A Learner (see eviction); one byte a row.

    Args:
        tree: the stored blocks.
        rows: row numbers are below this.
        capacities: of the tiers, in blocks; at most 8.

    Attributes:
        curves: one per tier.
    """

    def __init__(self, tree: Tree, rows: int, capacities: list[int]) -> None:
        self.curves = [Curve(capacity) for capacity in capacities]
        self._name = tree.name
        self._is_watched = np.zeros(rows, np.uint8)  # a bit for each curve
        self._is_watched_of = self._is_watched.data

    def found(self, rows: Rows, request: int, at: int) -> None:  # noqa: ARG002 - see Learner
        """See Learner."""
        bits = self._is_watched[rows]
        watched = np.flatnonzero(bits)
        names = [self._name(row) for row in rows[watched].tolist()]
        self._tell(names, bits[watched].tolist(), len(rows), request)

    def stored(self, rows: Rows, request: int, at: int) -> None:  # noqa: ARG002 - see Learner
        """See Learner."""
        names, bits = self._watch(rows)
        self._tell(names, bits, len(rows), request)

    def hinted(self, rows: Rows, request: int, hint: Hint) -> None:
        """See Learner. Leaf-LRU heeds no hints."""

    def restored(self, rows: Rows, at: int) -> None:  # noqa: ARG002 - see Learner
        """See Learner."""
        names, bits = self._watch(rows)
        for number, curve in enumerate(self.curves):
            curve.know([name for name, bit in zip(names, bits, strict=True) if bit >> number & 1])

    def removed(self, row: int) -> None:
        """See Learner. Its name stays known; its row may get another block."""
        self._is_watched_of[row] = 0

    def _watch(self, rows: Rows) -> tuple[list[int], list[int]]:
        """Names of new blocks, and who watches them."""
        names = [self._name(row) for row in rows.tolist()]
        high = np.array(names, np.uint64) >> np.uint64(_HASH_BITS)
        bits = np.zeros(len(rows), np.uint8)
        for number, curve in enumerate(self.curves):
            bits |= (high < np.uint64(curve.threshold)).astype(np.uint8) << np.uint8(number)
        self._is_watched[rows] = bits
        return names, bits.tolist()

    def _tell(self, names: list[int], bits: list[int], events: int, request: int) -> None:
        for number, curve in enumerate(self.curves):
            curve.count(events)
            curve.use(
                [name for name, bit in zip(names, bits, strict=True) if bit >> number & 1], request
            )
