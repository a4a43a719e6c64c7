"""A stand-in for a device's copies: a thread that makes each of them late.

What a device does behind the host's back is done here behind its back as well: a copy reads its
source and writes its target some time after it was asked for, in the order of its lane. Whoever
reads what was not waited for, or writes to what is still being read, is found out. The computation
of a stand-in is on the calling thread, so there it is held up by waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from kvist.proto.record import Bytes

DELAY_S = 0.001


class DelayedMark:
    """See transfer.device.Mark."""

    def __init__(self, reached: Future[None]) -> None:
        self._reached = reached

    def wait(self) -> None:
        """See Mark."""
        self._reached.result()

    def hold(self) -> None:
        """See Mark."""
        self._reached.result()


class DelayedLane:
    """See transfer.device.Lane.

    Args:
        pages: (pages, page_bytes), uint8: the pool.
        delay_s: of each copy.
    """

    def __init__(self, pages: npt.NDArray[np.uint8], delay_s: float) -> None:
        self._pages = pages
        self._delay_s = delay_s
        self._thread = ThreadPoolExecutor(1, "kvist-lane")

    def load(self, source: Bytes, page: int, first: int) -> None:
        """See Lane."""
        self._copy(self._pages[page, first : first + len(source)], source)

    def store(self, page: int, first: int, out: Bytes) -> None:
        """See Lane."""
        self._copy(out, self._pages[page, first : first + len(out)])

    def mark(self) -> DelayedMark:
        """See Lane."""
        return DelayedMark(self._thread.submit(lambda: None))

    def close(self) -> None:
        """Make the copies that were asked for; none is asked for any more."""
        self._thread.shutdown()

    def _copy(self, target: Bytes, source: Bytes) -> None:
        def late() -> None:
            time.sleep(self._delay_s)
            np.copyto(target, source)

        self._thread.submit(late)


class DelayedCopies:
    """See transfer.device.Copies.

    Args:
        pool: pages in host memory, the first axis; they are taken for a device's.
        delay_s: of each copy.

    Attributes:
        registered: bytes by the address at which they begin.
    """

    def __init__(self, pool: torch.Tensor, delay_s: float = DELAY_S) -> None:
        self._pages = pool.view(len(pool), -1).view(torch.uint8).numpy()
        self._delay_s = delay_s
        self.registered: dict[int, int] = {}
        self._fetches = ThreadPoolExecutor(1, "kvist-fetch")
        self._lanes: list[DelayedLane] = []

    def lane(self) -> DelayedLane:
        """See Copies."""
        lane = DelayedLane(self._pages, self._delay_s)
        self._lanes.append(lane)
        return lane

    def close(self) -> None:
        """End the threads, which would else last until the collector finds them unused. A device's
        streams go with their lanes."""
        for lane in self._lanes:
            lane.close()
        self._fetches.shutdown()

    def staging(self, count: int) -> Bytes:
        """See Copies."""
        return np.zeros(count, np.uint8)

    def register(self, address: int, count: int) -> None:
        """See Copies; any memory will do."""
        self.registered[address] = count

    def unregister(self, address: int) -> None:
        """See Copies."""
        del self.registered[address]

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Copy a tensor to the host, behind what was computed before; what is returned waits."""
        kept, host = tensor.clone(), torch.full_like(tensor, -1)

        def late() -> None:
            time.sleep(self._delay_s)
            with torch.inference_mode():
                host.copy_(kept)

        copied = self._fetches.submit(late)

        def take() -> torch.Tensor:
            copied.result()
            return host

        return take
