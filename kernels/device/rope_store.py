"""Turn queries and keys by their positions and write keys and values into their pages, at once.

    q'[r, h]          = turn(q[r, h], position of r) * factor
    page[slot of r].k = turn(k[r], position of r) / scale
    page[slot of r].v = v[r] / scale                     turn: see kernels/rope

Bound: memory; projections are read once, queries, keys and values written once.

Pages may be float8 (e4m3). The scale is one number for the pool, given from outside and part of
what makes blocks interchangeable. A scale for each page and head would be finer, but a page is
filled token by token: a later token with a larger value would make the earlier ones be rounded
again, so that a token's bytes depended on what comes after it, and a page, which is the block byte
for byte, would need a place for it. Values beyond the range are clamped, see kernels/narrow.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import OPTIONS
from kvist.kernels.device.paged import Paged
from kvist.kernels.narrow import LIMITS
from kvist.kernels.rope import RopeTable

HEADS_AT_ONCE = 8  # heads of a row that one program turns: 8 * 128 bfloat16 are 2 KiB


def rope_store_reference(
    projected: torch.Tensor, positions: torch.Tensor, table: RopeTable, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The meaning in float64, without factor and scale.

    Returns:
        Turned queries (rows, heads, head_dim), turned keys and values (rows, kv_heads, head_dim).
    """
    cos, sin = (part[positions].double()[:, None] for part in (table.cos, table.sin))
    wide = projected.double().view(len(projected), heads + 2 * kv_heads, -1)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned[:, :heads], turned[:, heads : heads + kv_heads], wide[:, heads + kv_heads :]


def find_slots(paged: Paged, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Where the tokens of a step go, worked out once for all layers.

    Args:
        paged: pool and tables.
        rows: (n,), int64: which sequence each token is of; -1 for a token of none.
        positions: (n,), int64.

    Returns:
        (n,), int64: page * block_tokens + place in the page; -1 for a token of none.
    """
    block_tokens = paged.pool.shape[4]
    pages = paged.tables[rows.clamp(min=0), positions // block_tokens].long()
    return torch.where(rows < 0, -1, pages * block_tokens + positions % block_tokens)


def _query_heads(projected: torch.Tensor, paged: Paged) -> int:
    """How many of the projected heads are queries."""
    _, _, _, kv_heads, _, head_dim = paged.pool.shape
    heads = projected.shape[1] // head_dim - 2 * kv_heads
    assert projected.is_contiguous(), "the projections are not contiguous"
    assert projected.shape[1] == (heads + 2 * kv_heads) * head_dim, "not heads of this pool"
    return heads


def rope_store(
    projected: torch.Tensor,
    positions: torch.Tensor,
    table: RopeTable,
    paged: Paged,
    layer: int,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Turn and store the rows of a step.

    Args:
        projected: (rows, (heads + 2 * kv_heads) * head_dim), contiguous: queries, keys, values.
        positions: (rows,), int64, each in [0, positions of the table).
        table: angles, on the device.
        paged: the pool that keys and values go to.
        layer: of the pool.
        slots: (rows,), int64, from find_slots; all different but for -1, which is not stored.

    Returns:
        (rows, heads, head_dim): queries, turned and times 1 / sqrt(head_dim), rounded once.
    """
    paged.check(layer)
    _, _, _, kv_heads, block_tokens, head_dim = paged.pool.shape
    heads = _query_heads(projected, paged)
    assert positions.dtype == slots.dtype == torch.int64, "positions and slots are int64"
    assert table.cos.shape[1] * 2 == head_dim, "the angles are for another head size"
    out = projected.new_empty((len(projected), heads, head_dim))
    _rope_store_kernel[(len(projected), triton.cdiv(heads + 2 * kv_heads, HEADS_AT_ONCE))](
        projected,
        out,
        paged.pool[:, layer],
        positions,
        slots,
        table.cos,
        table.sin,
        head_dim**-0.5,
        1.0 / paged.scale,
        paged.pool.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        PAIRS=triton.next_power_of_2(head_dim // 2),
        BLOCK_TOKENS=block_tokens,
        AT_ONCE=HEADS_AT_ONCE,
        LIMIT=LIMITS.get(paged.pool.dtype, 0.0),
        num_warps=2,
        **OPTIONS,
    )
    return out


@triton.jit
@no_type_check
def _rope_store_kernel(  # noqa: PLR0913
    projected,
    out,
    plane,
    positions,
    slots,
    cos_table,
    sin_table,
    factor,
    inverse_scale,
    page_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    # One program takes AT_ONCE heads of a row; which of them are queries, keys or values is a mask.
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    real = (head < HEADS + 2 * KV_HEADS) & (pair < HALF)
    source = projected + (row * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + pair
    first = tl.load(source, mask=real, other=0).to(tl.float32)
    second = tl.load(source + HALF, mask=real, other=0).to(tl.float32)
    angle = tl.load(positions + row) * HALF + pair
    cos = tl.load(cos_table + angle, mask=pair < HALF, other=0)
    sin = tl.load(sin_table + angle, mask=pair < HALF, other=0)
    is_value = head >= HEADS + KV_HEADS
    left = tl.where(is_value, first, first * cos - second * sin)
    right = tl.where(is_value, second, second * cos + first * sin)

    target = out + (row * HEADS + head) * (2 * HALF) + pair
    asked = real & (head < HEADS)
    tl.store(target, (left * factor).to(out.dtype.element_ty), mask=asked)
    tl.store(target + HALF, (right * factor).to(out.dtype.element_ty), mask=asked)

    slot = tl.load(slots + row) + tl.zeros_like(head)
    left, right = left * inverse_scale, right * inverse_scale
    if LIMIT > 0:
        left, right = tl.clamp(left, -LIMIT, LIMIT), tl.clamp(right, -LIMIT, LIMIT)
    # A page's planes are K of every head, then V of every head, which is the order of head here.
    place = (head - HEADS) * BLOCK_TOKENS + slot % BLOCK_TOKENS
    target = plane + slot // BLOCK_TOKENS * page_stride + place * (2 * HALF) + pair
    kept = real & (head >= HEADS) & (slot >= 0)
    tl.store(target, left.to(plane.dtype.element_ty), mask=kept)
    tl.store(target + HALF, right.to(plane.dtype.element_ty), mask=kept)
