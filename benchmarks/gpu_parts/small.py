"""The kernels beside attention: right, and how near to copy bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gpu_parts.attention import lay_out, relative_error
from gpu_parts.clock import Clock, Result, Sizes, percent
from kvist.kernels.activation import silu_mul_reference
from kvist.kernels.device.add_norm import add_rms_norm, add_rms_norm_reference
from kvist.kernels.device.gate import silu_gate
from kvist.kernels.device.kv_copy import gather, scatter
from kvist.kernels.device.matmul import matmul
from kvist.kernels.device.paged import Paged
from kvist.kernels.device.rope_store import find_slots, rope_store, rope_store_reference
from kvist.kernels.device.sampling import new_draws, sample
from kvist.kernels.linear import linear_reference
from kvist.kernels.rope import RopeParams, RopeTable, rope_table

ERROR_MAX = 1e-2
COPIES = 4  # sets of inputs that are taken in turn
PAGES_AT_ONCE = 128  # of gather and scatter: 1 GiB of 8 MiB pages, many times the L2


@torch.inference_mode()
def small_errors(sizes: Sizes, clock: Clock, pool: torch.Tensor) -> Result:
    """Each kernel on fresh random inputs against float64; copies and greedy choices exactly."""
    model, rows = sizes.model, min(sizes.chunk, 4 * sizes.block_tokens)
    x, stream = (_random(sizes, clock, rows, model.hidden) for _ in range(2))
    weight = _random(sizes, clock, model.hidden)
    kept = stream.clone()
    errors = {
        "add_rms_norm": relative_error(
            add_rms_norm(x, kept, weight, model.rms_eps),
            add_rms_norm_reference(x, stream, weight, model.rms_eps),
        )
    }
    inner = _random(sizes, clock, rows, 2 * model.intermediate)
    errors["silu_gate"] = relative_error(silu_gate(inner), silu_mul_reference(inner))
    wide = _random(sizes, clock, 4 * model.kv_heads * model.head_dim, model.hidden)
    errors["matmul"] = relative_error(matmul(x, wide), linear_reference(x, wide))
    errors |= _rope_errors(sizes, clock, pool, rows)
    logits = _random(sizes, clock, 4, model.vocab)
    tokens = torch.full((4,), -1, device=clock.device)
    sample(logits, new_draws(4, clock.device), tokens)
    errors["sample_greedy"] = float((tokens != logits.argmax(-1)).sum())
    ids = torch.randperm(len(pool), device=clock.device)[: min(4, len(pool))]
    staging = torch.zeros((len(ids), *pool.shape[1:]), dtype=pool.dtype, device=clock.device)
    gather(pool, ids, staging)
    errors["gather"] = float((staging.view(torch.uint8) != pool[ids].view(torch.uint8)).sum())
    staging.neg_()
    scatter(pool, ids, staging)
    errors["scatter"] = float((staging.view(torch.uint8) != pool[ids].view(torch.uint8)).sum())
    return {name: {"error": e, "right": e < ERROR_MAX} for name, e in errors.items()}


def _rope_errors(sizes: Sizes, clock: Clock, pool: torch.Tensor, rows: int) -> dict[str, float]:
    model = sizes.model
    projected, positions, table, paged, slots = _rope_inputs(sizes, clock, pool, rows)
    queries = rope_store(projected, positions, table, paged, 0, slots)
    exact = rope_store_reference(projected, positions, table, model.heads, model.kv_heads)
    stored = pool[slots // sizes.block_tokens, 0, :, :, slots % sizes.block_tokens]
    return {
        "rope_store_queries": relative_error(queries, exact[0] * model.head_dim**-0.5),
        "rope_store_keys": relative_error(stored[:, 0], exact[1]),
        "rope_store_values": relative_error(stored[:, 1], exact[2]),
    }


def _rope_inputs(
    sizes: Sizes, clock: Clock, pool: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor, RopeTable, Paged, torch.Tensor]:
    """Projections, positions, table, pages and slots of one sequence."""
    model = sizes.model
    paged = lay_out([rows], pool)
    positions = torch.arange(rows, device=clock.device)
    slots = find_slots(paged, torch.zeros_like(positions), positions)
    table = rope_table(RopeParams(model.rope_theta, model.head_dim, rows), clock.device.type)
    width = (model.heads + 2 * model.kv_heads) * model.head_dim
    return _random(sizes, clock, rows, width), positions, table, paged, slots


@torch.inference_mode()
def small_rates(sizes: Sizes, clock: Clock, pool: torch.Tensor, copy_gb_per_s: float) -> Result:
    """Percent of copy bandwidth of the kernels that memory bounds, and a sampled row's time."""
    model, rows = sizes.model, sizes.chunk
    xs = [_random(sizes, clock, rows, model.hidden) for _ in range(COPIES)]
    weight = _random(sizes, clock, model.hidden)
    inners = [_random(sizes, clock, rows, 2 * model.intermediate) for _ in range(COPIES)]
    count = min(PAGES_AT_ONCE, len(pool))
    ids = [torch.randperm(len(pool), device=clock.device)[:count] for _ in range(COPIES)]
    staging = torch.empty((count, *pool.shape[1:]), dtype=pool.dtype, device=clock.device)
    stream = xs[0].clone()
    turn, turned_bytes = _rope_call(sizes, clock, pool, rows)
    moved = {
        "rope_store": turned_bytes,
        "add_rms_norm": 4 * xs[0].nbytes,
        "silu_gate": inners[0].nbytes * 3 // 2,
        "gather": 2 * staging.nbytes,
        "scatter": 2 * staging.nbytes,
    }
    calls: dict[str, list[Callable[[], object]]] = {
        "rope_store": [functools.partial(turn, layer) for layer in range(pool.shape[1])],
        "add_rms_norm": [
            functools.partial(add_rms_norm, x, stream, weight, model.rms_eps) for x in xs
        ],
        "silu_gate": [functools.partial(silu_gate, inner) for inner in inners],
        "gather": [functools.partial(gather, pool, some, staging) for some in ids],
        "scatter": [functools.partial(scatter, pool, some, staging) for some in ids],
    }
    result: Result = {}
    for name, bytes_moved in moved.items():
        timing = clock.time_graph(calls[name])
        rate = bytes_moved / timing.ms / 1e6
        result[name] = {"gb_per_s": rate, "percent_of_copy": percent(rate, copy_gb_per_s)}
    logits = _random(sizes, clock, max(sizes.rows), model.vocab)
    for name, top_k, top_p in (("greedy", 0, 1.0), ("top_k_top_p", 40, 0.9)):
        draws = new_draws(len(logits), clock.device)
        draws.temperature.fill_(0 if name == "greedy" else 1)
        draws.top_k.fill_(top_k)
        draws.top_p.fill_(top_p)
        tokens = torch.zeros(len(logits), dtype=torch.int64, device=clock.device)
        timing = clock.time_graph([functools.partial(sample, logits, draws, tokens)])
        result[f"sample_{name}"] = {"rows": len(logits), "us": round(timing.ms * 1e3, 1)}
    return result


