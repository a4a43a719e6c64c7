"""Blocks out of shared slots a few layers at a time, so that a model can begin with the first ones.

A block is page-first, so the K and V of consecutive layers are one run of its bytes. Group by group
the runs of all blocks are copied, and each run goes into its block's checksum while it is in the
processor's cache. What a checksum covers is the whole block: nothing that was computed with the
first layers may be trusted before `verdict` has compared it and the slot's generation.

A block may still be on its way into its slot, from flash. Then each run is waited for, for as long
as there is patience; a block that is late is given up, with all behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import xxhash

from kvist.proto.errors import BlockCorrupt, BlockMissing, BlockTorn
from kvist.proto.record import Bytes
from kvist.proto.slot import SlotReader
from kvist.transfer.device import Target

# Bytes of a run from which a loop in Python costs next to nothing: 0.81 of a memcpy with runs of
# 32 KiB, over 0.95 with 256 KiB.
RUN_BYTES = 256 << 10

Lost: TypeAlias = BlockCorrupt | BlockMissing | BlockTorn
"""Why a block does not come."""


def layer_cuts(layers: int, payload_bytes: int, run_bytes: int = RUN_BYTES) -> tuple[int, ...]:
    """Into which groups of layers a block is cut.

    The first group is one layer, so that the computation can begin; each is twice as long as the
    one before it, so that the next has come when it is computed, up to as many as make a run of
    run_bytes.

    Returns:
        the layer after each group, ascending; the last is layers.
    """
    longest = max(1, -(-run_bytes * layers // payload_bytes))
    cuts, step = [1], 2
    while cuts[-1] < layers:
        cuts.append(min(layers, cuts[-1] + min(step, longest)))
        step *= 2
    return tuple(cuts)


class LayerStream:
    """One load. Used by one thread.

    Args:
        readers: of the blocks' slots.
        outs: where they go, each payload_bytes long; undefined until verdict.
        summed: whether the payload's checksum is compared, of each block.
        patience: waits a moment for a block that rises; False when it is over.
    """

    def __init__(
        self,
        readers: Sequence[SlotReader],
        outs: Sequence[Bytes | Target],
        summed: Sequence[bool],
        patience: Callable[[], bool],
    ) -> None:
        self._readers = readers
        self._outs = outs
        self._sums = [xxhash.xxh3_64() if sum_it else None for sum_it in summed]
        # Those of blocks that a device copies by itself are taken at the end, beside the copy.
        self._late = [False] * len(readers)
        self._patience = patience
        self._end = len(readers)
        self._lost: Lost | None = None

    def copy(self, cuts: Sequence[int], before: Callable[[int], None]) -> Iterator[int]:
        """Copy group by group, to a device: begin to.

        Args:
            cuts: see layer_cuts.
            before: told the bytes of each run before it is copied; may wait.

        Yields:
            layers that have come, or are on their way, as long as no block is given up.
        """
        first = 0
        for cut in cuts:
            for block, reader in enumerate(self._readers):
                layer_bytes = self._outs[block].nbytes // cuts[-1]
                run = slice(first * layer_bytes, cut * layer_bytes)
                if block >= self._end or not self._comes(block, run.stop):
                    break
                before(run.stop - run.start)
                self._copy(block, reader.payload[run], run)
            first = cut
            if self._lost is None:
                yield cut

    def _comes(self, block: int, count: int | None) -> bool:
        """Wait until so many bytes of a block are there, None: until it is published; or give it
        up, and whether that was not so."""
        try:
            while not self._readers[block].has(count):
                if not self._patience():
                    raise BlockMissing("the block did not rise in time")
        except (BlockMissing, BlockTorn) as error:
            self._end, self._lost = block, error
        return block < self._end

    def settle(self) -> None:
        """Wait until nothing is copied any more; called whatever happened."""
        for out in self._outs:
            if not isinstance(out, np.ndarray):
                out.settle()

    def verdict(self) -> tuple[int, Lost | None]:
        """Once everything is copied: how many leading blocks are what was asked, and what is wrong
        with the next one."""
        for block in range(self._end):
            if not self._comes(block, None):
                break
        for summed, late, reader in zip(self._sums, self._late, self._readers, strict=True):
            if summed is not None and late:
                summed.update(reader.payload.data)
        # Before the generations are looked at: a device reads the slots until then.
        self.settle()
        for block, summed in enumerate(self._sums[: self._end]):
            try:
                self._readers[block].check(None if summed is None else summed.intdigest())
            except (BlockCorrupt, BlockMissing, BlockTorn) as error:
                return block, error
        return self._end, self._lost

    def _copy(self, block: int, source: Bytes, run: slice) -> None:
        out, summed = self._outs[block], self._sums[block]
        if not isinstance(out, np.ndarray):
            self._late[block] = not out.take(source, run.start, summed)
            return
        target = out[run]
        # Both let go of the interpreter's lock.
        np.copyto(target, source)
        if summed is not None:
            summed.update(target.data)
