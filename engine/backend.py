"""What an engine computes with: the contract, and a processor's side of it.

A device's side is engine/device/backend, which only an engine with a device imports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvist.cachesvc.log import Log
from kvist.engine.cache_address import CACHE_EMBEDDED
from kvist.engine.config import EngineConfig
from kvist.engine.device.found import CPU, Device
from kvist.engine.host import free_memory_bytes
from kvist.engine.models.base import Model
from kvist.engine.models.build import build_model, compute_tag, kernels_of, quantization_of
from kvist.engine.runner import Runner, StepRunner
from kvist.engine.sampler import Sampler
from kvist.engine.sequence import Limits
from kvist.engine.weights import LoadedModel
from kvist.proto.layout import BlockFormat
from kvist.tiers.hbm import PagePool
from kvist.transfer.device import PageCopies, Pinner
from kvist.transfer.pages import HostPages

# Share of the free memory that the pool takes when nothing is said: the cache's own memory, the
# API process and the file cache want room too.
POOL_SHARE = 0.25
POOL_BYTES_MAX = 4 << 30


class Progress(Protocol):
    """Told how far the start has come; what is "" for the model's tensors."""

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """So many of so many are done."""
        ...


class Backend(Protocol):
    """One engine's. Called in the order of the methods.

    Attributes:
        device: where it computes.
        dtype: what load_model is told for --dtype.
    """

    device: Device
    dtype: str

    def quantization(self) -> str:
        """What load_model is told for --quantization.

        Raises:
            ConfigInvalid: what was asked for cannot be had here.
        """
        ...

    def build(self, loaded: LoadedModel, kv_dtype: str) -> Model:
        """The model; raises ConfigInvalid when it cannot be computed as asked."""
        ...

    def compute(self, loaded: LoadedModel, kv_dtype: str) -> str:
        """See Namespace.compute."""
        ...

    def kernels(self, loaded: LoadedModel) -> str:
        """What computes, for people."""
        ...

    def pool_bytes(self, format: BlockFormat) -> int:
        """Bytes for pages, when nothing was asked for."""
        ...

    def runner(self, pool: PagePool, limits: Limits, progress: Progress) -> StepRunner:
        """What computes steps."""
        ...

    def copies(self, pool: PagePool, log: Log) -> tuple[PageCopies, Pinner | None]:
        """The pool's pages as ends of copies, and who wants to know the cache's memory."""
        ...

    def memory(self) -> str:
        """What is left of the device's memory, for people; "" says nothing."""
        ...


class CpuBackend:
    """See Backend.

    Args:
        config: checked settings.
        free_bytes: memory of the machine that can still be taken.
    """

    device = CPU

    def __init__(
        self, config: EngineConfig, free_bytes: Callable[[], int] = free_memory_bytes
    ) -> None:
        self.dtype = config.dtype
        self._config = config
        self._free_bytes = free_bytes
        self._model: Model | None = None

    def quantization(self) -> str:
        """See Backend."""
        return quantization_of(self._config)

    def build(self, loaded: LoadedModel, kv_dtype: str) -> Model:
        """See Backend."""
        self._model = build_model(self._config, loaded, kv_dtype)
        return self._model

    def compute(self, loaded: LoadedModel, kv_dtype: str) -> str:
        """See Backend."""
        return compute_tag(loaded.config, loaded.dtype, kv_dtype)

    def kernels(self, loaded: LoadedModel) -> str:
        """See Backend."""
        assert self._model is not None, "the model is not built yet"
        return kernels_of(self._model, loaded)

    def pool_bytes(self, format: BlockFormat) -> int:
        """A share of the free memory, whatever a page is."""
        del format
        taken = self._config.cache_dram_bytes if self._config.cache == CACHE_EMBEDDED else 0
        return min(int((self._free_bytes() - taken) * POOL_SHARE), POOL_BYTES_MAX)

    def runner(self, pool: PagePool, limits: Limits, progress: Progress) -> StepRunner:
        """See Backend."""
        del limits, progress
        assert self._model is not None, "the model is not built yet"
        return Runner(self._model, pool.tensor, Sampler(self._config.seed))

    def copies(self, pool: PagePool, log: Log) -> tuple[PageCopies, Pinner | None]:
        """See Backend."""
        del log
        return HostPages(pool.page_bytes), None

    def memory(self) -> str:
        """See Backend."""
        return ""
