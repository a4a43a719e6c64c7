"""Attention of new tokens over pages of a page-first pool, the same for prefill and decode.

    out[r, h] = sum_t softmax_t(q[r, h] . k[t, h']) v[t, h']
                for t in [0, position of r], h' = h // (heads / kv_heads)

The scale 1 / sqrt(head_dim) is expected in q (kernels/rope folds it in).
Bound: memory for decode (K and V are read once), arithmetic for prefill.

A position p always attends over exactly (p // block_tokens + 1) * block_tokens keys: its own page
is rounded up and masked. The sums over t then have the same length and the same order, however a
prompt is cut into chunks and whatever is beside it in the batch, so a row's result is the same bit
for bit. Two measured limits of the libraries are behind the constants below. The promise is for
one number of threads: MKL may split a float32 product with one KV head over threads at t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# torch leaves products of up to 16^3 multiply-adds to other kernels (mkldnn_gemm_min_size, and 400
# in bmm), which add up in another order; a product is padded to stay above.
SMALL_PRODUCT = 4096
# Fewer rows than this take other kernels for some head sizes. Measured with head_dim 64 to 128:
# float32 (MKL) differs up to 5 rows, bfloat16 (oneDNN) at one row.
LEAST_ROWS = {torch.float32: 8, torch.bfloat16: 2}


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int
) -> torch.Tensor:
    """The meaning, in float64.

    Args:
        q: (rows, heads, head_dim), scaled; row r is at position start + r.
        k: (tokens, kv_heads, head_dim), tokens >= start + rows.
        v: same shape.
        start: position of the first row.

    Returns:
        (rows, heads, head_dim).
    """
    groups = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(groups, dim=1)
    values = v.double().repeat_interleave(groups, dim=1)
    scores = torch.einsum("rhd,thd->hrt", q.double(), keys)
    positions = start + torch.arange(q.shape[0])
    unseen = torch.arange(k.shape[0])[None, :] > positions[:, None]
    weights = torch.softmax(scores.masked_fill(unseen, float("-inf")), dim=-1)
    return torch.einsum("hrt,thd->rhd", weights, values)


def least_rows(block_tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Query rows per KV head that every product of attend must have at least."""
    return max(LEAST_ROWS.get(dtype, 1), SMALL_PRODUCT // (block_tokens * head_dim) + 1)


def page_mask(block_tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a row adds to its scores in its own page, by its place in the page.

    Returns:
        (block_tokens, block_tokens): row o is 0 up to o, minus infinity after.
    """
    full = torch.full((block_tokens, block_tokens), float("-inf"), dtype=dtype, device=device)
    return full.triu(1)


def gather_pages(pool_rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Copy K and V of some pages side by side, so that they can be multiplied.

    The pool is read as rows of one (page, layer, K or V, head): the copy is then already in the
    order that matmul wants and needs no permutation (2 to 4 times less than gather and permute).

    Args:
        pool_rows: the pool viewed as (rows, block_tokens * head_dim).
        index: (n,), int64, rows to copy, in the order [k, v][sequence][kv_head][page].
        out: (n, block_tokens * head_dim), contiguous; overwritten.
    """
    torch.index_select(pool_rows, 0, index, out=out)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, least: int
) -> torch.Tensor:
    """Attend from rows that are all in the last page of their keys.

    Args:
        q: (sequences, rows, kv_heads, groups, head_dim), scaled.
        k: (sequences, kv_heads, tokens, head_dim); tokens are whole pages. Positions not written
            yet must hold finite numbers.
        v: same shape.
        mask: (sequences or 1, 1, 1, rows, block_tokens): each row's line of page_mask.
        least: from least_rows.

    Returns:
        (sequences, rows, kv_heads, groups, head_dim), the dtype of q.
    """
    sequences, rows, kv_heads, groups, head_dim = q.shape
    count = groups * rows
    lines = q.permute(0, 2, 3, 1, 4).reshape(sequences, kv_heads, count, head_dim)
    if count < least:
        lines = F.pad(lines, (0, 0, 0, least - count))
    scores = torch.matmul(lines, k.transpose(-1, -2))
    own_page = scores[:, :, :count, -mask.shape[-1] :]
    own_page.view(sequences, kv_heads, groups, rows, -1).add_(mask)
    out = torch.matmul(torch.softmax(scores, dim=-1), v)[:, :, :count]
    return out.reshape(sequences, kv_heads, groups, rows, head_dim).permute(0, 3, 1, 2, 4)
