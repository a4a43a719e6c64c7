"""What an engine on a device computes with; see engine.backend.Backend."""

from __future__ import annotations

import torch

from kvist.cachesvc.log import Log
from kvist.engine.backend import CpuBackend, Progress
from kvist.engine.config import EngineConfig
from kvist.engine.device.found import Device, check_float8
from kvist.engine.device.runner import DeviceRunner
from kvist.engine.device.sizing import CudaMemory, PoolSizing, batch_keys
from kvist.engine.kv_dtype import is_float8
from kvist.engine.models.base import Chunk
from kvist.engine.models.decode_batch import DecodeBatch, graph_sizes
from kvist.engine.models.llama_cuda import CudaLlama
from kvist.engine.sampler import Sampler
from kvist.engine.sequence import Limits
from kvist.engine.weights import LoadedModel
from kvist.kernels.device.sampling import new_draws, sample
from kvist.proto.errors import ConfigInvalid
from kvist.proto.layout import BlockFormat
from kvist.proto.sizes import format_bytes
from kvist.tiers.hbm import PagePool
from kvist.transfer.cuda import CudaCopies
from kvist.transfer.delayed import DelayedCopies
from kvist.transfer.device import PageCopies, Pinner
from kvist.transfer.pages import PIN_BYTES, DevicePages


class DeviceBackend:
    """See Backend.

    Args:
        config: checked settings.
        device: a CUDA device, or Triton's interpreter in its place.

    Raises:
        ConfigInvalid: the device lacks what K and V in float8 need.
    """

    def __init__(self, config: EngineConfig, device: Device) -> None:
        if is_float8(config.kv_cache_dtype):
            check_float8(device, config.kv_cache_dtype)
        self.device = device
        self.dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        self._config = config
        self._model: CudaLlama | None = None
        self._memory: CudaMemory | None = None
        if device.kind == "cuda":
            # For this thread, which launches: Triton launches on the current device.
            torch.cuda.set_device(device.torch)
            self._memory = CudaMemory(device.torch)

    @property
    def model(self) -> CudaLlama:
        """What build made."""
        assert self._model is not None, "the model is not built yet"
        return self._model

    def quantization(self) -> str:
        """See Backend."""
        if self._config.quantization in ("auto", "none"):
            return "none"
        raise ConfigInvalid(
            f"--quantization {self._config.quantization}: kernels for devices multiply bfloat16 "
            "and float32 only; give --quantization none, or --device cpu"
        )

    def build(self, loaded: LoadedModel, kv_dtype: str) -> CudaLlama:
        """See Backend."""
        del kv_dtype
        fast, scale = not self._config.deterministic, self._config.kv_cache_scale
        self._model = CudaLlama(loaded, self.device.torch, fast=fast, kv_scale=scale)
        return self._model

    def compute(self, loaded: LoadedModel, kv_dtype: str) -> str:
        """See Backend."""
        del loaded
        return f"{self.model.compute}/kv-{kv_dtype}"

    def kernels(self, loaded: LoadedModel) -> str:
        """See Backend."""
        del loaded
        how = "fast" if self.model.fast else "invariant to the batch"
        return f"Kvist's own in Triton, {how}"

    def pool_bytes(self, format: BlockFormat) -> int:
        """See Backend."""
        if self._memory is None:
            return CpuBackend(self._config).pool_bytes(format)
        return PoolSizing(self._config, self.model, self._memory).pool_bytes(format)

    def runner(self, pool: PagePool, limits: Limits, progress: Progress) -> DeviceRunner:
        """See Backend; compiles kernels and captures graphs."""
        self._warm(pool)
        rows, size = self._config.max_num_seqs, limits.block_tokens
        width = -(-limits.max_model_len // size)
        keys = batch_keys(self._config, limits.max_model_len, pool.pages * size)
        batch = DecodeBatch(self.model, pool.tensor, rows, width, keys)
        if self.device.kind == "cuda" and not self._config.enforce_eager:
            _capture(batch, progress)
        else:
            batch.warm()
        sampler = Sampler(self._config.seed)
        return DeviceRunner(self.model, pool.tensor, batch, sampler, self._link(pool).fetch)

    def _warm(self, pool: PagePool) -> None:
        """A prompt beside a decode, in a page that nobody has yet: kernels are compiled when they
        are first launched, 1 to 5 s each, and the first request is not to wait for that."""
        chunks = [Chunk([0], 0, [0], True), Chunk([0, 0], 0, [0], True)]
        logits = self.model.forward(chunks, pool.tensor)
        tokens = torch.zeros(len(chunks), dtype=torch.int64, device=logits.device)
        sample(logits, new_draws(len(chunks), logits.device), tokens)
        pool.tensor[:1].view(torch.uint8).zero_()

    def copies(self, pool: PagePool, log: Log) -> tuple[PageCopies, Pinner]:
        """See Backend."""
        pages = DevicePages(self._link(pool), pool.format.payload_bytes, PinLog(log))
        return pages, pages

    def _link(self, pool: PagePool) -> CudaCopies | DelayedCopies:
        if self.device.kind == "cuda":
            return CudaCopies(pool.tensor)
        return DelayedCopies(pool.tensor)

    def memory(self) -> str:
        """See Backend."""
        if self._memory is None:
            return ""
        free, total = self._memory.room()
        return f"{format_bytes(free)} of {format_bytes(total)} left"


def _capture(batch: DecodeBatch, progress: Progress) -> None:
    """Capture a batch's graphs; raises ConfigInvalid with the way without them."""
    sizes = graph_sizes(batch.rows)

    def tell(done: int, rows: int, free: int) -> None:
        progress(done, len(sizes), f"Capturing graphs: {rows} rows, {format_bytes(free)} left")

    try:
        batch.capture(sizes, tell)
    except RuntimeError as error:  # out of memory is one
        raise ConfigInvalid(
            f"CUDA graphs could not be captured ({error}); lower --gpu-memory-utilization if "
            "memory was short, or give --enforce-eager"
        ) from error


class PinLog:
    """Tells of the arena's pinning: how far it is, by quarters, and what stopped it.

    Args:
        log: to tell.
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    def __call__(self, done: int, total: int, why: str) -> None:
        """See DevicePages."""
        if why:
            self._log.warning(
                "arena not pinned", done=format_bytes(done), of=format_bytes(total), reason=why
            )
        elif done == total or done * 4 // total > (done - PIN_BYTES) * 4 // total:
            self._log.info("arena pinned", done=format_bytes(done), of=format_bytes(total))
