"""What the launches of Triton kernels have in common."""

from __future__ import annotations

from typing import Final, no_type_check

import torch
import triton
import triton.language as tl

# What decides the bits of a result besides the operands. The first number changes whenever a kernel
# of this folder gives other bits: engines of two releases then share no blocks.
RELEASE: Final = f"kvist-triton-1/triton-{triton.__version__}"
# No product is fused with the sum after it. A compiler fuses where nothing stands between the two,
# so a masked and an unmasked step of the same attention would round differently; and Triton's
# default is to change from one release to the next.
OPTIONS: Final = {"enable_fp_fusion": False}
# 4 programs of 4 warps keep 4 * 38 KiB of loads in flight on a multiprocessor of a Hopper, 112
# registers a thread (the compiler's report); 25 KiB would cover its latency. Not yet measured.
PROGRAMS_PER_SM = 4
# Without a device the grid only has to be smaller than the work, so that the loop is tested.
INTERPRETED_PROGRAMS = 3


def dot_precision(x: torch.Tensor) -> str:
    """How dot multiplies operands like x.

    Float32 is multiplied as float32, "ieee": tf32, Triton's default, errs by 3e-4. Triton's
    interpreter takes bfloat16 for integers; there operands are made "wide", which is exact.
    """
    if x.dtype == torch.float32:
        return "ieee"
    return "tf32" if x.is_cuda else "wide"


def grid_programs(device: torch.device) -> int:
    """Programs of a persistent grid on this device."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * PROGRAMS_PER_SM


@triton.jit
@no_type_check
def dot(a, b, acc, PRECISION: tl.constexpr):
    # acc + a . b, summed in float32.
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)
