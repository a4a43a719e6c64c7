"""Attention of one new token per sequence over its pages.

    out[s, h] = sum_t softmax_t(q[s, h] . k[t, h']) v[t, h']    for t in [0, length of s),
                h' = h // (heads / kv_heads)

The scale 1 / sqrt(head_dim) is expected in q (kernels/device/rope_store folds it in).

Bound: memory. K and V of every key are read once: 2 * kv_heads * head_dim elements a key and layer,
for all query heads of a KV head together. The aim is 85 % of copy bandwidth.

Keys are cut into splits of SPLIT tokens. Programs of a persistent grid take (sequence, split, KV
head) from a list that is made on the device, so nothing of the launch depends on the lengths and a
CUDA graph can hold it. A second kernel adds up a row's splits in ascending order. The cut is in
tokens, not in equal shares of the machine, so the sums behind a row depend on its own length only:
the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import OPTIONS, dot_precision, grid_programs
from kvist.kernels.device.paged import Paged, attend_keys, gather_reference
from kvist.kernels.device.worklist import WorkList, cut, new_work_list

# Keys of a split: part of a row's arithmetic. Partial results are 2 * heads / kv_heads float32 rows
# per 2 * SPLIT rows of K and V: 3 % of the bytes at 256 keys, 4 groups and bfloat16.
SPLIT = 256
LEAST_ROWS = 16  # of a tl.dot; the query heads of a KV head are padded to it
MERGED = 32  # splits that are added up at a time; part of a row's arithmetic
WARPS, STAGES = 4, 3  # of a program of the splits; see launch.PROGRAMS_PER_SM


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What one step's launches share; made once, cut anew for every step.

    Attributes:
        work: splits of all sequences.
        partial: (capacity, heads, head_dim), float32: unnormalized sums of a split.
        stats: (capacity, heads, 2), float32: the largest score of a split times log2(e), its peak,
            and the sum of 2^(score - peak).
        programs: of the persistent grid.
    """

    work: WorkList
    partial: torch.Tensor
    stats: torch.Tensor
    programs: int

    def cut(self, lengths: torch.Tensor) -> None:
        """List the splits of this step's lengths, (sequences,), int32."""
        cut(lengths, self.work)


def new_decode_plan(
    sequences: int, keys: int, heads: int, head_dim: int, device: torch.device
) -> DecodePlan:
    """Room for a batch.

    Args:
        sequences: rows of the batch.
        keys: lengths of all sequences together, at most.
        heads: query heads.
        head_dim: elements of a head.
        device: of the pool.
    """
    capacity = keys // SPLIT + sequences
    return DecodePlan(
        new_work_list(SPLIT, sequences, capacity, device),
        torch.zeros((capacity, heads, head_dim), dtype=torch.float32, device=device),
        torch.zeros((capacity, heads, 2), dtype=torch.float32, device=device),
        grid_programs(device),
    )


def decode_reference(q: torch.Tensor, paged: Paged, layer: int) -> torch.Tensor:
    """The meaning of decode_attention, in float64; a sequence of length 0 gives zeros."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    groups = q.shape[1] // paged.pool.shape[3]
    for sequence in range(q.shape[0]):
        keys, values = gather_reference(paged, layer, sequence)
        if len(keys):
            wide = keys.repeat_interleave(groups, dim=1)
            scores = torch.einsum("hd,thd->ht", q[sequence].double(), wide)
            weights = torch.softmax(scores, dim=-1)
            wide = values.repeat_interleave(groups, dim=1)
            out[sequence] = torch.einsum("ht,thd->hd", weights, wide)
    return out


def decode_attention(
    q: torch.Tensor, paged: Paged, layer: int, plan: DecodePlan, out: torch.Tensor
) -> None:
    """Attend with one row per sequence.

    Args:
        q: (sequences, heads, head_dim), scaled, contiguous.
        paged: pool, tables and lengths; a row's own key is already in its page.
        layer: of the pool.
        plan: cut for these lengths.
        out: as q; overwritten, with zeros for a length of 0.
    """
    paged.check(layer)
    sequences, heads, head_dim = q.shape
    kv_heads = paged.pool.shape[3]
    assert q.is_contiguous(), "q is not contiguous"
    assert out.is_contiguous(), "out is not contiguous"
    assert out.shape == q.shape, "out is not like q"
    assert heads % kv_heads == 0, "query heads are a multiple of KV heads"
    assert sequences == paged.lengths.shape[0] == plan.work.firsts.shape[0], "rows differ"
    _split(q, paged, layer, plan)
    _merge_kernel[(sequences, heads)](
        out,
        plan.partial,
        plan.stats,
        paged.lengths,
        plan.work.firsts,
        paged.scale,
        HEADS=heads,
        HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim),
        SPLIT=SPLIT,
        MERGED=MERGED,
        num_warps=4,
        **OPTIONS,
    )


def _split(q: torch.Tensor, paged: Paged, layer: int, plan: DecodePlan) -> None:
    """Fill the plan's partial results."""
    _, heads, head_dim = q.shape
    _, _, _, kv_heads, block_tokens, _ = paged.pool.shape
    groups, plane = heads // kv_heads, paged.pool[:, layer]
    _split_kernel[(plan.programs,)](
        q,
        plane,
        paged.tables,
        paged.lengths,
        plan.work.items,
        plan.work.count,
        plan.partial,
        plan.stats,
        paged.scale,
        plane.stride(0),
        paged.tables.stride(0),
        KV_HEADS=kv_heads,
        GROUPS=groups,
        HEAD_DIM=head_dim,
        DIMS=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_TOKENS=block_tokens,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(groups)),
        SPLIT=SPLIT,
        PRECISION=dot_precision(q),
        num_warps=WARPS,
        num_stages=STAGES,
        **OPTIONS,
    )


