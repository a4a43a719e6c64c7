"""Keys and values of sequences in a page-first pool, and one step of attention over a tile of them.

    scores       = q . k[tile] * log2(e), unseen ones minus infinity
    peak'        = max(peak, max(scores))
    sums'        = sums * 2^(peak - peak') + sum 2^(scores - peak')
    acc'         = acc  * 2^(peak - peak') + 2^(scores - peak') . v[tile]

Both attention kernels take these steps in ascending order of the keys, over tiles that begin at
multiples of the tile's length. A tile that a row does not see changes none of its bits: its peak
stays, so it is multiplied by exactly 1 and exact zeros are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import dot

LOG2_E = tl.constexpr(1.4426950408889634)
TILE = tl.constexpr(64)  # keys of a step: part of a row's arithmetic
POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Paged:
    """Where sequences have their keys and values.

    Attributes:
        pool: (pages, layers, 2, kv_heads, block_tokens, head_dim), contiguous; float32, bfloat16,
            float16 or float8_e4m3fn; block_tokens is a power of two.
        tables: (sequences, width), int32: position p of a sequence is in page
            tables[s, p // block_tokens]. Entries after the last page are never read.
        lengths: (sequences,), int32: positions in [0, length) have their KV in the pages; 0 for a
            row of the batch that nobody uses.
        scale: what an element of the pool is multiplied by; not 1 for float8 only.
    """

    pool: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    scale: float = 1.0

    def check(self, layer: int) -> None:
        """Assert what the kernels take for granted."""
        assert self.pool.dim() == 6, "the pool is not page-first"
        assert self.pool.is_contiguous(), "the pool is not contiguous"
        assert self.pool.shape[2] == 2, "the pool's third axis is K and V"
        assert self.pool.dtype in POOL_DTYPES, f"no kernel reads {self.pool.dtype}"
        assert self.pool.shape[4] & (self.pool.shape[4] - 1) == 0, "block_tokens: a power of two"
        assert 0 <= layer < self.pool.shape[1], f"there is no layer {layer}"
        assert self.tables.dtype == self.lengths.dtype == torch.int32, "tables, lengths: int32"
        assert self.tables.stride(1) == 1, "a row of the tables is contiguous"
        assert self.tables.shape[0] == self.lengths.shape[0], "tables and lengths differ in rows"


def gather_reference(paged: Paged, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence in float64: each (length, kv_heads, head_dim)."""
    length = int(paged.lengths[sequence])
    pages = paged.tables[sequence, : -(-length // paged.pool.shape[4])].long()
    planes = paged.pool[pages, layer].double() * paged.scale
    keys, values = planes.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    return keys, values


@triton.jit
@no_type_check
def attend_keys(  # noqa: PLR0913
    q,
    plane,
    table,
    first,
    full,
    last,
    horizon,
    scale,
    page_stride,
    kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Steps over keys [first, last). q: (ROWS, DIMS), zero beyond HEAD_DIM. plane: the pool at the K
    # of one layer and head. table: the sequence's pages. All rows see the keys before full, which
    # is first plus whole tiles; of the others row r sees those before horizon[r].
    ROWS: tl.constexpr = q.shape[0]
    DIMS: tl.constexpr = q.shape[1]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    dim = tl.arange(0, DIMS)
    inside = dim < HEAD_DIM
    for masked in tl.static_range(2):
        for at in range(full if masked else first, last if masked else full, TILE):
            key = at + tl.arange(0, TILE)
            there = key < last
            page = tl.load(table + key // BLOCK_TOKENS, mask=there, other=0)
            # int64: a pool passes 2^31 elements at 4 GiB of bfloat16.
            row = page.to(tl.int64) * page_stride + (key % BLOCK_TOKENS) * HEAD_DIM
            mask = there[None, :] & inside[:, None]
            k = tl.load(plane + row[None, :] + dim[:, None], mask=mask, other=0.0)
            nothing = tl.zeros([ROWS, TILE], tl.float32)
            scores = dot(q, k.to(q.dtype), nothing, PRECISION) * (scale * LOG2_E)
            if masked:
                seen = there[None, :] & (key[None, :] < horizon[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2(peak - higher)
            weights = tl.exp2(scores - higher[:, None])
            value = plane + kv_heads * BLOCK_TOKENS * HEAD_DIM + row[:, None] + dim[None, :]
            v = tl.load(value, mask=there[:, None] & inside[None, :], other=0.0).to(q.dtype)
            sums = sums * shrink + tl.sum(weights, 1)
            acc = dot(weights.to(q.dtype), v, acc * shrink[:, None], PRECISION)
            peak = higher
    return peak, sums, acc
