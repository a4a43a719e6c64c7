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

# Bytes of a run from which a loop in Python costs next to nothing: 0.81 of a memcpy with runs of
# 32 KiB, over 0.95 with 256 KiB.
RUN_BYTES = 256 << 10


def layer_cuts(layers: int, payload_bytes: int) -> tuple[int, ...]:
    """Into which groups of layers a block is cut.

    The first group is one layer, so that the computation can begin; the others are as many as make
    a run of RUN_BYTES.

    Returns:
        the layer after each group, ascending; the last is layers.
    """
    step = max(1, -(-RUN_BYTES * layers // payload_bytes))
    return (*range(1, layers, step), layers)


class LayerStream:
    """One load. Used by one thread.

    Args:
        readers: of the blocks' slots.
        outs: where they go, each (payload_bytes,), uint8, writable; undefined until verdict.
        summed: whether the payload's checksum is compared, of each block.
    """

    def __init__(
        self, readers: Sequence[SlotReader], outs: Sequence[Bytes], summed: Sequence[bool]
    ) -> None:
        self._readers = readers
        self._outs = outs
        self._sums = [xxhash.xxh3_64() if sum_it else None for sum_it in summed]

    def copy(self, cuts: Sequence[int], before: Callable[[int], None]) -> Iterator[int]:
        """Copy group by group.

        Args:
            cuts: see layer_cuts.
            before: told the bytes of each run before it is copied; may wait.

        Yields:
            layers that have come.
        """
        first = 0
        for cut in cuts:
            for reader, out, summed in zip(self._readers, self._outs, self._sums, strict=True):
                layer_bytes = len(out) // cuts[-1]
                run = slice(first * layer_bytes, cut * layer_bytes)
                before(run.stop - run.start)
                target = out[run]
                # Both let go of the interpreter's lock.
                np.copyto(target, reader.payload[run])
                if summed is not None:
                    summed.update(target.data)
            first = cut
            yield cut

    def verdict(self) -> tuple[int, BlockCorrupt | BlockTorn | None]:
        """Once everything is copied: how many leading blocks are what was asked, and what is wrong
        with the next one."""
        for block, (reader, summed) in enumerate(zip(self._readers, self._sums, strict=True)):
            try:
                reader.check(None if summed is None else summed.intdigest())
            except (BlockCorrupt, BlockTorn) as error:
                return block, error
        return len(self._readers), None
