"""Time on a device, and the sizes of a run."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvist.engine.models.base import ModelConfig
from kvist.kernels.narrow import FLOAT8

Result = dict[str, Any]

LINK_BYTES = 256 << 20  # of a copy between host and device


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured; see REAL and TINY in benchmarks/gpu.py.

    Attributes:
        model: shape of the model.
        dtype: of weights, and of pages unless kv_dtype says otherwise.
        block_tokens: of a page.
        pool_bytes: of pages, at most; less where the device has less.
        copy_bytes: of one buffer of the copy ceiling.
        matmul: side of the matrices of the product ceiling.
        decode: (sequences, keys of each) of decode attention.
        skewed: keys of sequences of very different lengths.
        prefill: new tokens of prefill attention, and of the model's prefill.
        rows: rows of decode steps.
        contexts: keys of each row, of decode steps.
        fit: contexts of the steps of one row that a line is laid through.
        offline: prompt and output tokens of each request of the offline run.
        offline_rows: requests of it, at most.
        slots: blocks that are moved at once.
        hits: tokens of prompts whose blocks are in DRAM.
        chunk: prompt tokens of a step.
        repeats: of each timing; the median counts.
        kv_dtype: of pages.
    """

    model: ModelConfig
    dtype: torch.dtype
    block_tokens: int
    pool_bytes: int
    copy_bytes: int
    matmul: int
    decode: tuple[tuple[int, int], ...]
    skewed: tuple[int, ...]
    prefill: tuple[int, ...]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    fit: tuple[int, ...]
    offline: tuple[int, int]
    offline_rows: int
    slots: int
    hits: tuple[int, ...]
    chunk: int
    repeats: int
    kv_dtype: torch.dtype | None = None

    def float8(self) -> Sizes:
        """The same over float8 pages: every second case, as a batch of rows is a graph of its own
        and 20 seconds have to do."""
        return dataclasses.replace(
            self, kv_dtype=FLOAT8, decode=self.decode[::2], rows=self.rows[::2]
        )

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers."""
        model = self.model
        elements = 2 * model.layers * model.kv_heads * model.head_dim
        return elements * (self.kv_dtype or self.dtype).itemsize

    @property
    def page_bytes(self) -> int:
        """One page."""
        return self.token_bytes * self.block_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one call.

    Attributes:
        ms: median.
        spread_percent: from the 10th to the 90th of 100 timings, in percent of the median.
    """

    ms: float
    spread_percent: float


class Clock:
    """Times work on a device with events, on a CPU with the host's clock."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._repeats = repeats

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object]) -> Timing:
        """Time a call that is long beside a launch."""
        if self.cuda:
            call()
        return self._median([self._once(call) for _ in range(self._repeats)], 1)

    def time_graph(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """Time one of several short calls: a graph of all is replayed, so no launch is waited for.

        The calls should work on different memory, more than the caches hold. A call that cannot be
        captured raises what torch says.
        """
        if not self.cuda:
            for call in calls[:1]:
                call()
            return self._median([self._once(calls[0])], 1)
        for call in calls[:2]:
            call()
        self.sync()
        graph = torch.cuda.CUDAGraph()
        # Threads of the tiers may copy meanwhile: what they ask of CUDA is no fault of the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in calls:
                call()
        graph.replay()
        return self._median([self._once(graph.replay) for _ in range(self._repeats)], len(calls))

    def _once(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    @staticmethod
    def _median(times: list[float], calls: int) -> Timing:
        ordered = sorted(times)
        middle = statistics.median(ordered)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        return Timing(middle / calls, 100 * (high - low) / middle)


def say(text: str) -> None:
    """Progress goes to stderr: the last line of stdout is the result."""
    print(text, file=sys.stderr, flush=True)


def percent(part: float, whole: float) -> float:
    """To one decimal."""
    return round(100 * part / whole, 1)


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the least squares line."""
    slope, intercept = statistics.linear_regression(xs, ys)
    return intercept, slope


@torch.inference_mode()
def ceilings(sizes: Sizes, clock: Clock) -> Result:
    """What the device does at best: a large copy, read plus written, a large product, and copies
    from and to pinned memory."""
    count = sizes.copy_bytes // sizes.dtype.itemsize
    source = torch.empty(count, dtype=sizes.dtype, device=clock.device).normal_()
    target = torch.empty_like(source)
    copy = clock.time(lambda: target.copy_(source))
    side = sizes.matmul
    # Random and never zero: a product of zeros was seen to run 13 % faster.
    left, right = (
        torch.empty((side, side), dtype=sizes.dtype, device=clock.device).normal_()
        for _ in range(2)
    )
    product = clock.time(lambda: left @ right)
    count = min(sizes.copy_bytes, LINK_BYTES)
    host = torch.empty(count, dtype=torch.uint8, pin_memory=clock.cuda)
    device = torch.empty(count, dtype=torch.uint8, device=clock.device)
    upward = clock.time(lambda: device.copy_(host, non_blocking=True))
    downward = clock.time(lambda: host.copy_(device, non_blocking=True))
    return {
        "host_to_device_gb_per_s": count / upward.ms / 1e6,
        "device_to_host_gb_per_s": count / downward.ms / 1e6,
        "copy_gb_per_s": 2 * sizes.copy_bytes / copy.ms / 1e6,
        "copy_spread_percent": round(copy.spread_percent, 1),
        "matmul_tflop_per_s": 2 * side**3 / product.ms / 1e9,
        "matmul_spread_percent": round(product.spread_percent, 1),
    }
