"""Attention kernels: right on random pages, and how near they come to the ceilings."""

from __future__ import annotations

import dataclasses
import functools

import torch

from gpu_parts.clock import Clock, Result, Sizes, percent
from kvist.kernels.device.decode_attention import (
    DecodePlan,
    decode_attention,
    decode_reference,
    new_decode_plan,
)
from kvist.kernels.device.paged import Paged
from kvist.kernels.device.prefill_attention import (
    PrefillPlan,
    plan_prefill,
    prefill_attention,
    prefill_reference,
)
from kvist.kernels.narrow import FLOAT8

# Relative error of a result against float64. bfloat16 operands are known to give 1e-3 to 1e-2;
# NaN, which stands in every place that is no key, is not below any limit.
ERROR_MAX = 1e-2
# Of a large pool of float8 pages, which repeat: what is read is other memory all the same.
RANDOM_PAGES = 32


def new_pool(sizes: Sizes, pages: int, layers: int, device: torch.device) -> torch.Tensor:
    """Random pages."""
    model = sizes.model
    shape = (pages, layers, 2, model.kv_heads, sizes.block_tokens, model.head_dim)
    return torch.empty(shape, dtype=sizes.dtype, device=device).normal_()


def as_float8(pool: torch.Tensor) -> torch.Tensor:
    """Random float8 pages in the memory of other pages, which are lost."""
    narrow = pool.view(-1).view(FLOAT8).view(-1, *pool.shape[1:])
    some = torch.randn(narrow[:RANDOM_PAGES].shape, device=pool.device).to(FLOAT8)
    # As bytes: not every device copies every dtype.
    source, target = some.view(torch.uint8), narrow.view(torch.uint8)
    for first in range(0, len(target), len(source)):
        part = target[first : first + len(source)]
        part.copy_(source[: len(part)])
    return narrow


