"""Weights in the tiles of kernels.cpu.linear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvist.kernels.cpu.linear import BF16, INT4, INT8, TILE
from kvist.kernels.cpu.work import aligned
from kvist.kernels.groups import GROUP, Grouped

Octets = npt.NDArray[np.uint8]


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
    # (tile, group, pair, output, input of the pair)
    pairs = codes.view(tiles, TILE, groups, GROUP // 2, 2).permute(0, 2, 3, 1, 4)
    if weight.bits == 8:
        packed = pairs.reshape(tiles, groups, -1).contiguous().view(torch.uint8)
    else:
        low, high = pairs.split(TILE // 2, dim=3)
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
