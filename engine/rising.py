"""Requests whose blocks rise from flash let others pass, for a bounded time.

A request that waits in the queue holds no page and no seat. So one whose blocks are on their way up
stays there, and those behind it go first. It is let in when the first layers of all blocks are
there and the others will have come before it has computed: then it follows the rise, and computes
layer by layer behind it. Where nobody else computes, it is let in as soon as all blocks are on
their way. It waits no longer than PATIENCE times what the rise was estimated to take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvist.cachesvc.worker.cost import Choice
from kvist.engine.cache import Cache
from kvist.engine.sequence import Sequence, State
from kvist.proto.keys import BlockKey

PATIENCE = 2.0
# A disk that is busy for a moment, or a sidecar that looks at its bell late.
PATIENCE_BASE_S = 0.02
# One that nobody computes beside is let in earlier: so long at most those wait who come meanwhile.
ALONE_S = 0.1
# How much longer than estimated one that was let in may wait for what is left of a rise. Its step
# waits with it; but a disk that pauses is back sooner than a prefix is computed.
FOLLOW_BASE_S = 0.5
# A rise is timed when it was looked at so shortly before its end, as a share of the whole.
LOOK_SHARE = 0.2


@dataclass(slots=True)
class _Rise:
    """What a request waits for.

    Attributes:
        last: the block that rises last.
        blocks: how many rise.
        began_s: when they began to.
        until_s: when its patience ends.
        looked_s: when it was looked at last.
        choice: what was estimated of it.
        block_bytes: of a block, if it may be followed, else 0.
    """

    last: BlockKey
    blocks: int
    began_s: float
    until_s: float
    looked_s: float
    choice: Choice
    block_bytes: int


class Rising:
    """Used by the core's thread only.

    Args:
        cache: where blocks are seen.
        now: clock, seconds.
        rose: told how many blocks rose in how many seconds, where that could be measured.

    Attributes:
        late: requests whose blocks had not all come when their patience was over.
    """

    def __init__(
        self, cache: Cache, now: Callable[[], float], rose: Callable[[int, float], object]
    ) -> None:
        self._cache = cache
        self._now = now
        self._rose = rose
        self._rises: dict[Sequence, _Rise] = {}
        self.late = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._rises)

    def begin(
        self, sequence: Sequence, last: BlockKey, blocks: int, choice: Choice, block_bytes: int
    ) -> None:
        """A request's blocks have begun to rise.

        Args:
            last: the last one of them.
            blocks: how many they are.
            choice: how long that takes, and the computation.
            block_bytes: of a block, if they rise side by side and may be followed, else 0.
        """
        now = self._now()
        until_s = now + PATIENCE_BASE_S + PATIENCE * choice.load_s
        self._rises[sequence] = _Rise(last, blocks, now, until_s, now, choice, block_bytes)
        if sequence.trace is not None:
            sequence.trace.rises(now, blocks)

    def waits(self, sequence: Sequence, alone: bool) -> bool:
        """Whether a request that could be admitted shall wait; asked again in each step.

        alone: nobody computes now.
        """
        rise = self._rises.get(sequence)
        if rise is None:
            return False
        is_rising, now = "flash" in self._cache.tiers([rise.last]), self._now()
        is_late = is_rising and now >= rise.until_s
        if is_rising and not is_late:
            left_s = self._left_s(rise, alone)
            if left_s > max(rise.choice.compute_s, ALONE_S if alone else 0.0):
                rise.looked_s = now
                return True
            sequence.follow_until_s = now + FOLLOW_BASE_S + PATIENCE * left_s
        self.late += is_late
        sequence.rise_s = now - rise.began_s
        if sequence.trace is not None:
            sequence.trace.rose(now, is_late)
        # Between two looks lies a step: what came during a long one may have come at its beginning.
        is_timed = now - rise.looked_s <= LOOK_SHARE * (now - rise.began_s)
        if is_timed and not sequence.follow_until_s:
            self._rose(rise.blocks, now - rise.began_s)
        del self._rises[sequence]
        return False

    def _left_s(self, rise: _Rise, alone: bool) -> float:
        """Seconds until a rise has ended; math.inf when it cannot be followed, or not yet."""
        # The last block is the one that lags behind: parts come by turns.
        there = self._cache.risen(rise.last) if rise.block_bytes else None
        # Where nobody else computes, its first layer may as well wait in the step.
        if there is None or not (there or alone):
            return math.inf
        return rise.choice.load_s * max(0.0, 1 - there / rise.block_bytes)

    def prune(self) -> None:
        """Forget requests that wait no more."""
        for sequence in [one for one in self._rises if one.state is not State.WAITING]:
            del self._rises[sequence]
