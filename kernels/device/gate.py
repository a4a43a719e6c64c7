"""The gate of an MLP on a device: silu of one half, times the other half, rounded once.

    y[r, i] = g / (1 + exp(-g)) * x[r, width + i]    with g = x[r, i]

Bound: memory; it reads twice what it writes. kernels/activation is the same on a CPU, in place.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import OPTIONS

BLOCK = 1024  # elements of a program

# The reference is kernels.activation.silu_mul_reference.


def silu_gate(x: torch.Tensor) -> torch.Tensor:
    """Gate the second half of each row with the first.

    Args:
        x: (rows, 2 * width), gate first, contiguous.

    Returns:
        (rows, width), same dtype.
    """
    assert x.is_contiguous(), "x is not contiguous"
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    _silu_kernel[(rows, triton.cdiv(width, BLOCK))](
        x, out, width, BLOCK=BLOCK, num_warps=4, **OPTIONS
    )
    return out


@triton.jit
@no_type_check
def _silu_kernel(x, out, width, BLOCK: tl.constexpr):
    # One program, BLOCK elements of one row.
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x + row * 2 * width + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, mask=inside, other=0).to(tl.float32)
    # exp(-g) overflows to infinity for large negative g, and the quotient is then the right 0.
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)
