"""Copies between host memory and a CUDA device's pages: streams, events, pinned memory.

The only file but engine/models/decode_batch and engine/device/sizing that needs a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvist.proto.record import Bytes

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process


class CudaMark:
    """See transfer.device.Mark."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        """See Mark; without the interpreter's lock, and asleep: a spinning thread takes a core."""
        self._event.synchronize()

    def hold(self) -> None:
        """See Mark."""
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaLane:
    """See transfer.device.Lane: a stream of its own.

    Args:
        pages: (pages, page_bytes), uint8: the pool.
    """

    def __init__(self, pages: torch.Tensor) -> None:
        self._pages = pages
        self._stream = torch.cuda.Stream(pages.device)  # type: ignore[no-untyped-call]

    def load(self, source: Bytes, page: int, first: int) -> None:
        """See Lane."""
        target = self._pages[page, first : first + len(source)]
        with torch.cuda.stream(self._stream):
            target.copy_(torch.from_numpy(source), non_blocking=True)

    def store(self, page: int, first: int, out: Bytes) -> None:
        """See Lane."""
        source = self._pages[page, first : first + len(out)]
        with torch.cuda.stream(self._stream):
            torch.from_numpy(out).copy_(source, non_blocking=True)

    def mark(self) -> CudaMark:
        """See Lane."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return CudaMark(event, self._pages.device)


class CudaCopies:
    """See transfer.device.Copies.

    Args:
        pool: the pages, the first axis, on the device.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._pages = pool.view(len(pool), -1).view(torch.uint8)
        # A lane waits for nothing that was launched before: the pool may still be being zeroed.
        torch.cuda.synchronize(pool.device)

    def lane(self) -> CudaLane:
        """See Copies."""
        return CudaLane(self._pages)

    def staging(self, count: int) -> Bytes:
        """See Copies."""
        memory: Bytes = torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()
        return memory

    def register(self, address: int, count: int) -> None:
        """See Copies."""
        with torch.cuda.device(self._pages.device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = runtime.cudaHostRegister(address, count, PORTABLE)
            try:
                torch.cuda.check_error(code)
            except RuntimeError as error:
                raise OSError(f"cudaHostRegister of {count} bytes: {error}") from None

    def unregister(self, address: int) -> None:
        """See Copies."""
        with torch.cuda.device(self._pages.device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            # Whatever it answers: the memory goes in any case, and its registration with it.
            runtime.cudaHostUnregister(address)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Copy a tensor to the host, behind what was launched before; what is returned waits.

        On the computation's own stream: what the next step overwrites is copied before.
        """
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()

        def take() -> torch.Tensor:
            event.synchronize()
            return host

        return take