@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables", "lengths"]
)
@no_type_check
def _split_kernel(  # noqa: PLR0913
    q,
    plane,
    tables,
    lengths,
    items,
    count,
    partial,
    stats,
    scale,
    page_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    real = (row < GROUPS)[:, None] & (dim < HEAD_DIM)[None, :]
    # All keys are masked, in one loop: that costs nothing where memory is the bound.
    for task in range(tl.program_id(0), tl.load(count) * KV_HEADS, tl.num_programs(0)):
        item, head = task // KV_HEADS, task % KV_HEADS
        sequence = tl.load(items + 2 * item)
        first = tl.load(items + 2 * item + 1) * SPLIT
        last = tl.minimum(first + SPLIT, tl.load(lengths + sequence))
        line = (sequence * KV_HEADS + head) * GROUPS + row
        queries = tl.load(q + line[:, None] * HEAD_DIM + dim[None, :], mask=real, other=0)
        peak, total, acc = attend_keys(
            queries,
            plane + head * BLOCK_TOKENS * HEAD_DIM,
            tables + sequence.to(tl.int64) * table_stride,
            first,
            first,
            last,
            last + tl.zeros_like(row),
            scale,
            page_stride,
            KV_HEADS,
            HEAD_DIM,
            BLOCK_TOKENS,
            PRECISION,
        )
        place = (tl.cast(item, tl.int64) * KV_HEADS + head) * GROUPS + row
        tl.store(partial + place[:, None] * HEAD_DIM + dim[None, :], acc, mask=real)
        tl.store(stats + 2 * place, peak, mask=row < GROUPS)
        tl.store(stats + 2 * place + 1, total, mask=row < GROUPS)


@triton.jit(do_not_specialize_on_alignment=["lengths", "firsts"])
@no_type_check
def _merge_kernel(  # noqa: PLR0913
    out,
    partial,
    stats,
    lengths,
    firsts,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGED: tl.constexpr,
):
    # One program adds up the splits of one row and head, MERGED at a time, in their order.
    sequence, head = tl.program_id(0), tl.program_id(1)
    splits = (tl.load(lengths + sequence) + SPLIT - 1) // SPLIT
    first = tl.load(firsts + sequence).to(tl.int64)
    dim = tl.arange(0, DIMS)
    inside = dim < HEAD_DIM
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([DIMS], tl.float32)
    for at in range(0, splits, MERGED):
        split = at + tl.arange(0, MERGED)
        there = split < splits
        place = (first + split) * HEADS + head
        higher = tl.load(stats + 2 * place, mask=there, other=float("-inf"))
        weight = tl.load(stats + 2 * place + 1, mask=there, other=0.0)
        mask = there[:, None] & inside[None, :]
        part = tl.load(partial + place[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        highest = tl.maximum(peak, tl.max(higher, 0))
        shrink, grow = tl.exp2(peak - highest), tl.exp2(higher - highest)
        total = total * shrink + tl.sum(weight * grow, 0)
        acc = acc * shrink + tl.sum(part * grow[:, None], 0)
        peak = highest
    # A row without keys has a total of 0 and gives 0.
    result = acc * scale / tl.where(total > 0, total, 1.0)
    line = sequence.to(tl.int64) * HEADS + head
    tl.store(out + line * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=inside)
