"""Weights in the tiles of kernels.cpu.linear, and what 4 and 8 bits make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvist.kernels.cpu.linear import BF16, GROUP, INT4, INT8, TILE
from kvist.kernels.cpu.work import aligned

Octets = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """A weight in groups of 32 inputs: value = code * scale + offset, in float32, then bfloat16.

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
        wide = self.codes.unflatten(1, (-1, GROUP)).float() * self.scales.float()[:, :, None]
        if self.offsets is not None:
            wide = wide + self.offsets.float()[:, :, None]
        return wide.flatten(1)

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
    groups = weight.float().unflatten(1, (-1, GROUP))
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


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """A packed weight.

    Attributes:
        data: its tiles, 64-byte aligned.
        kind: BF16, INT8 or INT4 of linear.
    """

    data: Octets
    kind: int

    @property
    def address(self) -> int:
        """Where the tiles begin."""
        return int(self.data.ctypes.data)


def pack(weight: torch.Tensor | Grouped) -> Tiles:
    """Put a weight into tiles; rows of zeros fill the last one.

    Args:
        weight: (outputs, inputs): bfloat16 with an even number of inputs, or Grouped.
    """
    if isinstance(weight, Grouped):
        return _pack_groups(weight)
    rows = _whole_tiles(weight)
    tiles = rows.view(-1, TILE, rows.shape[1] // 2, 2).permute(0, 2, 1, 3).contiguous()
    return Tiles(_own(tiles.view(torch.uint8).flatten()), BF16)


def _pack_groups(weight: Grouped) -> Tiles:
    codes = _whole_tiles(weight.codes)
    tiles, groups = len(codes) // TILE, codes.shape[1] // GROUP
    # (tile, group, pair, eighth of a tile's outputs, output, input of the pair)
    pairs = codes.view(tiles, 4, 8, groups, GROUP // 2, 2).permute(0, 3, 4, 1, 2, 5)
    if weight.bits == 8:
        packed = pairs.reshape(tiles, groups, -1).contiguous().view(torch.uint8)
    else:
        low, high = pairs[:, :, :, 0::2], pairs[:, :, :, 1::2]
        packed = (low | high << 4).reshape(tiles, groups, -1)
    numbers = [weight.scales] if weight.offsets is None else [weight.scales, weight.offsets]
    heads = [
        _whole_tiles(number).view(tiles, TILE, groups).transpose(1, 2).contiguous()
        for number in numbers
    ]
    parts = [*(head.view(torch.uint8) for head in heads), packed]
    kind = INT8 if weight.bits == 8 else INT4
    return Tiles(_own(torch.cat(parts, dim=2).flatten()), kind)


def _whole_tiles(rows: torch.Tensor) -> torch.Tensor:
    missing = -len(rows) % TILE
    if not missing:
        return rows.contiguous()
    return torch.cat((rows, rows.new_zeros((missing, rows.shape[1]))))


def _own(data: torch.Tensor) -> Octets:
    room = aligned(data.numel())
    room[:] = data.numpy()
    return room


def gate_up_order(inner: int) -> torch.Tensor:
    """The rows of gate and up, one below the other, so that a tile has 16 of each."""
    first = torch.arange(inner).view(-1, TILE // 2)
    return torch.stack((first, first + inner), dim=1).flatten()
