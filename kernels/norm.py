"""Scale each row to unit mean square.

    y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight

Bound: memory; each row is read once or twice and written once. Rows are reduced one by one, so a
row's result does not depend on the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The meaning of rms_norm, in float64."""
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize rows; the mean is taken in float32 whatever the dtype.

    Args:
        x: (rows, width).
        weight: (width,), same dtype and device.
        eps: added to the mean square, > 0.

    Returns:
        (rows, width), same dtype.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
