"""The gate of an MLP: silu of one half, times the other half.

    y[r, i] = g / (1 + exp(-g)) * x[r, width + i]    with g = x[r, i]

Bound: memory; it reads twice what it writes.

torch cuts a large elementwise call into one part per thread, at any element, and computes the last
few elements of a part with another exp (scalar, not vector) that differs in the last bit. Calls
are therefore cut here at whole rows, so that a row's result does not depend on the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# at::internal::GRAIN_SIZE: elementwise calls of no more elements than this stay on one thread.
GRAIN_ELEMENTS = 32768


def silu_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """The meaning of silu_mul, in float64."""
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """Gate the second half of each row with the first.

    Args:
        x: (rows, 2 * width), gate first, contiguous; its first half is overwritten.

    Returns:
        (rows, width), a view of x.
    """
    rows, width = x.shape[0], x.shape[1] // 2
    gate, up = x[:, :width], x[:, width:]
    for first, last in _row_cuts(rows, width, torch.get_num_threads()):
        F.silu(gate[first:last], inplace=True)
    return gate.mul_(up)


def _row_cuts(rows: int, width: int, threads: int) -> list[tuple[int, int]]:
    """Cut rows into calls that torch either leaves whole or splits at whole rows.

    Args:
        rows: rows of the tensor.
        width: elements of a row, at most GRAIN_ELEMENTS for the promise to hold.
        threads: torch's threads.

    Returns:
        (first, last) of each call, in order, without gaps.
    """
    if threads == 1 or rows * width <= GRAIN_ELEMENTS:
        return [(0, rows)]
    even = rows - rows % threads
    # With this many elements torch uses all threads, so parts are even // threads rows each.
    start = even if even * width > threads * GRAIN_ELEMENTS else 0
    step = max(1, GRAIN_ELEMENTS // width)
    cuts = [(0, start)] if start else []
    return cuts + [(at, min(at + step, rows)) for at in range(start, rows, step)]
