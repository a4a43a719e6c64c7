"""Requests whose blocks rise from flash let others pass, for a bounded time.

A request that waits in the queue holds no page and no seat. So one whose blocks are on their way up
stays there, and those behind it go first. It is let in when the first layers of all blocks are
there and the others will have come before it has computed: then it follows the rise, and computes
layer by layer behind it. Where nobody else computes, it is let in as soon as all blocks are on
their way. It waits no longer than PATIENCE times what the rise was estimated to take, with those
that go before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Blocks
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
        keys: the blocks that rise, in order.
        fresh: how many of them nobody had asked for before.
        began_s: when they were asked for.
        starts_s, ends_s: when it will be their turn, and over, as estimated.
        until_s: when its patience ends.
        looked_s: when it was looked at last.
        choice: what was estimated of it, the wait for its turn included.
        block_bytes: of a block, if it may be followed, else 0.
    """

    keys: Blocks[BlockKey]
    fresh: int
    began_s: float
    starts_s: float
    ends_s: float
    until_s: float
    looked_s: float
    choice: Choice
    block_bytes: int


class Rising:
    """Used by the core's thread only.

    Args:
        cache: where blocks are seen.
        now: clock, seconds.
        rose: told how many blocks rose in how many seconds, or had not yet (False), where that
            could be measured.

    Attributes:
        late: requests whose blocks had not all come when their patience was over.
    """

    def __init__(
        self, cache: Cache, now: Callable[[], float], rose: Callable[[int, float, bool], object]
    ) -> None:
        self._cache = cache
        self._now = now
        self._rose = rose
        self._rises: dict[Sequence, _Rise] = {}
        self._asked: dict[BlockKey, _Rise] = {}
        self._ends_s = 0.0
        self.late = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._rises)

    def ahead_s(self, keys: Blocks[BlockKey] = (), block_s: float = 0.0) -> float:
        """Seconds that pass before blocks rise if they are asked for now, as estimated: the sidecar
        reads what was asked for first, and once, whoever asks for it again.

        Args:
            keys: the blocks.
            block_s: that each of them takes. Those that were asked for before are among what goes
                before, so their time is taken off here.
        """
        known = [self._asked[key] for key in keys if key in self._asked]
        waits_s = self._ends_s
        if known and len(known) == len(keys):
            waits_s = max(rise.ends_s for rise in known)
        return max(0.0, waits_s - self._now() - block_s * len(known))

    def begin(
        self, sequence: Sequence, keys: Blocks[BlockKey], choice: Choice, block_bytes: int
    ) -> None:
        """A request's blocks were asked to rise.

        Args:
            keys: at least one.
            choice: how long that takes, those before it included, and the computation.
            block_bytes: of a block, if they rise side by side and may be followed, else 0.
        """
        now = self._now()
        known = [self._asked[key].starts_s for key in keys if key in self._asked]
        fresh = len(keys) - len(known)
        starts_s = max(now, self._ends_s) if fresh else min(known)
        ends_s = now + choice.load_s
        until_s = now + PATIENCE_BASE_S + PATIENCE * choice.load_s
        self._ends_s = max(self._ends_s, ends_s)
        rise = _Rise(keys, fresh, now, starts_s, ends_s, until_s, now, choice, block_bytes)
        self._rises[sequence] = rise
        for key in keys:
            self._asked.setdefault(key, rise)
        if sequence.trace is not None:
            sequence.trace.rises(now, len(keys))

    def waits(self, sequence: Sequence, alone: bool) -> bool:
        """Whether a request that could be admitted shall wait; asked again in each step.

        alone: nobody computes now.
        """
        rise = self._rises.get(sequence)
        if rise is None:
            return False
        tier, now = self._cache.tiers(rise.keys[-1:]), self._now()
        is_rising = "flash" in tier
        is_late = is_rising and now >= rise.until_s
        if is_rising and not is_late:
            left_s = self._left_s(rise, alone)
            if left_s > max(rise.choice.compute_s, ALONE_S if alone else 0.0):
                rise.looked_s = now
                return True
            sequence.follow_until_s = now + FOLLOW_BASE_S + PATIENCE * left_s
            self._shift(rise, now + left_s)
        self.late += is_late
        # Between two looks lies a step: what came during a long one may have come at its beginning.
        is_timed = now - rise.looked_s <= LOOK_SHARE * (now - rise.began_s)
        ended_s = now if is_rising or is_timed else min(now, max(rise.looked_s, rise.ends_s))
        sequence.rise_s = max(0.0, ended_s - rise.starts_s)
        if sequence.trace is not None:
            sequence.trace.rose(now, is_late)
        is_first = rise.fresh == len(rise.keys) and rise.starts_s == rise.began_s
        if is_first and (is_late or (is_timed and "dram" in tier)):
            self._rose(len(rise.keys), now - rise.began_s, not is_late)
        if not is_rising and (is_timed or now < rise.ends_s):
            self._shift(rise, now)
        self._forget(sequence)
        return False

    def _shift(self, rise: _Rise, ended_s: float) -> None:
        """A rise ends then, or has: those behind it are sooner or later."""
        if not rise.fresh:
            return
        behind = [each for each in self._rises.values() if each.starts_s >= rise.ends_s]
        # One that has ended before it was its turn takes no time from those before it.
        drift_s = max(ended_s, rise.starts_s) - rise.ends_s
        if behind:  # no later than from then; their turn was put off when this one was late
            first_s = min(each.starts_s for each in behind)
            drift_s = min(drift_s, max(0.0, ended_s - first_s))
        for other in behind:
            other.starts_s += drift_s
            other.ends_s += drift_s
        self._ends_s += drift_s

    def _forget(self, sequence: Sequence) -> None:
        rise = self._rises.pop(sequence)
        for key in rise.keys:
            if self._asked.get(key) is rise:
                del self._asked[key]

    def _left_s(self, rise: _Rise, alone: bool) -> float:
        """Seconds until a rise has ended; math.inf when it cannot be followed, or not yet."""
        # The last block is the one that lags behind: parts come by turns.
        there = self._cache.risen(rise.keys[-1]) if rise.block_bytes else None
        # Where nobody else computes, its first layer may as well wait in the step.
        if there is None or not (there or alone):
            return math.inf
        if not there:
            return max(rise.ends_s, self._now()) - self._now()
        return (rise.ends_s - rise.starts_s) * max(0.0, 1 - there / rise.block_bytes)

    def prune(self) -> None:
        """Forget requests that wait no more."""
        for sequence in [one for one in self._rises if one.state is not State.WAITING]:
            self._forget(sequence)