def lay_out(lengths: list[int], pool: torch.Tensor) -> Paged:
    """Give sequences pages of no order; none is in two of them."""
    block_tokens = pool.shape[4]
    counts = [-(-length // block_tokens) for length in lengths]
    assert sum(counts) <= len(pool), f"{sum(counts)} pages are wanted, the pool has {len(pool)}"
    order = torch.split(torch.randperm(len(pool))[: sum(counts)].int(), counts)
    tables = torch.zeros((len(lengths), max(counts)), dtype=torch.int32)
    for row, pages in enumerate(order):
        tables[row, : len(pages)] = pages
    numbers = torch.tensor(lengths, dtype=torch.int32, device=pool.device)
    return Paged(pool, tables.to(pool.device), numbers)


def random_queries(sizes: Sizes, rows: int, device: torch.device) -> torch.Tensor:
    """Scaled queries: (rows, heads, head_dim)."""
    shape = (rows, sizes.model.heads, sizes.model.head_dim)
    scale = sizes.model.head_dim**-0.5
    return torch.empty(shape, dtype=sizes.dtype, device=device).normal_(0, scale)


def decode_plan(sizes: Sizes, paged: Paged) -> DecodePlan:
    """A plan cut for these lengths."""
    model, lengths = sizes.model, paged.lengths
    plan = new_decode_plan(
        len(lengths), int(lengths.sum()), model.heads, model.head_dim, lengths.device
    )
    plan.cut(lengths)
    return plan


def prefill_plan(sizes: Sizes, rows: int, device: torch.device) -> PrefillPlan:
    """The plan of one sequence with this many new tokens."""
    firsts, counts = (torch.tensor([n], dtype=torch.int32, device=device) for n in (0, rows))
    return plan_prefill(firsts, counts, rows, sizes.model.heads, sizes.model.kv_heads)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((out.double() - exact).norm() / exact.norm())


def poisoned(paged: Paged) -> Paged:
    """Every place that is no key becomes NaN."""
    block_tokens = paged.pool.shape[4]
    owned = torch.zeros((len(paged.pool), block_tokens), dtype=torch.bool, device=paged.pool.device)
    for row, length in enumerate(paged.lengths.tolist()):
        position = torch.arange(length, device=paged.pool.device)
        owned[paged.tables[row, position // block_tokens].long(), position % block_tokens] = True
    paged.pool.masked_fill_(~owned[:, None, None, None, :, None], float("nan"))
    return paged


@torch.inference_mode()
def attention_errors(sizes: Sizes, clock: Clock) -> Result:
    """Both kernels on fresh random pages of two layers, also in float8, against float64."""
    longest = sizes.prefill[-1] if len(sizes.prefill) < 3 else sizes.prefill[2]
    lengths = [1, longest, longest // 3 + 1, sizes.block_tokens]
    pages = sum(-(-length // sizes.block_tokens) for length in lengths)
    paged = poisoned(lay_out(lengths, new_pool(sizes, pages + 3, 2, clock.device)))
    errors = _errors(sizes, paged, paged)
    narrow = dataclasses.replace(paged, pool=paged.pool.to(FLOAT8), scale=0.5)
    # Its numbers in float32: not every device has each operation of the reference for float8.
    wide = dataclasses.replace(narrow, pool=narrow.pool.float())
    errors |= {f"{name}_float8": e for name, e in _errors(sizes, narrow, wide).items()}
    return {name: {"error": e, "right": e < ERROR_MAX} for name, e in errors.items()}


def _errors(sizes: Sizes, paged: Paged, exact: Paged) -> dict[str, float]:
    """Of both kernels.

    Args:
        paged: four sequences.
        exact: the same numbers in a dtype that the references read.
    """
    lengths, device = paged.lengths, paged.pool.device
    q = random_queries(sizes, len(lengths), device)
    out = torch.full_like(q, float("nan"))
    decode_attention(q, paged, 1, decode_plan(sizes, paged), out)
    errors = {"decode_attention": relative_error(out, decode_reference(q, exact, 1))}
    # The second sequence alone: half of it is cached.
    one, known = (
        dataclasses.replace(
            each, tables=each.tables[1:2].contiguous(), lengths=lengths[1:2].clone()
        )
        for each in (paged, exact)
    )
    longest = int(lengths[1])
    new = min(longest - longest // 2, sizes.chunk)
    q = random_queries(sizes, new, device)
    out = torch.full_like(q, float("nan"))
    prefill_attention(q, one, 0, prefill_plan(sizes, new, device), out)
    errors["prefill_attention"] = relative_error(out, prefill_reference(q, known, 0, [0], [new]))
    return errors


@torch.inference_mode()
def decode_rates(sizes: Sizes, clock: Clock, pool: torch.Tensor, copy_gb_per_s: float) -> Result:
    """Percent of the copy bandwidth at which K and V are read."""
    cases = [(f"{rows}x{keys}", [keys] * rows) for rows, keys in sizes.decode]
    cases.append(("skewed", list(sizes.skewed)))
    result: Result = {}
    for name, lengths in cases:
        pages = sum(-(-length // sizes.block_tokens) for length in lengths)
        if pages > len(pool):
            result[name] = {"skipped": f"{pages} pages, the pool has {len(pool)}"}
            continue
        paged = lay_out(lengths, pool)
        plan = decode_plan(sizes, paged)
        q = random_queries(sizes, len(lengths), clock.device)
        out = torch.empty_like(q)
        # One call for each layer: other memory each time, more than the L2 holds.
        calls = [
            functools.partial(decode_attention, q, paged, layer, plan, out)
            for layer in range(pool.shape[1])
        ]
        timing = clock.time_graph(calls)
        moved = sum(lengths) * sizes.token_bytes / sizes.model.layers + 2 * q.nbytes
        result[name] = {
            "us": round(timing.ms * 1e3, 2),
            "gb_per_s": moved / timing.ms / 1e6,
            "percent_of_copy": percent(moved / timing.ms / 1e6, copy_gb_per_s),
            "spread_percent": round(timing.spread_percent, 1),
        }
    return result


@torch.inference_mode()
def prefill_rates(sizes: Sizes, clock: Clock, pool: torch.Tensor, tflop_per_s: float) -> Result:
    """Percent of the rate of a large product at which causal attention runs."""
    result: Result = {}
    for tokens in sizes.prefill:
        paged = lay_out([tokens], pool)
        plan = prefill_plan(sizes, tokens, clock.device)
        q = random_queries(sizes, tokens, clock.device)
        out = torch.empty_like(q)
        calls = [
            functools.partial(prefill_attention, q, paged, layer, plan, out)
            for layer in range(min(4, pool.shape[1]))
        ]
        timing = clock.time_graph(calls)
        operations = 4 * sizes.model.head_dim * sizes.model.heads * tokens * (tokens + 1) / 2
        result[str(tokens)] = {
            "us": round(timing.ms * 1e3, 1),
            "tflop_per_s": operations / timing.ms / 1e9,
            "percent_of_matmul": percent(operations / timing.ms / 1e9, tflop_per_s),
            "spread_percent": round(timing.spread_percent, 1),
        }
    return result
