"""SGLang's host pool as pages of bytes: copied from and to without a buffer in between.

Where the bytes of a page lie is taken from SGLang's own words (get_page_buffer_meta) and shown to
be right, once at start, by a page that is written through SGLang and read here, and the reverse.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvist.proto.layout import BlockFormat, pattern
from kvist.proto.record import Bytes, checksum
from kvist.transfer.device import Pinner


class LayoutRefused(Exception):
    """A host pool's pages do not lie as SGLang says, or in a way that is not served."""


class PageMemory:
    """Pages of one host pool. Threads may copy different pages at once.

    Args:
        pages: shape (pages, rows, row_bytes), uint8, writable, sharing memory with the pool; rows
            are contiguous. K and V of all layers are 2 rows where the layout is page-first, and 2
            for each layer where it is layer-first.
    """

    def __init__(self, pages: npt.NDArray[np.uint8]) -> None:
        self._pages = pages
        self.count, self.rows, self.row_bytes = pages.shape
        self.payload_bytes = self.rows * self.row_bytes

    def page(self, number: int) -> Bytes:
        """A page in place, shape (rows, row_bytes)."""
        out: Bytes = self._pages[number]
        return out


def map_pool(pool: Any) -> PageMemory:
    """See a host pool's pages. Raises: LayoutRefused."""
    if getattr(pool, "dcp_size", 1) != 1:
        raise LayoutRefused("decode context parallelism (dcp_size > 1) is not served")
    count = pool.size // pool.page_size
    if count < 2:
        raise LayoutRefused(f"a host pool of {count} pages is too small")
    first, second, last = (_runs(pool, number) for number in (0, 1, count - 1))
    row_bytes, step = first[0][1], second[0][0] - first[0][0]
    if any(size != row_bytes for _, size in first):
        raise LayoutRefused("a page's parts are of different sizes")
    moved = [(address + (count - 1) * step, size) for address, size in first]
    if moved != last or [(address + step, size) for address, size in first] != second:
        raise LayoutRefused("its pages do not lie at even distances")
    gaps = {after[0] - before[0] for before, after in itertools.pairwise(first)}
    if len(gaps) > 1:
        raise LayoutRefused("a page's parts do not lie at even distances")
    rows, gap = len(first), gaps.pop() if gaps else 0
    if gap == row_bytes:
        rows, row_bytes, gap = 1, rows * row_bytes, 0
    start = first[0][0]
    raw, base = _memory_of(pool, start, last[-1][0] + last[-1][1])
    view = np.lib.stride_tricks.as_strided(
        raw[start - base :], (count, rows, row_bytes), (step, gap, 1)
    )
    return PageMemory(view)


def _runs(pool: Any, number: int) -> list[tuple[int, int]]:
    """A page's runs of bytes by SGLang's words: (address, length), in order of address."""
    page = pool.page_size
    indices = torch.arange(number * page, (number + 1) * page, dtype=torch.int64)
    try:
        addresses, sizes = pool.get_page_buffer_meta(indices)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise LayoutRefused(f"SGLang does not say where its pages are: {error}") from None
    if not addresses:
        raise LayoutRefused("it holds no bytes")
    return sorted(zip(map(int, addresses), map(int, sizes), strict=True))


def _memory_of(pool: Any, first: int, end: int) -> tuple[npt.NDArray[np.uint8], int]:
    """The allocation of a pool that holds these addresses, and where it begins."""
    for tensor in _tensors(vars(pool).values()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() <= first and end <= storage.data_ptr() + storage.nbytes():
            raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            return raw, storage.data_ptr()
    raise LayoutRefused("its pages are not in one allocation of host memory")


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.device.type == "cpu":
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def try_memory(pool: Any, memory: PageMemory) -> None:
    """Write a page through SGLang and read it here, and the reverse; its bytes come back after.

    What is stored of a page is so shown to be SGLang's own flat page, byte for byte.

    Raises: LayoutRefused.
    """
    number, start = memory.count - 1, (memory.count - 1) * pool.page_size
    neighbour = checksum(memory.page(number - 1))
    try:
        before = pool.get_data_page(start, flat=True).clone()
    except (NotImplementedError, ValueError) as error:
        raise LayoutRefused(f"SGLang does not read its own pages: {error}") from None
    if before.nbytes != memory.payload_bytes:
        raise LayoutRefused(
            f"a page has {before.nbytes} bytes by get_data_page and {memory.payload_bytes} by "
            "get_page_buffer_meta"
        )
    held = memory.page(number).copy()
    wanted = np.random.default_rng(0).integers(0, 256, before.nbytes).astype(np.uint8)
    try:
        pool.set_from_flat_data_page(start, torch.from_numpy(wanted.copy()).view(before.dtype))
        taken = memory.page(number).copy().reshape(-1)
        pool.set_from_flat_data_page(start, torch.zeros_like(before))
        np.copyto(memory.page(number), taken.reshape(memory.rows, memory.row_bytes))
        restored = flat_bytes(pool.get_data_page(start, flat=True)).copy()
    finally:
        np.copyto(memory.page(number), held)
        pool.set_from_flat_data_page(start, before)
    if not np.array_equal(taken, wanted) or not np.array_equal(restored, wanted):
        raise LayoutRefused("a page that was stored and restored is not what it was")
    if checksum(memory.page(number - 1)) != neighbour:
        raise LayoutRefused("to restore a page changed the one beside it")


def flat_bytes(page: torch.Tensor) -> Bytes:
    """The bytes of a contiguous tensor in host memory, in place."""
    out: Bytes = page.contiguous().view(torch.uint8).reshape(-1).numpy()
    return out


def page_numbers(indices: Sequence[int], page_size: int, count: int) -> list[int]:
    """Pages that host indices stand for.

    Args:
        indices: of tokens, page_size for each page. count: pages of the pool.

    Raises: ValueError: they are no whole pages of the pool.
    """
    starts = indices[::page_size]
    whole = len(indices) % page_size == 0 and all(
        start % page_size == 0
        and 0 <= start < count * page_size
        and indices[at * page_size + page_size - 1] == start + page_size - 1
        for at, start in enumerate(starts)
    )
    if not whole:
        raise ValueError(f"host indices are not whole pages of {page_size} tokens")
    return [start // page_size for start in starts]


class ScratchPage:
    """See cachesvc.worker.trial.TrialPage: a page in memory of the same geometry as the pool's.

    What the trial shows each session is the sidecar's half; that of the pool, which cannot change
    in its life, was shown by try_memory.
    """

    pinner: Pinner | None = None

    def __init__(self, memory: PageMemory, format: BlockFormat) -> None:
        self._shape = (memory.rows, 2, memory.row_bytes)
        self._format = format

    def _page(self, payload: Bytes) -> Bytes:
        apart = np.zeros(self._shape, np.uint8)
        np.copyto(apart[:, 1], payload.reshape(self._shape[0], self._shape[2]))
        return apart[:, 1]

    def written(self) -> Bytes:
        """See TrialPage.written."""
        return self._page(pattern(self._format)).copy().reshape(-1)

    def reads(self, payload: Bytes) -> bool:
        """See TrialPage.reads."""
        return bool(np.array_equal(self._page(payload).reshape(-1), pattern(self._format)))
