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


@dataclass(frozen=True, slots=True)
class _Rise:
    """What a request waits for.

    Attributes:
        last: the block that rises last.
        until_s: when its patience ends.
    """

    last: BlockKey
    until_s: float


class Rising:
    """Used by the core's thread only.

    Args:
        cache: where blocks are seen.
        now: clock, seconds.

    Attributes:
        late: requests whose blocks had not all come when their patience was over.
    """

    def __init__(self, cache: Cache, now: Callable[[], float]) -> None:
        self._cache = cache
        self._now = now
        self._rises: dict[Sequence, _Rise] = {}
        self.late = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._rises)

    def begin(self, sequence: Sequence, last: BlockKey, estimate_s: float) -> None:
        """A request's blocks have begun to rise.

        Args:
            last: the last one of them.
            estimate_s: how long that takes.
        """
        until_s = self._now() + PATIENCE_BASE_S + PATIENCE * estimate_s
        self._rises[sequence] = _Rise(last, until_s)

    def waits(self, sequence: Sequence) -> bool:
        """Whether a request that could be admitted shall wait; asked again in each step."""
        rise = self._rises.get(sequence)
        if rise is None:
            return False
        is_rising = "flash" in self._cache.tiers([rise.last])
        if is_rising and self._now() < rise.until_s:
            return True
        self.late += is_rising
        del self._rises[sequence]
        return False

    def prune(self) -> None:
        """Forget requests that wait no more."""
        for sequence in [one for one in self._rises if one.state is not State.WAITING]:
            del self._rises[sequence]
