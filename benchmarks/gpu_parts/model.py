"""The whole model: decode steps against the roofline and vLLM's line, prefill, an offline run."""

from __future__ import annotations

import time

import torch

from gpu_parts.clock import Clock, Result, Sizes, fit_line, percent, say
from kvist.engine.models.base import Chunk
from kvist.engine.models.decode_batch import DecodeBatch
from kvist.engine.models.llama_cuda import CudaLlama
from kvist.engine.request import SamplingParams
from kvist.engine.sampler import DrawState
from kvist.engine.weights import LoadedModel, tensor_shapes
from kvist.kernels.narrow import FLOAT8
from kvist.kernels.rope import RopeParams

# vLLM with FlashAttention 3, Llama-3.1-8B in bfloat16 on one H100, one request: inter-token
# latency is this much and this much more for each token of context (vLLM blog, 2026-04-22), by
# the dtype of K and V.
VLLM_MS = {None: (6.44, 4.37e-5), FLOAT8: (6.58, 2.37e-5)}
GREEDY = DrawState(SamplingParams(temperature=0), seed=0)


def random_model(sizes: Sizes, device: torch.device) -> CudaLlama:
    """Random weights, made on the device."""
    config = sizes.model
    tensors = {
        name: torch.empty(shape, dtype=sizes.dtype, device=device).normal_(0, 0.02)
        for name, shape in tensor_shapes(config).items()
    }
    rope = RopeParams(config.rope_theta, config.head_dim, config.max_model_len)
    dtype = str(sizes.dtype).removeprefix("torch.")
    return CudaLlama(LoadedModel(config, rope, dtype, tensors, "random"), device.type, fast=True)


def product_weights(sizes: Sizes) -> int:
    """Weights that a token is multiplied by: all but the embedding that it is looked up in."""
    shapes = tensor_shapes(sizes.model)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    looked_up = 0 if sizes.model.tie_embeddings else sizes.model.vocab * sizes.model.hidden
    return total - looked_up


def attention_operations(sizes: Sizes, tokens: int) -> float:
    """Of a prompt's causal attention, all layers."""
    model = sizes.model
    return 4 * model.head_dim * model.heads * model.layers * tokens * (tokens + 1) / 2


