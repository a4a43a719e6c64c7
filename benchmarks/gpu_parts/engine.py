"""An engine core over the benchmark's model and pool, stepped by hand: no files, no HTTP."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from gpu_parts.clock import Sizes
from kvist.engine.config import EngineConfig
from kvist.engine.connector import Connector
from kvist.engine.core import Core
from kvist.engine.device.runner import DeviceRunner
from kvist.engine.models.decode_batch import DecodeBatch
from kvist.engine.models.llama_cuda import CudaLlama
from kvist.engine.opening import Parts
from kvist.engine.pages import Pages
from kvist.engine.request import Delta, FromCore, NewRequest, Outputs, SamplingParams, ToCore
from kvist.engine.sampler import Sampler
from kvist.engine.sequence import Digests, Limits
from kvist.engine.weighing import Weigher

if TYPE_CHECKING:
    from gpu_parts.tiers import Tiers

SEATS = 4


class Link:
    """See core.Link; what is sent stays here."""

    def __init__(self) -> None:
        self.inbox: list[ToCore] = []
        self.deltas: list[Delta] = []

    def receive(self, timeout_s: float | None = 0.0) -> list[ToCore]:
        """See core.Link; there is nobody to wait for."""
        del timeout_s
        taken, self.inbox = self.inbox, []
        return taken

    def send(self, message: FromCore) -> None:
        """See core.Link."""
        if isinstance(message, Outputs):
            self.deltas += message.deltas


class Engine:
    """A core whose pool is empty, over a cache that others share; left, its threads end.

    Args:
        sizes: of the run.
        model: computes.
        pool: its pages; nobody else uses them meanwhile.
        tiers: the cache.
    """

    def __init__(self, sizes: Sizes, model: CudaLlama, pool: torch.Tensor, tiers: Tiers) -> None:
        format, longest = tiers.namespace.format, max(sizes.hits) + sizes.block_tokens
        config = EngineConfig(
            model="random",
            cache="off",
            block_tokens=sizes.block_tokens,
            max_num_seqs=SEATS,
            max_num_batched_tokens=max(sizes.chunk, SEATS),
            async_scheduling=True,
        )
        width = -(-longest // sizes.block_tokens)
        batch = DecodeBatch(model, pool, SEATS, width, SEATS * longest)
        books = Pages(len(pool))
        self._connector = Connector(tiers.client, tiers.pages, books, tiers.log, time.monotonic)
        self._connector.weigher = Weigher(
            format.layers, format.payload_bytes, format.block_tokens, tiers.pages.run_bytes
        )
        parts = Parts(
            runner=DeviceRunner(model, pool, batch, Sampler(0), tiers.link.fetch),
            pages=books,
            connector=self._connector,
            limits=Limits(longest, sizes.block_tokens),
            format=format,
            digests=Digests(tiers.namespace),
            dtype=format.dtype,
        )
        self._link = Link()
        self._core = Core(self._link, parts, config, tiers.log, time.monotonic)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        copiers = self._connector._copiers
        assert copiers is not None
        copiers.close()

    def ttft_ms(self, prompt: list[int], cache: str) -> tuple[float, int]:
        """Ask for one token: milliseconds until it is there, and prompt tokens from DRAM."""
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        self._link.deltas.clear()
        began = time.perf_counter()
        self._link.inbox.append(NewRequest("0", prompt, params, cache=cache))
        with torch.inference_mode():
            while not self._link.deltas:
                self._core.turn()
        taken = 1e3 * (time.perf_counter() - began)
        last = self._link.deltas[-1]
        assert last.finish_reason == "length", f"the request failed: {last.error}"
        return taken, last.cached.dram if last.cached is not None else 0

    def settle(self) -> None:
        """Until what was computed is stored."""
        with torch.inference_mode():
            while self._connector.copying:
                self._core.turn()
