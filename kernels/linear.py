"""Multiply rows by a weight that is packed once, for the layers of a model.

    y[r, o] = sum_i x[r, i] * weight[o, i]

Bound: memory for few rows (the weight is read once a call), arithmetic from about 64 rows on.

A row's result must not depend on how many rows are beside it, or a cached answer would differ from
a computed one. oneDNN on packed weights keeps that promise (checked for 1 to 1000 rows, one and two
threads), but for one row over long inputs, which is why ROW_PAIR_INPUTS exists. Plain float32
F.linear (MKL) does not keep it, and bfloat16 F.linear costs 1.6 times as much at one row.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

# From 1152 inputs on, oneDNN's kernel for one row adds up in another order than the one for two
# rows (seen in float32 for every shape, in bfloat16 for one output in some thousands); with 1024
# and fewer inputs all rows of 48 agreed. Two rows cost 7% more than one.
ROW_PAIR_INPUTS = 1024


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The meaning of Linear, in float64."""
    return x.double() @ weight.double().T


def best_cpu_dtype() -> torch.dtype:
    """The dtype to compute in on this processor.

    Returns:
        torch.bfloat16 where the processor multiplies it faster than float32, else torch.float32.
        Having the instructions is not enough: with 576 inputs and 512 rows on one thread, a Zen 4
        does 203 GFLOP/s in bfloat16 and 105 in float32, an Intel Xeon without AMX 75 and 120.
        A rule and not a measurement at the start, because engines of one host must agree: they
        share no blocks of different dtypes.
    """
    if not _packs(torch.bfloat16):
        return torch.float32
    fast = torch.cpu._is_amx_tile_supported() or "AuthenticAMD" in _processor()
    return torch.bfloat16 if fast else torch.float32


def _processor() -> str:
    """What Linux says of the first processor; "" elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return ""


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype and multiplies them in hardware."""
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(
            torch.cpu._is_avx512_bf16_supported()
        )
    return dtype == torch.float32


class Linear:
    """A weight ready to multiply rows by: packed by oneDNN on a CPU, plain elsewhere.

    Where oneDNN is missing the plain product is used, and then a row may depend on its neighbours
    in the last bit.

    Args:
        weight: (outputs, inputs), bfloat16 or float32. It is copied where it is packed.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        self._packed = weight.device.type == "cpu" and _packs(weight.dtype)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self._packed else weight
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Args:
            x: (rows, inputs), the weight's dtype and device, rows >= 1.

        Returns:
            (rows, outputs), same dtype.
        """
        if not self._packed:
            return F.linear(x, self._weight)
        if x.shape[0] == 1 and self.inputs >= ROW_PAIR_INPUTS:
            return self._multiply(x.expand(2, -1).contiguous())[:1]
        return self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return y
