"""How many bytes of a device are left for pages: measured, not guessed.

    pages = utilization * total - in use now - peak of the largest step - peak of a decode step

In use are the weights, CUDA's own memory and whatever other processes have. The largest step is a
full budget of prompts with a token drawn for each seat. A decode step is counted once more because
the graphs keep theirs for themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from kvist.engine.config import EngineConfig
from kvist.engine.models.base import Chunk
from kvist.engine.models.decode_batch import DecodeBatch
from kvist.engine.models.llama_cuda import CudaLlama
from kvist.proto.errors import ConfigInvalid
from kvist.proto.layout import BlockFormat
from kvist.proto.sizes import format_bytes
from kvist.tiers.hbm import PagePool

# Room of a decode step's plan: keys of all requests together, as pages shared by several of them
# count once for each. A step of more keys is computed as chunks. 16 KiB for 256 keys of Llama 8B.
KEYS_PER_POOL = 4


class DeviceMemory(Protocol):
    """A device's memory."""

    def room(self) -> tuple[int, int]:
        """Bytes free, bytes in all."""
        ...

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that something takes while it runs, beside what is taken already."""
        ...


class CudaMemory:
    """See DeviceMemory.

    Args:
        device: as torch names it.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def room(self) -> tuple[int, int]:
        """See DeviceMemory."""
        return torch.cuda.mem_get_info(self._device)

    def peak(self, run: Callable[[], object]) -> int:
        """See DeviceMemory; what the allocator reserved counts, which is more than was in use."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_reserved(self._device) - before
        torch.cuda.empty_cache()
        return peak


def batch_keys(config: EngineConfig, longest: int, pool_tokens: int) -> int:
    """Keys of a decode batch, see KEYS_PER_POOL."""
    return min(config.max_num_seqs * longest, KEYS_PER_POOL * pool_tokens)


@dataclass(frozen=True, slots=True)
class PoolSizing:
    """Measures what pages may take.

    Attributes:
        config: budget, seats and utilization.
        model: on the device; nothing but it is there yet.
        memory: of the device.
    """

    config: EngineConfig
    model: CudaLlama
    memory: DeviceMemory

    def pool_bytes(self, format: BlockFormat) -> int:
        """Bytes that are left for pages.

        Raises:
            ConfigInvalid: less than a page.
        """
        steps = self.memory.peak(lambda: self._largest(format))
        decodes = self.memory.peak(lambda: self._decode(format))
        free, total = self.memory.room()
        share, used = self.config.gpu_memory_utilization, total - free
        left = int(share * total) - used - steps - decodes
        if left < format.payload_bytes:
            raise ConfigInvalid(
                f"--gpu-memory-utilization: {share} of {format_bytes(total)} leaves no page beside "
                f"{format_bytes(used)} in use and {format_bytes(steps + decodes)} that steps take; "
                "raise it, or lower --max-num-batched-tokens or --max-num-seqs"
            )
        return left

    def _longest(self) -> int:
        return self.config.max_model_len or self.model.config.max_model_len

    def _page(self, format: BlockFormat) -> torch.Tensor:
        return PagePool(format, 1, str(self.model.device)).tensor

    def _largest(self, format: BlockFormat) -> None:
        """Prompts of equal length for all seats; all in one page: what they hold is no matter."""
        seats = self.config.max_num_seqs
        tokens = self.config.step_tokens("cuda") // seats
        tokens = max(1, min(tokens, self._longest() - 1))
        pages = [0] * -(-tokens // format.block_tokens)
        chunks = [Chunk([0] * tokens, 0, pages, True)] * seats
        self.model.forward(chunks, self._page(format))

    def _decode(self, format: BlockFormat) -> None:
        """A step of a batch as large as the engine's, all rows unused."""
        free, _ = self.memory.room()
        tokens = free // format.payload_bytes * format.block_tokens
        keys = batch_keys(self.config, self._longest(), tokens)
        rows, width = self.config.max_num_seqs, -(-self._longest() // format.block_tokens)
        DecodeBatch(self.model, self._page(format), rows, width, keys).run(rows)
