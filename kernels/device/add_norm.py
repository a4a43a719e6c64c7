"""Add to the residual stream and scale each row of it to unit mean square, in one pass.

    residual[r] += x[r]
    y[r]         = residual[r] / sqrt(mean(residual[r]^2) + eps) * weight

Bound: memory; x, residual and y are touched once. The sum is rounded to the dtype of the stream
before it is normalized, as if the two were done one after the other (kernels/norm).
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import OPTIONS
from kvist.kernels.norm import rms_norm_reference

WIDTH_MAX = 16384  # elements of a row, which one program holds in registers
WARP_ELEMENTS = 512  # of a row, for each warp; 4096 elements take 8 warps


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The meaning of the norm, in float64; the sum is rounded to the dtype of residual."""
    return rms_norm_reference((residual.double() + x.double()).to(residual.dtype), weight, eps)


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add and normalize rows; sums and means are taken in float32.

    Args:
        x: (rows, width), contiguous, or None where there is nothing to add yet.
        residual: (rows, width), same dtype, contiguous; x is added to it in place.
        weight: (width,).
        eps: added to the mean square, > 0.

    Returns:
        (rows, width), same dtype.
    """
    rows, width = residual.shape
    assert width <= WIDTH_MAX, f"rows of at most {WIDTH_MAX} elements"
    assert residual.is_contiguous(), "residual is not contiguous"
    assert x is None or (x.is_contiguous() and x.shape == residual.shape), "x is not like residual"
    block = triton.next_power_of_2(width)
    out = torch.empty_like(residual)
    _add_norm_kernel[(rows,)](
        residual if x is None else x,
        residual,
        weight,
        out,
        eps,
        WIDTH=width,
        BLOCK=block,
        ADDS=x is not None,
        num_warps=min(max(block // WARP_ELEMENTS, 1), 16),
        **OPTIONS,
    )
    return out


@triton.jit
@no_type_check
def _add_norm_kernel(  # noqa: PLR0913
    x,
    residual,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    # One program, one row.
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < WIDTH
    row = tl.load(residual + place, mask=inside, other=0).to(tl.float32)
    if ADDS:
        row += tl.load(x + place, mask=inside, other=0).to(tl.float32)
        rounded = row.to(residual.dtype.element_ty)
        tl.store(residual + place, rounded, mask=inside)
        row = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps)
    scale = tl.load(weight + tl.arange(0, BLOCK), mask=inside, other=0).to(tl.float32)
    tl.store(out + place, (row * factor * scale).to(out.dtype.element_ty), mask=inside)
