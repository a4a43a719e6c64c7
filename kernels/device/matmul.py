"""Multiply rows by a weight so that a row's result does not depend on the rows beside it.

    y[r, o] = sum_i x[r, i] * weight[o, i]

cuBLAS picks another kernel, with another order of additions, for another number of rows. Here the
tile is the same whatever there is: inputs are added up in steps of INPUTS, from the first to the
last, in one accumulator.

Bound: memory for few rows (the weight is read once for every ROWS rows), arithmetic for many.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import OPTIONS, dot, dot_precision

# The tile; part of a row's arithmetic. 64 rows are the least that Hopper's wgmma multiplies.
ROWS = 64
OUTPUTS = 64
INPUTS = 64

# The reference is kernels.linear.linear_reference.


def matmul(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply.

    Args:
        x: (rows, inputs), contiguous.
        weight: (outputs, inputs), same dtype, contiguous.
        out: (rows, outputs), same dtype, contiguous; None makes one.

    Returns:
        (rows, outputs), same dtype; summed in float32 and rounded once.
    """
    assert x.is_contiguous(), "x is not contiguous"
    assert weight.is_contiguous(), "weight is not contiguous"
    assert x.shape[1] == weight.shape[1], "x and weight differ in inputs"
    rows, inputs = x.shape
    outputs = weight.shape[0]
    if out is None:
        out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    assert out.shape == (rows, outputs), "out is of another shape"
    assert out.is_contiguous(), "out is not contiguous"
    # Row tiles are the fast axis: those of one weight tile run together and share it in the L2.
    _matmul_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(outputs, OUTPUTS))](
        x,
        weight,
        out,
        rows,
        outputs,
        inputs,
        ROWS=ROWS,
        OUTPUTS=OUTPUTS,
        INPUTS=INPUTS,
        PRECISION=dot_precision(x),
        num_warps=4,
        **OPTIONS,
        num_stages=4,
    )
    return out


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def _matmul_kernel(  # noqa: PLR0913
    x,
    weight,
    out,
    rows,
    outputs,
    inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program, one tile of the result. rows is not specialized: one code for every batch.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    step = tl.arange(0, INPUTS)
    x_at = x + row.to(tl.int64)[:, None] * inputs + step[None, :]
    w_at = weight + output.to(tl.int64)[None, :] * inputs + step[:, None]
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for at in range(0, inputs, INPUTS):
        inside = at + step < inputs
        left = tl.load(x_at + at, mask=(row < rows)[:, None] & inside[None, :], other=0)
        right = tl.load(w_at + at, mask=(output < outputs)[None, :] & inside[:, None], other=0)
        acc = dot(left, right, acc, PRECISION)
    place = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    mask = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)
