"""Copy pages of a pool side by side into a staging buffer, and back.

    staging[i] = pages[ids[i]]       gather
    pages[ids[i]] = staging[i]       scatter, for i in [0, n)

Both take all layers of a page, or a range of them, which is one run of bytes in a page-first pool.

Bound: memory; each byte is read once and written once. The aim is 90 % of copy bandwidth from
64 KiB a page on.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import OPTIONS

WORDS = 2048  # 8-byte words that one program copies
WORD_BYTES = 8


def gather_reference(pool: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The meaning of gather."""
    return pool[ids.long()]


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as (pages, 8-byte words), sharing its memory."""
    assert tensor[0].is_contiguous(), "the bytes of one page are not one run"
    page_bytes = tensor[0].numel() * tensor.element_size()
    stride_bytes = tensor.stride(0) * tensor.element_size()
    offset_bytes = tensor.storage_offset() * tensor.element_size()
    for count in (page_bytes, stride_bytes, offset_bytes):
        assert count % WORD_BYTES == 0, f"pages are cut in words of {WORD_BYTES} bytes"
    words = torch.empty(0, dtype=torch.int64, device=tensor.device)
    return words.set_(
        tensor.untyped_storage(),
        offset_bytes // WORD_BYTES,
        (tensor.shape[0], page_bytes // WORD_BYTES),
        (stride_bytes // WORD_BYTES, 1),
    )


def _copy(ids: torch.Tensor, pages: torch.Tensor, staging: torch.Tensor, into_pages: bool) -> None:
    assert ids.dtype in (torch.int32, torch.int64), "ids are int32 or int64"
    assert pages.shape[1:] == staging.shape[1:], "a page and a row of the staging buffer differ"
    assert pages.dtype == staging.dtype, "pool and staging buffer are of different dtypes"
    assert len(staging) >= len(ids), "the staging buffer is too small"
    if len(ids) == 0:
        return
    wide, flat = _words(pages), _words(staging)
    parts = triton.cdiv(wide.shape[1], WORDS)
    _copy_kernel[(len(ids), parts)](
        wide,
        flat,
        ids,
        wide.stride(0),
        flat.stride(0),
        wide.shape[1],
        WORDS=WORDS,
        INTO_PAGES=into_pages,
        num_warps=8,
        **OPTIONS,
    )


def gather(pages: torch.Tensor, ids: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy the named pages, in order, into the staging buffer.

    Args:
        pages: the pool, or pool[:, first:last] for some layers of it.
        ids: (n,), int32 or int64, each in [0, pages); may repeat.
        staging: (n or more, ...), like pages after the first axis; must not overlap them.
    """
    _copy(ids, pages, staging, False)


def scatter(pages: torch.Tensor, ids: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy rows of the staging buffer into the named pages; ids must not repeat."""
    _copy(ids, pages, staging, True)


@triton.jit
@no_type_check
def _copy_kernel(  # noqa: PLR0913
    pages,
    staging,
    ids,
    page_stride,
    staging_stride,
    words,
    WORDS: tl.constexpr,
    INTO_PAGES: tl.constexpr,
):
    # Axis 0 is the page, axis 1 the part of it. int64: a pool has more than 2^31 words.
    row = tl.program_id(0)
    page = tl.load(ids + row).to(tl.int64)
    part = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = part < words
    in_pool = pages + page * page_stride + part
    in_staging = staging + row.to(tl.int64) * staging_stride + part
    if INTO_PAGES:
        tl.store(in_pool, tl.load(in_staging, mask=inside), mask=inside)
    else:
        tl.store(in_staging, tl.load(in_pool, mask=inside), mask=inside)