def pages_for(sizes: Sizes, first: int, tokens: int) -> list[int]:
    """Consecutive pages from first on that hold this many tokens."""
    return list(range(first, first + -(-tokens // sizes.block_tokens)))


class Steps:
    """Decode steps of a persistent batch over one pool."""

    def __init__(self, sizes: Sizes, clock: Clock, model: CudaLlama, pool: torch.Tensor) -> None:
        self._sizes = sizes
        self._clock = clock
        self._pool = pool
        width = -(-(max(*sizes.contexts, *sizes.fit) + self.margin) // sizes.block_tokens) + 1
        width = max(width, -(-sum(sizes.offline) // sizes.block_tokens) + 1)
        keys = len(pool) * sizes.block_tokens
        self.batch = DecodeBatch(model, pool, max(*sizes.rows, sizes.offline_rows), width, keys)
        if clock.cuda:
            rows = sorted({*sizes.rows, self.batch.rows})
            self.batch.capture(rows, _say_graph)

    @property
    def margin(self) -> int:
        """Tokens that a row grows by while it is timed."""
        return self._sizes.repeats + 4

    def fits(self, rows: int, context: int) -> bool:
        """Whether the pool has pages of their own for all rows."""
        pages = -(-(context + self.margin) // self._sizes.block_tokens)
        return rows * pages <= len(self._pool)

    def seat(self, rows: int, context: int) -> None:
        """Place requests, each on pages of its own, instead of those that are there."""
        self.leave()
        each = len(pages_for(self._sizes, 0, context + self.margin))
        for row in range(rows):
            pages = list(range(row * each, (row + 1) * each))
            token = (row * 31 + 7) % self._sizes.model.vocab
            self.batch.place(row, token, context, pages, GREEDY)

    def leave(self) -> None:
        """Clear all rows."""
        for row in range(self.batch.rows):
            self.batch.clear(row)

    def time_ms(self, rows: int, context: int) -> float:
        """Median time of a step."""
        self.seat(rows, context)
        timing = self._clock.time(lambda: self.batch.run(rows))
        self.leave()
        return timing.ms


def decode_steps(sizes: Sizes, steps: Steps, copy_gb_per_s: float) -> Result:
    """Time of a step and its share of the floor, which is bytes over copy bandwidth."""
    weights = product_weights(sizes) * sizes.dtype.itemsize
    result: Result = {}
    for context in sizes.contexts:
        for rows in sizes.rows:
            if not steps.fits(rows, context):
                result[f"{rows}x{context}"] = {"skipped": "the pool is too small"}
                continue
            ms = steps.time_ms(rows, context)
            floor = (weights + rows * context * sizes.token_bytes) / copy_gb_per_s / 1e6
            result[f"{rows}x{context}"] = {
                "ms": ms,
                "floor_ms": floor,
                "percent_of_roofline": percent(floor, ms),
                "tok_per_s": round(rows / ms * 1e3, 1),
            }
    return result


def step_line(sizes: Sizes, steps: Steps, copy_gb_per_s: float) -> Result:
    """ITL = a + b * context at one row, beside vLLM's and the floor."""
    contexts = [context for context in sizes.fit if steps.fits(1, context)]
    times = [steps.time_ms(1, context) for context in contexts]
    base, slope = fit_line(contexts, times)
    weights = product_weights(sizes) * sizes.dtype.itemsize
    vllm_ms, vllm_context_ms = VLLM_MS[sizes.kv_dtype]
    return {
        "contexts": contexts,
        "ms": times,
        "a_ms": base,
        "b_ms_per_token": slope,
        "floor_a_ms": weights / copy_gb_per_s / 1e6,
        "floor_b_ms_per_token": sizes.token_bytes / copy_gb_per_s / 1e6,
        "a_over_floor": base * copy_gb_per_s * 1e6 / weights,
        "vllm_h100_a_ms": vllm_ms,
        "vllm_h100_b_ms_per_token": vllm_context_ms,
    }


def invariance_cost(
    sizes: Sizes, clock: Clock, model: CudaLlama, pool: torch.Tensor, fast: Steps
) -> Result:
    """What bits that depend on no batch and no chunk cost: steps and prefill of both models."""
    exact = model.variant(fast=False)
    steps = Steps(sizes, clock, exact, pool)
    result: Result = {}
    context = sizes.contexts[0]
    for rows in (sizes.rows[0], sizes.rows[-1]):
        if steps.fits(rows, context):
            slow, quick = (one.time_ms(rows, context) for one in (steps, fast))
            result[f"{rows}x{context}"] = {"ms": slow, "times_fast": round(slow / quick, 2)}
    tokens = sizes.prefill[0]
    slow, quick = (prefill_ms(sizes, clock, one, pool, tokens) for one in (exact, model))
    result[f"prefill_{tokens}"] = {"ms": slow, "times_fast": round(slow / quick, 2)}
    return result


def prefill(sizes: Sizes, model: CudaLlama, pool: torch.Tensor, start: int, end: int) -> None:
    """Compute positions [start, end) of a prompt on the first pages, in chunks."""
    pages = pages_for(sizes, 0, end)
    for at in range(start, end, sizes.chunk):
        stop = min(at + sizes.chunk, end)
        tokens = [(p * 31 + 7) % sizes.model.vocab for p in range(at, stop)]
        model.forward([Chunk(tokens, at, pages, stop == end)], pool)


def prefill_ms(
    sizes: Sizes, clock: Clock, model: CudaLlama, pool: torch.Tensor, tokens: int
) -> float:
    """Median time of a whole prompt, alone."""
    return clock.time(lambda: prefill(sizes, model, pool, 0, tokens)).ms


def prefill_times(
    sizes: Sizes, clock: Clock, model: CudaLlama, pool: torch.Tensor, tflop_per_s: float
) -> Result:
    """TTFT of prompts that nothing is cached of, and their share of the rate of a product."""
    result: Result = {}
    for tokens in sizes.prefill:
        ms = prefill_ms(sizes, clock, model, pool, tokens)
        operations = 2.0 * product_weights(sizes) * tokens + attention_operations(sizes, tokens)
        rate = operations / ms / 1e9
        result[str(tokens)] = {
            "ttft_ms": ms,
            "tflop_per_s": rate,
            "percent_of_matmul": percent(rate, tflop_per_s),
        }
    return result


def offline_run(
    sizes: Sizes, clock: Clock, model: CudaLlama, steps: Steps, ceilings: tuple[float, float]
) -> Result:
    """Prompts prefilled, then all decoded in step: output tokens a second, and how much that is of
    the two-term roofline, bytes over bandwidth for decode and operations over rate for prefill.

    Args:
        ceilings: copy in GB/s, product in TFLOP/s.
    """
    before, after = sizes.offline
    pool = steps._pool
    each = len(pages_for(sizes, 0, before + after))
    rows = min(sizes.offline_rows, len(pool) // each)
    prompt = [(p * 31 + 7) % sizes.model.vocab for p in range(before)]
    at_once = max(1, sizes.chunk // before)
    steps.leave()
    clock.sync()
    begin = time.perf_counter()
    for first in range(0, rows, at_once):
        several = range(first, min(first + at_once, rows))
        model.forward([Chunk(prompt, 0, _own(row, each), True) for row in several], pool)
    clock.sync()
    middle = time.perf_counter()
    for row in range(rows):
        steps.batch.place(row, prompt[0], before + 1, _own(row, each), GREEDY)
    for _ in range(after - 1):
        steps.batch.run(rows)
    clock.sync()
    end = time.perf_counter()
    steps.leave()
    copy_gb_per_s, tflop_per_s = ceilings
    weights = product_weights(sizes)
    operations = rows * (2.0 * weights * before + attention_operations(sizes, before))
    moved = weights * sizes.dtype.itemsize + rows * (before + after / 2) * sizes.token_bytes
    floor = operations / tflop_per_s / 1e12 + (after - 1) * moved / copy_gb_per_s / 1e9
    return {
        "rows": rows,
        "prompt_tokens": before,
        "output_tokens": after,
        "prefill_s": middle - begin,
        "decode_s": end - middle,
        "tok_per_s": rows * after / (end - begin),
        "percent_of_roofline": percent(floor, end - begin),
    }


def _say_graph(_done: int, rows: int, free: int) -> None:
    say(f"  graph of {rows} rows captured, {free / 2**30:.1f} GiB left")


def _own(row: int, each: int) -> list[int]:
    return list(range(row * each, (row + 1) * each))
