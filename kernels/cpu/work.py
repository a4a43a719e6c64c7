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
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core.typing.templates import signature

from kvist.kernels.cpu.vectors import compiled, fetch_add, pause, read

PHASE_BYTES = 16  # items taken, items done
GATE_BYTES = 64  # before the phases: layers that may be computed, or CLOSED
CLOSED = -1
# About 10 us of looking, then the core is offered to others at each look, then given away.
SPINS, YIELDS, NAP_US = 300, 200, 50
_yield_core = types.ExternalFunction("sched_yield", types.int32())
_nap: Any = types.ExternalFunction("usleep", signature(types.int32, types.uint32))


@compiled
def _wait(spins):
    if spins < SPINS:
        pause()
    elif spins < SPINS + YIELDS:
        _yield_core()
    else:
        _nap(np.uint32(NAP_US))


@compiled
def may_compute(sync, layer):
    """Wait until a layer is let through; False when the step was given up."""
    spins = 0
    while True:
        layers = read(sync - GATE_BYTES)
        if layers == CLOSED:
            return False
        if layers > layer:
            return True
        _wait(spins)
        spins += 1


@compiled
def take(sync, phase, count):
    """The first of the next `count` items of a phase; at least as many as there are: none left."""
    return fetch_add(sync + phase * PHASE_BYTES, count)


@compiled
def finish(sync, phase, done, items):
    """Say how many items one did, and wait until all of the phase are done."""
    place = sync + phase * PHASE_BYTES + 8
    if done:
        fetch_add(place, done)
    spins = 0
    while read(place) < items:
        _wait(spins)
        spins += 1


class Sync:
    """The counters of one step; new ones for each, as a helper that is late may look at old ones.

    Args:
        phases: of the step.
    """

    def __init__(self, phases: int) -> None:
        self._words = aligned(GATE_BYTES + phases * PHASE_BYTES).view(np.int64)
        self._words.fill(0)

    @property
    def address(self) -> int:
        """Of the first phase."""
        return int(self._words.ctypes.data) + GATE_BYTES

    def open(self, layers: int) -> None:
        """Let so many layers be computed."""
        self._words[0] = layers

    def close(self) -> None:
        """Give the step up: who waits for a layer goes home."""
        self._words[0] = CLOSED


Job = Callable[[int], None]


class Team:
    """Threads that help the caller's.

    Args:
        threads: how many compute, the caller's among them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers = [_Helper(number) for number in range(1, threads)]

    def run(self, job: Job, lead: Callable[[], None]) -> None:
        """Run lead() here and job(number) on every helper that is free, at the same time.

        A helper that has not come back from an earlier job is left alone: what it would do, the
        others do. Both must leave nothing undone that the caller needs, see the module.
        """
        for helper in self._helpers:
            helper.offer(job)
        lead()

    @property
    def idle(self) -> bool:
        """No helper is in a job."""
        return not any(helper.busy for helper in self._helpers)

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

    @property
    def busy(self) -> bool:
        return self._busy.is_set()

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