def _rope_call(
    sizes: Sizes, clock: Clock, pool: torch.Tensor, rows: int
) -> tuple[Callable[[int], object], int]:
    """rope_store of a layer, and the bytes that it reads and writes."""
    projected, positions, table, paged, slots = _rope_inputs(sizes, clock, pool, rows)

    def turn(layer: int) -> torch.Tensor:
        return rope_store(projected, positions, table, paged, layer, slots)

    return turn, 2 * projected.nbytes + table.cos.nbytes + table.sin.nbytes


@torch.inference_mode()
def product_rates(sizes: Sizes, clock: Clock, ceilings: tuple[float, float]) -> Result:
    """Products with the largest weight of a layer: cuBLAS' and those of fixed tiles, for one row in
    percent of copy bandwidth, for a chunk in percent of the rate of a large product.

    Args:
        ceilings: copy in GB/s, product in TFLOP/s.
    """
    model, copy_gb_per_s, tflop_per_s = sizes.model, *ceilings
    shape = (2 * model.intermediate, model.hidden)
    weights = [_random(sizes, clock, *shape) for _ in range(COPIES)]
    result: Result = {}
    for name, multiply in (("cublas", F.linear), ("fixed_tiles", matmul)):
        for rows in (1, sizes.chunk):
            x = _random(sizes, clock, rows, model.hidden)
            calls = [functools.partial(multiply, x, weight) for weight in weights]
            ms = clock.time_graph(calls).ms
            entry = {"us": round(ms * 1e3, 1)}
            if rows == 1:
                entry["percent_of_copy"] = percent(weights[0].nbytes / ms / 1e6, copy_gb_per_s)
            else:
                rate = 2.0 * rows * weights[0].numel() / ms / 1e9
                entry["percent_of_matmul"] = percent(rate, tflop_per_s)
            result[f"{name}_{rows}"] = entry
    return result


def _random(sizes: Sizes, clock: Clock, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=sizes.dtype, device=clock.device).normal_()
