"""Who may copy when: loads before stores, and each direction under its cap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

Direction = Literal["load", "store"]
DIRECTIONS: tuple[Direction, ...] = ("load", "store")

# A bucket holds what may be copied in this time: short, or a cap of 1 GB/s would let a burst of
# 100 MB through; long enough that a sleep (0.1 ms late, mostly) is little beside it.
BURST_S = 0.02
# A store that is held up keeps its page, and a load may wait for flash for seconds: a store waits
# so long for the loads that there are, and then only for one that has begun since.
YIELD_MAX_S = 0.05


class Bucket:
    """A token bucket of bytes that may be overdrawn by one copy, whose successor then waits.

    Args:
        bytes_per_s: 0 is no cap.
        now: clock, seconds.
        sleep: waits so many seconds.

    Attributes:
        waited_s: in total.
    """

    def __init__(
        self, bytes_per_s: int, now: Callable[[], float], sleep: Callable[[float], object]
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.waited_s = 0.0
        self._now = now
        self._sleep = sleep
        self._lock = threading.Lock()
        self._level = bytes_per_s * BURST_S
        self._at_s = now()

    def take(self, count: int) -> None:
        """Take count bytes; waits until the bucket is not overdrawn."""
        if not self.bytes_per_s:
            return
        with self._lock:
            now = self._now()
            full = self.bytes_per_s * BURST_S
            self._level = min(full, self._level + (now - self._at_s) * self.bytes_per_s) - count
            self._at_s = now
            wait_s = max(0.0, -self._level / self.bytes_per_s)
            self.waited_s += wait_s
        if wait_s:
            self._sleep(wait_s)


class Pace:
    """Shared by the threads that copy for one worker.

    Args:
        load_bytes_per_s: cap of what is copied out of the cache, 0 for none.
        store_bytes_per_s: of what is copied in.
        now: clock, seconds.
        sleep: waits so many seconds.

    Attributes:
        yields: store copies that let loads go first.
    """

    def __init__(
        self,
        load_bytes_per_s: int = 0,
        store_bytes_per_s: int = 0,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.yields = 0
        self._buckets = {
            "load": Bucket(load_bytes_per_s, now, sleep),
            "store": Bucket(store_bytes_per_s, now, sleep),
        }
        self._loads = 0
        self._begun = 0
        self._passed = 0
        self._ended = threading.Condition()

    @property
    def throttled_s(self) -> dict[str, float]:
        """Seconds that copies waited for the cap, by direction."""
        return {name: bucket.waited_s for name, bucket in self._buckets.items()}

    def begin_load(self) -> None:
        """A load is queued: stores let it go first."""
        with self._ended:
            self._loads += 1
            self._begun += 1

    def end_load(self) -> None:
        """It has ended."""
        with self._ended:
            self._loads -= 1
            self._ended.notify_all()

    def before_load(self, count: int) -> None:
        """Called before count bytes are copied out."""
        self._buckets["load"].take(count)

    def before_store(self, count: int) -> None:
        """Called before count bytes are copied in."""
        if self._loads and self._begun != self._passed:
            self.yields += 1
            with self._ended:
                begun = self._begun
                if not self._ended.wait_for(lambda: not self._loads, YIELD_MAX_S):
                    self._passed = begun
        self._buckets["store"].take(count)
