"""Weights of 4 and 8 bits in groups of 32 inputs, as GGUF files have them (Q4_0, Q4_1, Q8_0).

    value = code * scale + offset

A product with codes (kernels/cpu/linear) does not round these values to bfloat16, as one with the
dequantized weight does, so the two differ in bits: models that compute with codes have a
fingerprint of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP = 32


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """A weight in groups of 32 inputs: value = code * scale + offset.

    Attributes:
        codes: (outputs, inputs): int8, or uint8 in [0, 16).
        scales: (outputs, inputs / 32), float16.
        offsets: same shape, float16; None (that is 0) for 8 bits.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 8 if self.offsets is None else 4

    def values(self) -> torch.Tensor:
        """(outputs, inputs), float32."""
        outputs, inputs = self.codes.shape
        groups = self.codes.view(outputs, -1, GROUP).float()
        groups *= self.scales.float()[:, :, None]
        if self.offsets is not None:
            groups += self.offsets.float()[:, :, None]
        return groups.view(outputs, inputs)

    def rows(self, order: torch.Tensor) -> Grouped:
        """Some rows, in this order."""
        offsets = None if self.offsets is None else self.offsets[order]
        return Grouped(self.codes[order], self.scales[order], offsets)


def joined(parts: Sequence[Grouped]) -> Grouped:
    """The rows of several weights with equally many bits, one after the other."""
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Grouped(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(offsets) if offsets else None,
    )


def to_groups(weight: torch.Tensor, bits: int) -> Grouped:
    """Round a weight to 4 or 8 bits.

    8 bits: the largest magnitude of a group is 127. 4 bits: its least value is 0, its largest 15.

    Args:
        weight: (outputs, inputs), inputs a multiple of 32.
        bits: 4 or 8.
    """
    groups = weight.float().reshape(len(weight), -1, GROUP)
    if bits == 8:
        scales = (groups.abs().amax(-1) / 127).half()
        offsets = None
        shifted, low, high = groups, -127, 127
    else:
        least = groups.amin(-1)
        offsets = least.half()
        scales = ((groups.amax(-1) - least) / 15).half()
        shifted, low, high = groups - offsets.float()[:, :, None], 0, 15
    steps = scales.float()[:, :, None]
    codes = (shifted / torch.where(steps == 0, 1.0, steps)).round_().clamp_(low, high)
    return Grouped(codes.flatten(1).to(torch.int8 if bits == 8 else torch.uint8), scales, offsets)
