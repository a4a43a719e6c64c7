"""Threads that share a step's work without ever waiting for one another to wake up.

A step is a row of phases, each of some items. Whoever comes takes the next item of the phase that
is open; a phase is over when its items are done, not when everybody has arrived. A thread that the
system has put aside holds up at most the item that it is in, where an OpenMP barrier waits for it
whatever there is to do: beside one busy process, that made a decode step 10 to 20 times slower.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from numba import types

from kvist.kernels.cpu.vectors import compiled, fetch_add, pause, read

PHASE_BYTES = 16  # items taken, items done
# About 10 us of looking, then the core is offered to others at each look.
SPINS = 300
_yield_core = types.ExternalFunction("sched_yield", types.int32())


@compiled
def take(sync, phase, count):  # type: ignore[no-untyped-def]
    """The first of the next `count` items of a phase; at least as many as there are: none left."""
    return fetch_add(sync + phase * PHASE_BYTES, count)


@compiled
def finish(sync, phase, done, items):  # type: ignore[no-untyped-def]
    """Say how many items one did, and wait until all of the phase are done."""
    place = sync + phase * PHASE_BYTES + 8
    if done:
        fetch_add(place, done)
    spins = 0
    while read(place) < items:
        pause()
        spins += 1
        if spins > SPINS:
            _yield_core()


Job = Callable[[int], None]


class Team:
    """Threads that help the caller's.

    Args:
        threads: how many compute, the caller's among them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers = [_Helper(number) for number in range(1, threads)]

    def run(self, job: Job, work: Job) -> None:
        """Run work(0) here and job(number) on every helper that is free, at the same time.

        A helper that has not come back from an earlier job is left alone: what it would do, the
        others do. Both must leave nothing undone that the caller needs, see the module.
        """
        for helper in self._helpers:
            helper.offer(job)
        work(0)

    def close(self) -> None:
        """End the threads; a job under way is finished."""
        for helper in self._helpers:
            helper.close()


class _Helper:
    def __init__(self, number: int) -> None:
        self._number = number
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._busy = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kvist-compute-{number}")
        self._thread.daemon = True
        self._thread.start()

    def offer(self, job: Job) -> None:
        if not self._busy.is_set():
            self._busy.set()
            self._jobs.put(job)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job(self._number)
            finally:
                self._busy.clear()


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """Bytes that begin at a multiple of 64."""
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size]
