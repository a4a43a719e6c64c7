"""Pages in device memory: the paged KV pool, one page one block, byte for byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kvist.proto.layout import BlockFormat


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
        self.tensor = torch.zeros((pages, *shape), dtype=dtype, device=device)
        self._bytes = self.tensor.view(pages, -1).view(torch.uint8)

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
