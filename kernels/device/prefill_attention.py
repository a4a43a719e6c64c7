"""Causal attention of new tokens over pages, several sequences in one launch.

    out[r, h] = sum_t softmax_t(q[r, h] . k[t, h']) v[t, h']
                for t in [0, position of r], h' = h // (heads / kv_heads)

The scale 1 / sqrt(head_dim) is expected in q (device/rope_store folds it in). A sequence's rows
come after what it has cached: its last row is at position length - 1.

Bound: arithmetic, 4 * head_dim operations per head and pair of row and key; the aim is 60 % of the
rate of a large matrix product.

A tile holds ROWS lines: consecutive tokens times the query heads of one KV head, which thus read K
and V once. It takes the keys in tiles from 0 on and ends where its last token does. Key tiles that
not all of its rows see are masked; a masked key changes no bit (see device/paged), so a row's
result depends on its position and its keys only: not on how a prompt was cut into chunks, nor on
what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import OPTIONS, dot_precision
from kvist.kernels.device.paged import TILE, Paged, attend_keys, gather_reference
from kvist.kernels.device.worklist import WorkList, cut, new_work_list

ROWS = 128  # lines of a tile: tokens times query heads of a KV head
WARPS, STAGES = 8, 3


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Which rows are whose, and the tiles that they are cut into.

    Attributes:
        work: tiles of all sequences.
        firsts: (sequences,), int32: row of each sequence's first new token.
        counts: (sequences,), int32: new tokens of each; 0 is allowed.
    """

    work: WorkList
    firsts: torch.Tensor
    counts: torch.Tensor


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Tokens of a tile."""
    return ROWS // (heads // kv_heads)


def plan_prefill(
    firsts: torch.Tensor, counts: torch.Tensor, rows: int, heads: int, kv_heads: int
) -> PrefillPlan:
    """Cut a step's rows into tiles.

    Args:
        firsts: (sequences,), int32.
        counts: (sequences,), int32.
        rows: of all sequences together, or more: it decides the size of the launch.
        heads: query heads; at most ROWS for each KV head.
        kv_heads: KV heads.
    """
    assert firsts.dtype == counts.dtype == torch.int32, "firsts and counts are int32"
    assert heads // kv_heads <= ROWS, f"more than {ROWS} query heads per KV head"
    tokens = tile_tokens(heads, kv_heads)
    work = new_work_list(tokens, len(counts), rows // tokens + len(counts), counts.device)
    cut(counts, work)
    return PrefillPlan(work, firsts, counts)


def prefill_reference(
    q: torch.Tensor, paged: Paged, layer: int, firsts: list[int], counts: list[int]
) -> torch.Tensor:
    """The meaning of prefill_attention, in float64; rows of no sequence are 0."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    groups = q.shape[1] // paged.pool.shape[3]
    for sequence, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        keys, values = gather_reference(paged, layer, sequence)
        keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        scores = torch.einsum("rhd,thd->hrt", q[first : first + count].double(), keys)
        positions = len(keys) - count + torch.arange(count, device=q.device)
        unseen = torch.arange(len(keys), device=q.device)[None, :] > positions[:, None]
        weights = torch.softmax(scores.masked_fill(unseen, float("-inf")), dim=-1)
        out[first : first + count] = torch.einsum("hrt,thd->rhd", weights, values)
    return out


def prefill_attention(
    q: torch.Tensor, paged: Paged, layer: int, plan: PrefillPlan, out: torch.Tensor
) -> None:
    """Attend from the new rows of every sequence.

    Args:
        q: (rows, heads, head_dim), scaled, contiguous.
        paged: pool, tables and lengths; the rows' own keys are already in the pages.
        layer: of the pool.
        plan: of this step.
        out: as q; rows of no sequence are left as they are.
    """
    paged.check(layer)
    _, heads, head_dim = q.shape
    _, _, _, kv_heads, block_tokens, _ = paged.pool.shape
    assert q.is_contiguous(), "q is not contiguous"
    assert out.is_contiguous(), "out is not contiguous"
    assert out.shape == q.shape, "out is not like q"
    assert heads % kv_heads == 0, "query heads are a multiple of KV heads"
    assert plan.work.part == tile_tokens(heads, kv_heads), "the plan is for other heads"
    plane = paged.pool[:, layer]
    _prefill_kernel[(plan.work.items.shape[0], kv_heads)](
        q,
        out,
        plane,
        paged.tables,
        paged.lengths,
        plan.firsts,
        plan.counts,
        plan.work.items,
        plan.work.count,
        paged.scale,
        plane.stride(0),
        paged.tables.stride(0),
        GROUPS=heads // kv_heads,
        HEAD_DIM=head_dim,
        DIMS=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_TOKENS=block_tokens,
        ROWS=ROWS,
        TOKENS=plan.work.part,
        PRECISION=dot_precision(q),
        num_warps=WARPS,
        num_stages=STAGES,
        **OPTIONS,
    )


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["tables", "lengths", "firsts", "counts"],
)
@no_type_check
def _prefill_kernel(  # noqa: PLR0913
    q,
    out,
    plane,
    tables,
    lengths,
    firsts,
    counts,
    items,
    count,
    scale,
    page_stride,
    table_stride,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.load(count) - 1 - tl.program_id(0)  # the last see most keys: they begin
    if item < 0:
        return
    head, kv_heads = tl.program_id(1), tl.num_programs(1)
    sequence = tl.load(items + 2 * item)
    begin = tl.load(items + 2 * item + 1) * TOKENS
    new = tl.load(counts + sequence)
    start = tl.load(lengths + sequence) - new
    line, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    token = begin + line // GROUPS
    row = (tl.load(firsts + sequence) + token).to(tl.int64) * kv_heads + head
    at = (row * GROUPS + line % GROUPS)[:, None] * HEAD_DIM + dim[None, :]
    real = ((line < TOKENS * GROUPS) & (token < new))[:, None] & (dim < HEAD_DIM)[None, :]
    _, total, acc = attend_keys(
        tl.load(q + at, mask=real, other=0),
        plane + head * BLOCK_TOKENS * HEAD_DIM,
        tables + sequence.to(tl.int64) * table_stride,
        0,
        (start + begin + 1) // TILE * TILE,
        start + tl.minimum(begin + TOKENS, new),
        start + token + 1,
        scale,
        page_stride,
        kv_heads,
        HEAD_DIM,
        BLOCK_TOKENS,
        PRECISION,
    )
    tl.store(out + at, (acc * (scale / total)[:, None]).to(out.dtype.element_ty), mask=real)
