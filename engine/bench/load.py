"""Sends requests when they are due and collects what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from kvist.engine.bench.client import Outcome
from kvist.engine.bench.workload import Item

# Timers of an event loop are good to a millisecond; what is left of it is waited for actively.
TIMER_SECONDS = 0.001

Ask = Callable[[Item, Outcome], Awaitable[None]]


class Load:
    """One run.

    Args:
        ask: sends a request and fills in its outcome.
        now: seconds since the start of the run.
        limit: requests under way at most; None is no limit.
        progress: told of every request that has ended.
    """

    def __init__(
        self,
        ask: Ask,
        now: Callable[[], float],
        limit: int | None,
        progress: Callable[[Outcome], None],
    ) -> None:
        self._ask = ask
        self._now = now
        self._seats = None if limit is None else asyncio.Semaphore(limit)
        self._progress = progress

    async def run(
        self, items: Sequence[Item], due_s: Sequence[float], stop: asyncio.Event
    ) -> list[Outcome]:
        """Send every item at its time, whether the ones before were answered or not.

        Args:
            items: the requests.
            due_s: when each is due, never falling.
            stop: ends the run: nothing more is sent and what is under way is broken off.

        Returns:
            An outcome per item that became due, in their order.
        """
        outcomes: list[Outcome] = []
        tasks: list[asyncio.Task[None]] = []
        stopped = asyncio.create_task(stop.wait())
        try:
            for item, due in zip(items, due_s, strict=True):
                await self._wait_until(due, stopped)
                if stop.is_set():
                    break
                outcome = Outcome(due, item.prompt_tokens)
                outcomes.append(outcome)
                tasks.append(asyncio.create_task(self._one(item, outcome)))
            everything = asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.wait((everything, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            ended = await asyncio.gather(*tasks, stopped, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):  # a bug: what servers do is in the outcomes
                raise error
        return outcomes

    async def _wait_until(self, due: float, stopped: asyncio.Task[bool]) -> None:
        rest = due - self._now() - TIMER_SECONDS
        if rest > 0:
            await asyncio.wait((stopped,), timeout=rest)
        while self._now() < due and not stopped.done():
            await asyncio.sleep(0)

    async def _one(self, item: Item, outcome: Outcome) -> None:
        async with self._seats or contextlib.nullcontext():
            await self._ask(item, outcome)
        self._progress(outcome)
