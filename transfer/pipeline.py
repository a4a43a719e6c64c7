"""Blocks out of shared slots a few layers at a time, so that a model can begin with the first ones.

A block is page-first, so the K and V of consecutive layers are one run of its bytes. Group by group
the runs of all blocks are copied, and each run goes into its block's checksum while it is in the
processor's cache. What a checksum covers is the whole block: nothing that was computed with the
first layers may be trusted before `verdict` has compared it and the slot's generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xxhash

from kvist.proto.errors import BlockCorrupt, BlockTorn
from kvist.proto.record import Bytes
from kvist.proto.slot import SlotReader
from kvist.transfer.device import Target

# Bytes of a run from which a loop in Python costs next to nothing: 0.81 of a memcpy with runs of
# 32 KiB, over 0.95 with 256 KiB.
RUN_BYTES = 256 << 10


def layer_cuts(layers: int, payload_bytes: int, run_bytes: int = RUN_BYTES) -> tuple[int, ...]:
    """Into which groups of layers a block is cut.

    The first group is one layer, so that the computation can begin; the others are as many as make
    a run of run_bytes.

    Returns:
        the layer after each group, ascending; the last is layers.
    """
    step = max(1, -(-run_bytes * layers // payload_bytes))
    return (*range(1, layers, step), layers)


class LayerStream:
    """One load. Used by one thread.

    Args:
        readers: of the blocks' slots.
        outs: where they go, each payload_bytes long; undefined until verdict.
        summed: whether the payload's checksum is compared, of each block.
    """

    def __init__(
        self, readers: Sequence[SlotReader], outs: Sequence[Bytes | Target], summed: Sequence[bool]
    ) -> None:
        self._readers = readers
        self._outs = outs
        self._sums = [xxhash.xxh3_64() if sum_it else None for sum_it in summed]
        # Those of blocks that a device copies by itself are taken at the end, beside the copy.
        self._late = [False] * len(readers)

    def copy(self, cuts: Sequence[int], before: Callable[[int], None]) -> Iterator[int]:
        """Copy group by group, to a device: begin to.

        Args:
            cuts: see layer_cuts.
            before: told the bytes of each run before it is copied; may wait.

        Yields:
            layers that have come, or are on their way.
        """
        first = 0
        for cut in cuts:
            for block, reader in enumerate(self._readers):
                layer_bytes = self._outs[block].nbytes // cuts[-1]
                run = slice(first * layer_bytes, cut * layer_bytes)
                before(run.stop - run.start)
                self._copy(block, reader.payload[run], run)
            first = cut
            yield cut

    def settle(self) -> None:
        """Wait until nothing is copied any more; called whatever happened."""
        for out in self._outs:
            if not isinstance(out, np.ndarray):
                out.settle()

    def verdict(self) -> tuple[int, BlockCorrupt | BlockTorn | None]:
        """Once everything is copied: how many leading blocks are what was asked, and what is wrong
        with the next one."""
        for summed, late, reader in zip(self._sums, self._late, self._readers, strict=True):
            if summed is not None and late:
                summed.update(reader.payload.data)
        # Before the generations are looked at: a device reads the slots until then.
        self.settle()
        for block, (reader, summed) in enumerate(zip(self._readers, self._sums, strict=True)):
            try:
                reader.check(None if summed is None else summed.intdigest())
            except (BlockCorrupt, BlockTorn) as error:
                return block, error
        return len(self._readers), None

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
