"""Attention over pages for AVX-512 BF16: prefill and decode are the same code, page by page.

    out[r, h] = sum_t softmax_t(q[r, h] . k[t, h']) v[t, h']     t in [0, position of r]

Nothing is gathered: K and V are read where they lie in the page-first pool, once for all query
rows of a page and all heads of a group. A page's keys are turned (16 x 16 words in registers) and
its values interleaved into scratch that stays in the first cache; both products are then those of
kernels.cpu.linear, and a softmax with a running maximum joins the pages in their order. What a row
goes through is the same for one row as for a page of rows, so its bits are too.

Bound: memory for decode, arithmetic for prefill.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from kvist.kernels.cpu import vectors as vec
from kvist.kernels.cpu.linear import PAIR_BYTES, TILE, tile_scale_add, tile_store
from kvist.kernels.cpu.vectors import I16, I64, LANES, WORDS, compiled

# Keys that a softmax step sees: of larger pages a part at a time.
STEP_KEYS = 64
# Lines, that is query rows times heads of a group, that share a step; see linear: 12 rows.
LINES = 12
_HALVES32 = ir.VectorType(I16, 32)


def _turn(builder: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> None:
    """16 rows of 16 words to 16 columns, in four rounds that each join rows of pairs."""
    rows = [
        vec.load(builder, builder.add(source, builder.mul(source_step, I64(row))), WORDS)
        for row in range(LANES)
    ]
    for distance in (1, 2, 4, 8):
        low = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
        high = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
        turned = list(rows)
        for row in range(LANES):
            if not row & distance:
                a, b = rows[row], rows[row + distance]
                turned[row] = vec.shuffled(builder, a, b, low)
                turned[row + distance] = vec.shuffled(builder, a, b, high)
        rows = turned
    for row, value in enumerate(rows):
        vec.store(builder, value, builder.add(target, builder.mul(target_step, I64(row))))


def _interleave(builder: Any, first: Any, second: Any, target: Any) -> None:
    """Two rows of 32 halves to 32 pairs."""
    a, b = (vec.load(builder, address, _HALVES32) for address in (first, second))
    for half in range(2):
        lanes = [16 * half + lane // 2 + 32 * (lane % 2) for lane in range(32)]
        vec.store(builder, vec.shuffled(builder, a, b, lanes), target, 64 * half)


_ADDRESS = types.int64
turn = vec.define(types.void, (_ADDRESS,) * 4, _turn)
interleave = vec.define(types.void, (_ADDRESS,) * 3, _interleave)


def scratch_bytes(head_dim: int, lines: int) -> int:
    """Scratch of attend_block: keys, values, a padded copy of them, scores, weights, lines."""
    steps = 3 * STEP_KEYS * head_dim * 2 + LINES * (STEP_KEYS * 6 + 64)
    return steps + (lines + 3) * (4 * head_dim + 128)


@compiled
def _pad(source, keys, padded, head_dim, target):
    """Copy rows of a page that is smaller than a tile, and rows of zeros after them."""
    zero = vec.splat(0.0)
    for row in range(padded):
        for column in range(0, head_dim, 32):
            place = target + (row * head_dim + column) * 2
            if row < keys:
                vec.store_f32(place, vec.load_f32(source + (row * head_dim + column) * 2))
            else:
                vec.store_f32(place, zero)
    return target


@compiled
def _take_keys(source, keys, head_dim, target):
    """Rows of keys to tiles of 32 keys, as linear wants weights."""
    for key in range(0, keys, LANES):
        tile = target + key // TILE * (head_dim // 2 * PAIR_BYTES) + key % TILE * 4
        for column in range(0, head_dim, 32):
            place = source + (key * head_dim + column) * 2
            turn(place, head_dim * 2, tile + column // 2 * PAIR_BYTES, PAIR_BYTES)


@compiled
def _take_values(source, keys, head_dim, target):
    """Rows of values to tiles of 32 elements of a head."""
    for column in range(0, head_dim, TILE):
        tile = target + column // TILE * (keys // 2 * PAIR_BYTES)
        for key in range(0, keys, 2):
            place = source + (key * head_dim + column) * 2
            interleave(place, place + head_dim * 2, tile + key // 2 * PAIR_BYTES)


@compiled
def _soften(scores, weights, keys, last, state, factor):
    """One line's step of the softmax.

    Args: scores: float32, keys of them; weights: bfloat16, written; last: the last key that
    counts; state: the line's running maximum (16 floats) and sums (16 floats); factor: float32,
    what was added up before is multiplied by it.
    """
    top = vec.splat(-float("inf"))
    for place in range(0, keys, LANES):
        score = vec.keep_first(vec.load_f32(scores + 4 * place), last - place)
        vec.store_f32(scores + 4 * place, score)
        top = vec.larger(top, score)
    before = vec.load_f32(state)
    top = vec.larger(before, vec.splat(vec.lane_max(top)))
    scale = vec.exp(vec.subtract(before, top))
    total = vec.splat(0.0)
    for place in range(0, keys, LANES):
        weight = vec.exp(vec.subtract(vec.load_f32(scores + 4 * place), top))
        total = vec.add(total, weight)
        vec.store_bf16(weights + 2 * place, weight)
    vec.store_f32(state, top)
    vec.store_f32(state + 64, vec.multiply_add(vec.load_f32(state + 64), scale, total))
    vec.store_lane(factor, scale)


@compiled
def _step(lines, tiles, keys, last, state):
    """One step of some lines: scores, softmax, what the values add.

    Args:
        lines: address of their queries, how many, groups, head_dim.
        tiles: addresses of the keys and the values, and of room for scores.
        keys: of the step, a multiple of 32.
        last: first line's number, and the last key of the first row and of any, see _soften.
        state: addresses of the lines' softmax and of what they have added up.
    """
    queries, count, groups, head_dim = lines
    keys_at, values_at, scores = tiles
    line, first_last, most = last
    soft, sums = state
    weights = scores + LINES * STEP_KEYS * 4
    factors = weights + LINES * STEP_KEYS * 2
    # Three lines, a decode of many models, are computed as four: the fourth is not looked at.
    rows = 4 if count == 3 else count
    for key in range(0, keys, TILE):
        tile = (keys_at + key // TILE * (head_dim // 2 * PAIR_BYTES), head_dim // 2)
        tile_store((queries, head_dim * 2), tile, (scores + 4 * key, 4 * STEP_KEYS, 0), rows)
    for one in range(count):
        _soften(
            scores + one * STEP_KEYS * 4,
            weights + one * STEP_KEYS * 2,
            keys,
            min(most, first_last + (line + one) // groups),
            soft + one * 128,
            factors + 4 * one,
        )
    for column in range(0, head_dim, TILE):
        tile = (values_at + column // TILE * (keys // 2 * PAIR_BYTES), keys // 2)
        out = (sums + column * 4, head_dim * 4, factors)
        tile_scale_add((weights, STEP_KEYS * 2), tile, out, rows)


@compiled
def attend_block(queries, out, table, head, shape, scratch):
    """Attend from rows of one sequence that are all in the last of its pages, for one KV head.

    Args:
        queries: bfloat16, (rows, groups, head_dim), scaled by 1 / sqrt(head_dim); after them three
            lines more can be read.
        out: bfloat16, where the first row's first head goes, (groups, head_dim) is contiguous; and
            bytes from row to row.
        table: address of int64 page numbers, how many, bytes of a page of the pool.
        head: address of the K of this layer and KV head in page 0, and of its V.
        shape: rows, groups, head_dim, block_tokens, place of the first row in its page.
        scratch: scratch_bytes of it, 64-byte aligned.
    """
    rows, groups, head_dim, block_tokens, first_place = shape
    tables, pages, page_step = table
    lines = rows * groups
    step = min(block_tokens, STEP_KEYS)
    padded = (step + TILE - 1) // TILE * TILE
    plane = STEP_KEYS * head_dim * 2
    tiles = (scratch, scratch + plane, scratch + 3 * plane)
    states = scratch + 3 * plane + LINES * (STEP_KEYS * 6 + 64)
    sums = states + (lines + 3) * 128
    zero, least = vec.splat(0.0), vec.splat(-float("inf"))
    for line in range(lines + 3):
        vec.store_f32(states + line * 128, least)
        vec.store_f32(states + line * 128 + 64, zero)
        for column in range(0, head_dim, LANES):
            vec.store_f32(sums + (line * head_dim + column) * 4, zero)
    for page in range(pages):
        place = vec.word(tables + 8 * page) * page_step
        for begin in range(0, block_tokens, step):
            offset = place + begin * head_dim * 2
            _take_page(head, offset, (step, padded, head_dim), tiles, scratch + 2 * plane)
            # In earlier pages every key counts; here those up to the row's own.
            most = step - 1
            first = first_place - begin if page == pages - 1 else most
            for line in range(0, lines, LINES):
                part = (queries + line * head_dim * 2, min(LINES, lines - line), groups, head_dim)
                state = (states + line * 128, sums + line * head_dim * 4)
                _step(part, tiles, padded, (line, first, most), state)
    _finish(out, lines, groups, head_dim, (states, sums))


@compiled
def _take_page(head, offset, shape, tiles, spare):
    keys_at, values_at = head
    step, padded, head_dim = shape
    rows = keys_at + offset
    if padded != step:
        rows = _pad(rows, step, padded, head_dim, spare)
    _take_keys(rows, padded, head_dim, tiles[0])
    rows = values_at + offset
    if padded != step:
        rows = _pad(rows, step, padded, head_dim, spare)
    _take_values(rows, padded, head_dim, tiles[1])


@compiled
def _finish(out, lines, groups, head_dim, state):
    """Divide by the sums of the softmax, and round."""
    states, sums = state
    out_at, out_step = out
    for line in range(lines):
        share = vec.splat(np.float32(1.0) / vec.lane_sum(vec.load_f32(states + line * 128 + 64)))
        place = out_at + line // groups * out_step + line % groups * head_dim * 2
        for column in range(0, head_dim, LANES):
            value = vec.load_f32(sums + (line * head_dim + column) * 4)
            vec.store_bf16(place + column * 2, vec.multiply(value, share))
