"""The KV memory of a vLLM worker as bytes: one run a layer, gathered and scattered by block.

vLLM's blocks are opaque here. Where they lie is taken from vLLM's own placement (KVCacheTensor)
and shown to be right, once at start, through the tensors that its attention layers use.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvist.engine.host import free_memory_bytes
from kvist.proto.layout import BlockFormat, pattern
from kvist.proto.memory import populate
from kvist.proto.record import Bytes
from kvist.transfer.device import Pinner

Runs = npt.NDArray[np.uint8]


class LayoutRefused(Exception):
    """vLLM's KV memory does not lie as its own placement says, or in a way not served here."""


class BlockMemory:
    """Blocks of all layers. Threads may copy different blocks at once.

    Args:
        runs: shape (layers, blocks, run_bytes), writable, each run contiguous.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._by_block = runs.transpose(1, 0, 2)
        self.layers, self.blocks, self.run_bytes = runs.shape
        self.payload_bytes = self.layers * self.run_bytes

    def populate(self, stop: Event) -> bool:
        """Give blocks that nobody has written yet their memory; for a background thread.

        vLLM reserves its KV memory and touches none of it: the first load into a block would pay
        for its pages. Left alone where less than twice as much is free.

        Args:
            stop: set it to end early.

        Returns: whether all of it is there now.
        """
        layer, block, _ = self._runs.strides
        length = (self.layers - 1) * layer + (self.blocks - 1) * block + self.run_bytes
        first = -self._runs.ctypes.data % mmap.PAGESIZE
        pages = (length - first) // mmap.PAGESIZE
        if pages < 1 or 2 * length > free_memory_bytes():
            return False
        whole: Bytes = np.lib.stride_tricks.as_strided(self._runs, (length,), (1,))
        return populate(whole[first : first + pages * mmap.PAGESIZE].data, stop)

    def gather(self, block: int, out: Bytes) -> None:
        """Copy a block out: one call for all its runs, at 0.9 of a memcpy for runs of 96 KiB.

        Args:
            out: shape (payload_bytes,), uint8.
        """
        np.copyto(out.reshape(self.layers, self.run_bytes), self._by_block[block])

    def scatter(self, block: int, payload: Bytes) -> None:
        """Copy a block in; the reverse of gather."""
        np.copyto(self._by_block[block], payload.reshape(self.layers, self.run_bytes))


def map_memory(placement: Sequence[Any], blocks: int, caches: Mapping[str, torch.Tensor]) -> Runs:
    """See a worker's KV tensors as runs.

    Args:
        placement: KVCacheConfig.kv_cache_tensors.
        blocks: KVCacheConfig.num_blocks.
        caches: layer name -> tensor, as register_kv_caches gets them.

    Returns:
        shape (layers, blocks, run_bytes), sharing memory with the tensors.

    Raises: LayoutRefused.
    """
    if len(placement) != 1:
        raise LayoutRefused(f"KV memory is in {len(placement)} allocations; one is served")
    place = placement[0]
    missing = [name for name in place.layers if name not in caches]
    if missing or len(caches) != len(place.layers):
        raise LayoutRefused(f"layers {missing or sorted(set(caches) - set(place.layers))} "
                            "are not those that vLLM placed")  # fmt: skip
    first = caches[place.layers[0]]
    if any(cache.device.type != "cpu" for cache in caches.values()):
        raise LayoutRefused(f"KV memory is on {first.device}; this release serves vLLM's CPU build")
    storage = first.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    run_bytes = first[0].numel() * first.element_size()
    runs = np.lib.stride_tricks.as_strided(
        raw[place.offset :],
        (len(place.layers), blocks, run_bytes),
        (place.layer_stride, place.block_stride, 1),
    )
    last = place.offset + (len(place.layers) - 1) * place.layer_stride
    if last + (blocks - 1) * place.block_stride + run_bytes > raw.nbytes:
        raise LayoutRefused("vLLM's placement ends behind its allocation")
    for layer, name in enumerate(place.layers):
        _check_layer(runs[layer], caches[name], name)
    return runs


def _check_layer(runs: Runs, cache: torch.Tensor, name: str) -> None:
    """Whether a layer's tensor has its blocks where the placement says, each in one piece."""
    step = cache.stride(0) * cache.element_size()
    if not cache[0].is_contiguous():
        raise LayoutRefused(f"{name}: a block of a layer is not one run of bytes")
    if cache.data_ptr() != runs.ctypes.data or step != runs.strides[0]:
        raise LayoutRefused(f"{name}: its blocks do not lie where vLLM's placement says")
    if len(cache) < len(runs):
        raise LayoutRefused(f"{name}: has {len(cache)} blocks of {len(runs)}")


def try_memory(memory: BlockMemory, layers: Sequence[torch.Tensor]) -> None:
    """Store a block and restore it, and look through vLLM's own tensors at what happened.

    Writes to the last two blocks and leaves them zero; for before the first request.

    Args:
        layers: vLLM's tensor of each layer, first dimension the block.

    Raises: LayoutRefused.
    """
    draw = np.random.default_rng(0)
    there, neighbour = memory.blocks - 1, memory.blocks - 2
    wanted = draw.integers(0, 256, memory.payload_bytes).astype(np.uint8)
    for layer, cache in enumerate(layers):
        part = wanted[layer * memory.run_bytes : (layer + 1) * memory.run_bytes]
        cache[there].copy_(torch.from_numpy(part).view(cache.dtype).view(cache[there].shape))
    taken: Bytes = np.empty_like(wanted)
    memory.gather(there, taken)
    for cache in layers:
        cache[there:].zero_()
    memory.scatter(neighbour, taken)
    restored = b"".join(_bytes_of(cache[neighbour]) for cache in layers)
    untouched = not any(cache[there].view(torch.uint8).any() for cache in layers)
    for cache in layers:
        cache[neighbour:].zero_()
    if not np.array_equal(taken, wanted) or restored != wanted.tobytes() or not untouched:
        raise LayoutRefused("a block that was stored and restored is not what it was")


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


class ScratchPage:
    """See cachesvc.worker.trial.TrialPage: a block in memory of the same geometry as the worker's.

    What the trial shows each session is the sidecar's half; the worker's half, which cannot
    change in its life, was shown by try_memory.
    """

    pinner: Pinner | None = None

    def __init__(self, memory: BlockMemory, format: BlockFormat) -> None:
        self._shape = (memory.layers, 2, memory.run_bytes)
        self._format = format

    def written(self) -> Bytes:
        """See TrialPage.written."""
        memory = BlockMemory(np.zeros(self._shape, np.uint8))
        memory.scatter(1, pattern(self._format))
        out: Bytes = np.empty(memory.payload_bytes, np.uint8)
        memory.gather(1, out)
        return out

    def reads(self, payload: Bytes) -> bool:
        """See TrialPage.reads."""
        memory = BlockMemory(np.zeros(self._shape, np.uint8))
        memory.scatter(1, payload)
        out: Bytes = np.empty(memory.payload_bytes, np.uint8)
        memory.gather(1, out)
        return bool(np.array_equal(out, pattern(self._format)))
