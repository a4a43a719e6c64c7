"""How full vLLM's own pool of blocks is, told to the sidecar for its page: the HBM tier.

A block counts that requests hold or that is kept to be found again. vLLM counts only the former
and calls the others free; so they are counted here, a few at each step: 5 us.
"""

from __future__ import annotations

from typing import Any

from kvist.cachesvc.client import CacheClient

STEP_BLOCKS = 128


class PoolGauge:
    """Goes round vLLM's blocks; on the scheduler's thread.

    Args:
        pool: vLLM's BlockPool, whose null block is no room for anything.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._at = self._filled = 0

    def step(self, cache: CacheClient, ranks: int) -> None:
        """Look at the next STEP_BLOCKS; after the last of all tell how many are filled.

        Args:
            ranks: workers, each of which has a part of every block, a block of the cache.
        """
        blocks, null = self._pool.blocks, self._pool.null_block
        stop = self._at + STEP_BLOCKS
        for block in blocks[self._at : stop]:
            if (block.ref_cnt or block.block_hash is not None) and block is not null:
                self._filled += 1
        self._at = stop
        if stop >= len(blocks):
            total = len(blocks) - 1
            cache.show_rates(
                {"pool_blocks.total": total * ranks, "pool_blocks.filled": self._filled * ranks}
            )
            self._at = self._filled = 0
