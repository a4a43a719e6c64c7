"""Requests whose blocks rise from flash let others pass, for a bounded time.

A request that waits in the queue holds no page and no seat. So one whose blocks are on their way up
stays there until they are in DRAM, from where they are loaded beside its own computation, and those
behind it go first. It waits no longer than PATIENCE times what the rise was estimated to take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvist.engine.cache import Cache
from kvist.engine.sequence import Sequence, State
from kvist.proto.keys import BlockKey

PATIENCE = 2.0
# A disk that is busy for a moment, or a sidecar that looks at its bell late.
PATIENCE_BASE_S = 0.02
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
    """

    last: BlockKey
    blocks: int
    began_s: float
    until_s: float
    looked_s: float


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

    def begin(self, sequence: Sequence, last: BlockKey, blocks: int, estimate_s: float) -> None:
        """A request's blocks have begun to rise.

        Args:
            last: the last one of them.
            blocks: how many they are.
            estimate_s: how long that takes.
        """
        now = self._now()
        until_s = now + PATIENCE_BASE_S + PATIENCE * estimate_s
        self._rises[sequence] = _Rise(last, blocks, now, until_s, now)
        if sequence.trace is not None:
            sequence.trace.rises(now, blocks)

    def waits(self, sequence: Sequence) -> bool:
        """Whether a request that could be admitted shall wait; asked again in each step."""
        rise = self._rises.get(sequence)
        if rise is None:
            return False
        is_rising, now = "flash" in self._cache.tiers([rise.last]), self._now()
        if is_rising and now < rise.until_s:
            rise.looked_s = now
            return True
        self.late += is_rising
        sequence.rise_s = now - rise.began_s
        if sequence.trace is not None:
            sequence.trace.rose(now, is_rising)
        # Between two looks lies a step: what came during a long one may have come at its beginning.
        if now - rise.looked_s <= LOOK_SHARE * (now - rise.began_s):
            self._rose(rise.blocks, now - rise.began_s)
        del self._rises[sequence]
        return False

    def prune(self) -> None:
        """Forget requests that wait no more."""
        for sequence in [one for one in self._rises if one.state is not State.WAITING]:
            del self._rises[sequence]
