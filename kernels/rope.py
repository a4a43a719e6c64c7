"""Rotary position embedding: turn pairs of elements by an angle that grows with the position.

    angle[p, i] = p / theta^(2i / head_dim) / divisor[i]
    y[i]        = x[i] cos - x[i + half] sin
    y[i + half] = x[i + half] cos + x[i] sin         for i in [0, half), half = head_dim / 2

Bound: memory. Angles come from a table made once, not from cos and sin per step: torch computes
those differently in the middle and at the end of a tensor, and a position's angle must not depend
on the batch. Pairs are (i, i + half), the layout of Hugging Face checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Rows turned at a time: their float32 copies then stay in the processor's cache. 2048 rows of 12
# heads of 64: 1.9 ms with 128, 2.3 ms with 32 or 256, 7.2 ms all at once.
CACHE_ROWS = 128


@dataclass(frozen=True, slots=True)
class RopeParams:
    """What decides the angles.

    Attributes:
        theta: base of the frequencies.
        head_dim: elements of a head, even.
        positions: rows of the table; positions are in [0, positions).
        divisors: one per pair, divides its frequency; empty for plain RoPE. Linear scaling is the
            same divisor everywhere, Llama 3 scaling has more for the slow pairs.
    """

    theta: float
    head_dim: int
    positions: int
    divisors: tuple[float, ...] = ()


def inverse_frequencies(theta: float, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair, before any scaling: (head_dim / 2,), float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / torch.pow(torch.tensor(theta, dtype=torch.float32), exponents)


def llama3_divisors(
    params: RopeParams, factor: float, low: float, high: float, original_positions: int
) -> tuple[float, ...]:
    """Llama 3's context extension: slow pairs are slowed by factor, fast ones are left.

    Source: `_compute_llama3_parameters` of transformers' modeling_rope_utils.

    Args:
        params: theta and head_dim are read.
        factor: how much the slow pairs are slowed.
        low: pairs that turn fewer times than this over original_positions are slow.
        high: pairs that turn more often than this are fast; between the two, a linear blend.
        original_positions: context of the pretraining.
    """
    divisors = []
    for frequency in inverse_frequencies(params.theta, params.head_dim).tolist():
        turns = original_positions * frequency / (2 * math.pi)
        fast = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - fast) / factor + fast))
    return tuple(divisors)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin of every angle.

    Attributes:
        cos: (positions, head_dim / 2), float32.
        sin: same shape.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rope_table(params: RopeParams, device: str = "cpu") -> RopeTable:
    """Compute the table in float32, as transformers does, so that both see the same angles."""
    frequencies = inverse_frequencies(params.theta, params.head_dim)
    if params.divisors:
        frequencies = frequencies / torch.tensor(params.divisors, dtype=torch.float32)
    angles = torch.outer(torch.arange(params.positions, dtype=torch.float32), frequencies)
    return RopeTable(angles.cos().to(device), angles.sin().to(device))


def rope_reference(x: torch.Tensor, positions: torch.Tensor, params: RopeParams) -> torch.Tensor:
    """The meaning of rope, in float64: x is (rows, heads, head_dim), positions (rows,)."""
    half = params.head_dim // 2
    pairs = torch.arange(half, dtype=torch.float64)
    frequencies = params.theta ** (-2 * pairs / params.head_dim)
    if params.divisors:
        frequencies = frequencies / torch.tensor(params.divisors, dtype=torch.float64)
    angle = (positions.double()[:, None] * frequencies)[:, None, :]
    first, second = x.double()[..., :half], x.double()[..., half:]
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.cat(turned, dim=-1)


@dataclass(frozen=True, slots=True)
class RopeStep:
    """The angles of one step's rows, gathered once for all layers.

    Attributes:
        cos: (rows, heads, head_dim), float32, times each head's scale.
        sin: same shape; negative in the first half.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rope_step(table: RopeTable, positions: torch.Tensor, scales: torch.Tensor) -> RopeStep:
    """Look up the angles of a step's rows.

    Args:
        table: of the model.
        positions: (rows,), int64, each in [0, table positions).
        scales: (heads,), float32: multiplies a head while it is turned, which is how the
            1 / sqrt(head_dim) of attention costs nothing and is rounded once.
    """
    cos, sin = table.cos[positions], table.sin[positions]
    scale = scales[:, None]
    return RopeStep(
        torch.cat((cos, cos), dim=-1)[:, None, :] * scale,
        torch.cat((-sin, sin), dim=-1)[:, None, :] * scale,
    )


def rope(x: torch.Tensor, step: RopeStep) -> torch.Tensor:
    """Turn every head of every row by its row's position.

    Args:
        x: (rows, heads, head_dim); the last dimension is contiguous.
        step: from rope_step, with the same rows and heads.

    Returns:
        A new tensor, same shape and dtype; computed in float32 and rounded once.
    """
    half = x.shape[-1] // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for first in range(0, x.shape[0], CACHE_ROWS):
        rows = slice(first, first + CACHE_ROWS)
        wide = x[rows].to(torch.float32, copy=True)
        swapped = torch.cat((wide[..., half:], wide[..., :half]), dim=-1).mul_(step.sin[rows])
        out[rows] = wide.mul_(step.cos[rows]).add_(swapped)
    return out
