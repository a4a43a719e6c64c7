"""Keys and values in a pool whose numbers are narrower than the computation's.

    stored = round(clamp(x / scale, -limit, limit))        read as stored * scale

Only float8 (e4m3) has a scale. It keeps 3 bits of mantissa, so a value errs by a sixteenth of
itself at most; below 2^-6 * scale its steps stay 2^-9 * scale; its limit is 448. Numbers beyond
the limit are clamped: an infinity in a page, or float8's NaN, would be NaN in every answer that
reads it. On a device the kernel that writes pages does this (device/rope_store).
"""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn
# Largest finite number of dtypes whose range is smaller than the computation's.
LIMITS = {FLOAT8: 448.0, torch.float16: 65504.0}
# Bits of an e4m3 number: those without the sign, of its largest number, of its exponent.
_MAGNITUDE, _LARGEST, _EXPONENT = 0x7F, 0x7E, 0x78


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in another dtype: clamped to its range, rounded to nearest, ties to even."""
    limit = LIMITS.get(dtype)
    return (x if limit is None else x.clamp(-limit, limit)).to(dtype)


def to_float8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """What a float8 page holds of some numbers.

    Args:
        x: any shape, floating point.
        scale: > 0.

    Returns:
        The same shape, float8_e4m3fn; times scale it stands for x.
    """
    return narrowed(x.float() / scale, FLOAT8)


def range_shares(codes: torch.Tensor) -> tuple[float, float]:
    """How well a scale fits: the shares of numbers at both ends of float8's range.

    Args:
        codes: any shape, float8_e4m3fn, at least one.

    Returns:
        Those that are the largest number, as whatever lies beyond it was clamped; and those below
        2^-6, the smallest with all bits of mantissa.
    """
    magnitude = codes.view(torch.uint8) & _MAGNITUDE
    largest, small = magnitude == _LARGEST, (magnitude & _EXPONENT) == 0
    return float(largest.float().mean()), float(small.float().mean())
