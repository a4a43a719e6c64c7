"""One load: whole blocks taken one by one by several threads, or layer by layer behind a gate."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvist.transfer.device import Mark

if TYPE_CHECKING:  # a sequence has a gate
    from kvist.engine import sequence as sequences


class LoadGate:
    """How far a load has come whose sequence computes meanwhile.

    The core's thread waits, one thread copies. What is computed behind the gate is provisional
    until it has ended: only then the checksums of all blocks are known. On a device the core waits
    until a layer's copies have been asked for, and the device until they are done.

    Attributes:
        sound: every block is in its page and verified; False until it has ended.
        waited_s: how long the core was held up; a device's own waits are not in it.
        waits: how often.
    """

    def __init__(self) -> None:
        self.sound = False
        self.waited_s = 0.0
        self.waits = 0
        self._layers = 0
        self._held = 0
        self._marks: deque[tuple[int, Mark]] = deque()
        self._ended = False
        self._moved = threading.Condition()

    def wait(self, layer: int) -> None:
        """What is computed afterwards finds K and V of a layer in the pages of all blocks, or they
        will never be there."""
        if layer >= self._layers and not self._ended:
            self._wait(layer)
        while self._held <= layer and self._marks:
            self._held, mark = self._marks.popleft()
            mark.hold()

    def finish(self) -> bool:
        """Wait until the load has ended; whether it is sound."""
        if not self._ended:
            self._wait(None)
        return self.sound

    def reach(self, layers: int, mark: Mark | None = None) -> None:
        """The first so many layers have come; with a mark, they have when that is passed."""
        with self._moved:
            if mark is not None:
                self._marks.append((layers, mark))
            self._layers = layers
            self._moved.notify_all()

    def end(self, sound: bool) -> None:
        """Nothing more will come."""
        with self._moved:
            self.sound, self._ended = sound, True
            self._moved.notify_all()

    def _wait(self, layer: int | None) -> None:
        began_s = time.perf_counter()
        self.waits += 1
        with self._moved:
            self._moved.wait_for(
                lambda: self._ended or (layer is not None and layer < self._layers)
            )
        self.waited_s += time.perf_counter() - began_s


def waiter(gates: Sequence[LoadGate]) -> Callable[[int], None] | None:
    """What a model calls before a layer reads the pages."""
    if not gates:
        return None

    def wait(layer: int) -> None:
        for gate in gates:
            gate.wait(layer)

    return wait


class LoadJob:
    """Blocks on their way into a sequence's pages. Every method may be called from any thread.

    The copy of a block is bound by one core (about 6 GB/s with its checksum), so that two threads
    bring a prefix in almost half the time; a thread that finds nothing left turns to the next
    job, and a block that waits for flash holds up one thread only.

    Args:
        sequence: whose.
        first: number of the first block in it.
        pages: where the blocks go, in order; at least one.
        started_s: when it was asked for.

    Attributes:
        gate: where the sequence waits; None loads whole blocks.
        cuts: groups of layers, see transfer.pipeline.layer_cuts.
        until_s: how long the layers of blocks that rise are waited for; 0 if none does.
        began_s: when a thread took it up.
    """

    def __init__(
        self, sequence: sequences.Sequence, first: int, pages: list[int], started_s: float
    ) -> None:
        self.sequence = sequence
        self.first = first
        self.pages = pages
        self.started_s = started_s
        self.gate: LoadGate | None = None
        self.cuts: tuple[int, ...] = ()
        self.until_s = 0.0
        self.began_s = started_s
        self.reason = ""
        self._lock = threading.Lock()
        self._next = 0
        self._under_way = 0
        self._end = len(pages)
        self._deadline: float | None = None

    @property
    def blocks(self) -> int:
        """Leading blocks that have come, once the job has ended."""
        return self._end

    def take(self, now: float, patience_s: float) -> tuple[int, float] | None:
        """The next block to copy, and until when it may be waited for; None when none is left.

        Args:
            now: the clock.
            patience_s: how long the whole job may take from the first block taken.
        """
        with self._lock:
            if self._next >= self._end:
                return None
            if self._deadline is None:
                self._deadline = now + patience_s
                self.began_s = now
            self._next += 1
            self._under_way += 1
            return self._next - 1, self._deadline

    def give(self, block: int, reason: str | None) -> bool:
        """Say how a taken block ended; True for exactly one caller, when the job has ended.

        Args:
            block: as taken.
            reason: None when it came, else the miss reason: no block from it on counts.
        """
        with self._lock:
            self._under_way -= 1
            if reason is not None and block < self._end:
                self._end, self.reason = block, reason
            return not self._under_way and self._next >= self._end
