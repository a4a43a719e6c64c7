"""A store's life on an event loop: the timer, the bell, and calls from other threads."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TypeVar

from kvist.cachesvc.core.store import Store
from kvist.proto.errors import Detached

# A tick over idle rings costs about 10 us: 0.5 % of a core at the fast pace, nothing at the slow
# one. A touch may wait that long; a wish to prefetch rings the bell.
FAST_TICK_S = 0.002
SLOW_TICK_S = 0.05
ACTIVE_S = 1.0
# One wake-up stands for all that wait, so what is left in the socket needs no second look.
BELL_READS = 64

Result = TypeVar("Result")


class Beat:
    """Ticks a store: every 2 ms while somebody was active in the last second, else every 50 ms,
    and at once when the bell rings. Lives on the loop's thread, as the store does.

    Args:
        loop: where the store lives.
        store: open.
        on_failure: told of an error of the store, which is a broken invariant; no tick after it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        store: Store,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._loop = loop
        self._store = store
        self._on_failure = on_failure
        self._active_until_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._bell: socket.socket | None = None
        self._bell_path: Path | None = None

    def start(self, bell_path: Path) -> None:
        """Bind the bell and begin to tick.

        Raises: OSError when the bell cannot be bound.
        """
        bell_path.unlink(missing_ok=True)
        bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        bell.bind(str(bell_path))
        self._bell, self._bell_path = bell, bell_path
        self._loop.add_reader(bell.fileno(), self._answer_bell)
        self._tick_and_wait()

    def active(self) -> None:
        """Somebody called: tick at the fast pace for a while."""
        was_idle = self._loop.time() >= self._active_until_s
        self._active_until_s = self._loop.time() + ACTIVE_S
        if was_idle and self._timer is not None:
            self._timer.cancel()
            self._timer = self._loop.call_later(FAST_TICK_S, self._tick_and_wait)

    def stop(self) -> None:
        """Tick no more; the bell is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._bell is not None and self._bell_path is not None:
            self._loop.remove_reader(self._bell.fileno())
            self._bell.close()
            self._bell_path.unlink(missing_ok=True)
            self._bell = None

    def _tick_and_wait(self) -> None:
        if not self._tick():
            return
        active = self._loop.time() < self._active_until_s
        pace_s = FAST_TICK_S if active else SLOW_TICK_S
        self._timer = self._loop.call_later(pace_s, self._tick_and_wait)

    def _answer_bell(self) -> None:
        assert self._bell is not None
        try:
            for _ in range(BELL_READS):
                self._bell.recv(1)
        except BlockingIOError:
            pass
        if self._tick():
            self.active()

    def _tick(self) -> bool:
        try:
            if self._store.tick():
                self._active_until_s = self._loop.time() + ACTIVE_S
        except Exception as error:
            self.stop()
            self._on_failure(error)
            return False
        return True


def begin_on(loop: asyncio.AbstractEventLoop, function: Callable[[], Result]) -> Future[Result]:
    """Have a function run on a loop's thread; called from any other thread.

    Raises:
        Detached: the loop has stopped.
    """
    future: Future[Result] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    try:
        loop.call_soon_threadsafe(run)
    except RuntimeError:
        raise Detached("the store has stopped") from None
    return future


def finish(future: Future[Result], timeout_s: float) -> Result:
    """Wait for what begin_on began.

    Raises:
        Detached: the loop was busy for longer than timeout_s.
        whatever the function raises.
    """
    try:
        return future.result(timeout_s)
    except FutureTimeout:
        future.cancel()
        raise Detached(f"the store did not answer within {timeout_s} s") from None


def call_on(
    loop: asyncio.AbstractEventLoop, function: Callable[[], Result], timeout_s: float
) -> Result:
    """Run a function on a loop's thread and wait for it. Raises: as begin_on and finish."""
    return finish(begin_on(loop, function), timeout_s)
