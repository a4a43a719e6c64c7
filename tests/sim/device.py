"""Where kernels are tested: in Triton's interpreter, with sizes that it can bear, or, with
TRITON_INTERPRET=0, on a GPU (make test-gpu)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from kvist.kernels.device.paged import Paged

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
# What stands in for a device computes on the host, where only the interpreter runs kernels.
interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="in Triton's interpreter only")
on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="on a GPU only: make test-gpu")
DTYPES = [torch.float32, torch.bfloat16]
# Rounding of float32 arithmetic. Matrix units truncate where they add up: one ulp and not half.
ULP32 = torch.finfo(torch.float32).eps


def sizes(small: list[Any], real: list[Any]) -> list[Any]:
    """Parameters for everywhere, and others for a GPU only."""
    marks = [pytest.mark.gpu, on_gpu]
    return [*small, *(pytest.param(one, marks=marks, id=f"real-{one}") for one in real)]


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of rounding once to this dtype.

    Half an ulp on a GPU; the interpreter cuts off what is too much: a whole one.
    """
    cut_off = DEVICE.type == "cpu" and dtype != torch.float32
    return torch.finfo(dtype).eps / (1 if cut_off else 2)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_pages(
    lengths: list[int], shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> Paged:
    """Sequences in pages of no order. What none of them owns is NaN, and so is what a page holds
    after the end of its sequence: a kernel that reads it is found out.

    Args:
        lengths: of the sequences.
        shape: layers, kv_heads, block_tokens, head_dim.
        dtype: of the pool.
        seed: of order and contents.
    """
    layers, kv_heads, block_tokens, head_dim = shape
    needed = [-(-length // block_tokens) for length in lengths]
    pages = sum(needed) + 2
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).tolist()
    # The values are random in the pool's own dtype; float8 has no random numbers.
    pool = randn(pages, layers, 2, kv_heads, block_tokens, head_dim, seed=seed)
    tables = torch.zeros((len(lengths), max(needed) + 1), dtype=torch.int32)
    owned = torch.zeros((pages, block_tokens), dtype=torch.bool)
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        mine, order = order[:count], order[count:]
        tables[row, :count] = torch.tensor(mine, dtype=torch.int32)
        for place, page in enumerate(mine):
            owned[page, : length - place * block_tokens] = True
    unowned = ~owned[:, None, None, None, :, None].to(DEVICE)
    pool = pool.masked_fill(unowned, float("nan")).to(dtype)
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return Paged(pool, tables.to(DEVICE), counts)
