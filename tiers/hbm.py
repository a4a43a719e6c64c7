"""Pages in device memory: the paged KV pool, one page one block, byte for byte."""

from __future__ import annotations

import contextlib
import mmap
from threading import Event

import numpy as np
import numpy.typing as npt
import torch

from kvist.proto.errors import BlockCorrupt, BlockMissing
from kvist.proto.layout import BlockFormat
from kvist.proto.memory import populate
from kvist.proto.record import BlockHeader, Bytes, Wanted, check_wanted, checksum
from kvist.tiers.slots import FreeSlots


class PagePool:
    """The pool that a model reads and writes, and whose pages move as blocks. Only memory: who
    owns which page is decided elsewhere.

    Attributes:
        format: meaning of a page's bytes.
        pages: pages in the pool.
        tensor: (pages, layers, 2, kv_heads, block_tokens, head_dim), contiguous, zero at first.

    Raises:
        ValueError: pages < 1.
    """

    def __init__(self, format: BlockFormat, pages: int, device: str = "cpu") -> None:
        if pages < 1:
            raise ValueError(f"pages must be >= 1, got {pages}")
        self.format = format
        self.pages = pages
        shape = (format.layers, 2, format.kv_heads, format.block_tokens, format.head_dim)
        dtype: torch.dtype = getattr(torch, format.dtype)
        # Zeroed and not empty: a weight of exactly 0 times a NaN left in the memory is NaN.
        # On a CPU the kernel's own zeros, huge pages where there are any: torch.zeros would write
        # all of the pool before the start could go on, prefault does it behind it.
        self._map: mmap.mmap | None = None
        if device == "cpu":
            self._map = mmap.mmap(-1, pages * format.payload_bytes)
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
            self.tensor = torch.frombuffer(self._map, dtype=dtype).view(pages, *shape)
        else:
            # Zeros as bytes: not every device fills every dtype.
            zeros = torch.zeros(pages * format.payload_bytes, dtype=torch.uint8, device=device)
            self.tensor = zeros.view(dtype).view(pages, *shape)
        self._bytes = self.tensor.view(pages, -1).view(torch.uint8)

    def prefault(self, stop: Event) -> None:
        """Take the pool's memory now, so that no copy or step waits for it; for a thread.

        Args:
            stop: set it to end early.
        """
        if self._map is not None:
            populate(memoryview(self._map), stop)

    def page_bytes(self, page: int) -> npt.NDArray[np.uint8]:
        """A page as bytes.

        Returns:
            (payload_bytes,), writable. On a CPU it shares the pool's memory; from a device it is
            a copy, so a write does not reach the pool.

        Raises:
            IndexError: there is no such page.
        """
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} is not in [0, {self.pages})")
        view: npt.NDArray[np.uint8] = self._bytes[page].cpu().numpy()
        return view


class HbmTier:
    """The pool as a tier: a page is a slot; see base.Tier for the contract.

    Headers are kept in host memory. One thread, the engine's, uses it, so there is no generation:
    nothing can change while it is read.

    Attributes:
        slots: pages of the pool.
    """

    name = "hbm"

    def __init__(self, pool: PagePool) -> None:
        """Use all pages of a pool that nobody else uses."""
        self.slots = pool.pages
        self._bytes = pool.tensor.view(pool.pages, -1).view(torch.uint8)
        self._free = FreeSlots(pool.pages)
        self._headers: dict[int, BlockHeader] = {}

    @property
    def free_slots(self) -> int:
        """Slots that allocate could give out now."""
        return self._free.count

    def allocate(self) -> int:
        """Take a free slot; TierFull when none is left."""
        return self._free.pop()

    def write(self, slot: int, header: BlockHeader, payload: Bytes) -> None:
        """Fill an allocated slot and make it readable; the payload is exactly a page long."""
        page = self._bytes[slot]
        assert header.payload_bytes == payload.nbytes == page.numel(), "not a page of this pool"
        # torch warns of memory that it could write to and must not.
        page.copy_(torch.from_numpy(payload if payload.flags.writeable else payload.copy()))
        self._headers[slot] = header

    def read(self, slot: int, wanted: Wanted, out: Bytes) -> None:
        """Copy a block out; see base.Tier."""
        header = self._headers.get(slot)
        if header is None:
            raise BlockMissing("the slot holds no block")
        check_wanted(header, wanted)
        torch.from_numpy(out).copy_(self._bytes[slot])
        if checksum(out) != header.checksum:
            raise BlockCorrupt("payload checksum differs")

    def free(self, slot: int) -> None:
        """Make the slot unreadable and give it back."""
        self._free.push(slot)
        self._headers.pop(slot, None)

    def close(self) -> None:
        """Forget the pool; its memory goes with its last user."""
        self._headers.clear()
        self._bytes = torch.empty(0, dtype=torch.uint8)
