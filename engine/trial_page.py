"""A page for the cache's trial, written and read by the model's own indices."""

from __future__ import annotations

import torch

from kvist.proto.layout import DTYPE_BYTES, PATTERN_STEPS, BlockFormat
from kvist.proto.record import Bytes
from kvist.tiers.hbm import PagePool
from kvist.transfer.device import Pinner

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class PoolPage:
    """See worker.trial.TrialPage. The page is of a pool of its own, made as the model's is made.

    Args:
        format: of the pool's pages. device: where the pool is. pinner: see TrialPage.
    """

    def __init__(
        self, format: BlockFormat, device: str = "cpu", pinner: Pinner | None = None
    ) -> None:
        self.pinner = pinner
        self._format = format
        self._device = device

    def _pattern(self) -> torch.Tensor:
        """What is at (layer, kind, head, token, dim), as integers as wide as an element."""
        format, device = self._format, self._device
        total = torch.zeros(1, dtype=torch.int64, device=device)
        axes = (
            ("layer", range(format.first_layer, format.first_layer + format.layers)),
            ("kind", range(2)),
            ("head", range(format.first_head, format.first_head + format.kv_heads)),
            ("token", range(format.block_tokens)),
            ("dim", range(format.head_dim)),
        )
        for at, (axis, positions) in enumerate(axes):
            steps = torch.tensor(positions, device=device) * PATTERN_STEPS[axis]
            total = total + steps.view(-1, *[1] * (len(axes) - 1 - at))
        return total.to(_INTEGERS[DTYPE_BYTES[format.dtype]])

    def _elements(self, pool: PagePool) -> torch.Tensor:
        return pool.tensor.view(_INTEGERS[DTYPE_BYTES[self._format.dtype]])[0]

    def written(self) -> Bytes:
        """See TrialPage.written."""
        pool = PagePool(self._format, 1, self._device)
        self._elements(pool).copy_(self._pattern())
        return pool.page_bytes(0).copy()

    def reads(self, payload: Bytes) -> bool:
        """See TrialPage.reads."""
        pool = PagePool(self._format, 1, self._device)
        page = pool.tensor.view(1, -1).view(torch.uint8)[0]
        page.copy_(torch.from_numpy(payload))
        return bool(torch.equal(self._elements(pool), self._pattern()))
