"""The layers of a Llama for AVX-512 BF16, as phases that any number of threads work through.

    hidden += out(attend(rope(qkv(norm(hidden)))));  hidden += down(silu(gate) * up of norm(hidden))

The residual stream and every sum are float32; what enters a product is rounded to bfloat16. All
of it is written row by row and lane by lane, so a row's bits depend on no other row, on no number
of threads and on no cut of a prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numba import njit

from kvist.kernels.cpu import vectors as vec
from kvist.kernels.cpu.attention import attend_block
from kvist.kernels.cpu.linear import (
    BF16,
    GROUP_BYTES,
    TILE,
    sum_groups,
    tile_add,
    tile_bytes,
    tile_groups,
    tile_silu,
    tile_store,
)
from kvist.kernels.cpu.step import Step
from kvist.kernels.cpu.vectors import LANES, compiled
from kvist.kernels.cpu.work import finish, may_compute, take
from kvist.kernels.groups import GROUP

PHASES = 12  # of a layer
# Bytes of rows that are multiplied by all tiles before the next rows are: they stay in the second
# cache, 1 MiB on a Zen 4, beside a tile.
ROW_BYTES = 256 << 10
# Up to this many rows each thread normalizes all of them for itself, which is cheaper than to meet.
PRIVATE_ROWS = 4
# Rows that a thread takes at once.
NORM_ROWS, PLACE_ROWS = 8, 4
# Not Python's int, or numba would compile a function again for each of them.
QKV, OUT, GATE_UP, DOWN, HEAD = (np.int64(product) for product in range(5))


@compiled
def _norm_row(source, weight, width, eps, target):
    squares = vec.splat(0.0)
    for column in range(0, width, LANES):
        value = vec.load_f32(source + 4 * column)
        squares = vec.multiply_add(value, value, squares)
    mean = vec.lane_sum(squares) / np.float32(width)
    scale = vec.splat(np.float32(1.0) / np.sqrt(mean + eps))
    for column in range(0, width, LANES):
        value = vec.multiply(vec.load_f32(source + 4 * column), scale)
        vec.store_bf16(target + 2 * column, vec.multiply(value, vec.load_f32(weight + 4 * column)))


@compiled
def _norm(step, phase, norm):
    """Normalize all rows, with the last norm those whose logits are wanted; where they are then."""
    weights, rows, room = step.weights, step.rows, step.room
    wanted = norm == 2 * weights.layers
    width, eps = weights.hidden, np.float32(weights.eps)
    weight = weights.norms + norm * width * 4
    count = rows.wanted if wanted else rows.rows
    private = count <= PRIVATE_ROWS
    target = step.scratch if private else room.normed
    done, first = 0, 0
    while first < count:
        if private:
            last = count
        else:
            first = take(step.sync, phase, NORM_ROWS)
            last = min(first + NORM_ROWS, count)
        for row in range(first, last):
            source = vec.word(rows.last + 8 * row) if wanted else row
            place = room.hidden + 4 * source * width
            _norm_row(place, weight, width, eps, target + 2 * row * width)
            done += 1
        first = last if private else first
    if not private:
        finish(step.sync, phase, done, count)
    return target


@compiled
def _sum(step, phase, x, inputs, count):
    """The sums of all rows' groups of inputs, and bytes from group to group."""
    private = count <= PRIVATE_ROWS
    own = step.scratch + PRIVATE_ROWS * step.weights.hidden * 2
    target = own if private else step.room.sums
    done, first, groups = 0, 0, inputs // GROUP
    while first < count:
        if private:
            last = count
        else:
            first = take(step.sync, phase, NORM_ROWS)
            last = min(first + NORM_ROWS, count)
        for row in range(first, last):
            sum_groups(x + 2 * row * inputs, groups, target + 4 * row, 4 * count)
            done += 1
        first = last if private else first
    if not private:
        finish(step.sync, phase, done, count)
    return target, 4 * count


@compiled
def _silu(source, out, out_step, rows):
    """Of a tile: silu of the first 16 outputs times the last, rounded."""
    for row in range(rows):
        gate = vec.load_f32(source + row * 4 * TILE)
        up = vec.load_f32(source + row * 4 * TILE + 4 * LANES)
        below = vec.add(vec.splat(1.0), vec.exp(vec.subtract(vec.splat(0.0), gate)))
        vec.store_bf16(out + row * out_step, vec.multiply(vec.divide(gate, below), up))


@compiled
def _tile_of_codes(product, tile, lines, place, more):
    """_multiply for codes: the sum goes where it belongs, or to scratch before silu."""
    out, out_step = place
    sums, scratch = more
    count = lines[2]
    target = (scratch + GROUP_BYTES, 4 * TILE) if product == GATE_UP else place
    if product != OUT and product != DOWN:
        zero = vec.splat(0.0)
        for row in range(count):
            vec.store_f32(target[0] + row * target[1], zero)
            vec.store_f32(target[0] + row * target[1] + 64, zero)
    tile_groups(lines, tile, target, sums, scratch)
    if product == GATE_UP:
        _silu(target[0], out, out_step, count)


@compiled
def _multiply(step, phase, product, tiles, x):
    """One product of all rows, shared out by tiles of weights and parts of rows.

    Args: product: QKV, OUT, GATE_UP, DOWN or HEAD; tiles: where they begin, and their kind; x:
    address of the rows.
    """
    weights, rows = step.weights, step.rows
    inputs, outputs, out, out_step, tile_step = _size_of(weights, step.room, product)
    count = rows.wanted if product == HEAD else rows.rows
    most = max(24, ROW_BYTES // (2 * inputs) // 12 * 12)
    width, kind, pairs = outputs // TILE, tiles[1], inputs // 2
    items, size = (count + most - 1) // most * width, tile_bytes(kind, inputs)
    sums, sums_step = _sum(step, phase, x, inputs, count) if kind != BF16 else (x, x)
    scratch = step.scratch + PRIVATE_ROWS * (weights.hidden * 2 + inputs // GROUP * 4)
    scratch, done = (scratch + 63) // 64 * 64, 0
    while True:
        item = take(step.sync, phase + 1, 1)
        if item >= items:
            break
        number, first = item % width, item // width * most
        part, tile = min(most, count - first), tiles[0] + number * size
        line, place = x + 2 * first * inputs, out + first * out_step + number * tile_step
        if kind != BF16:
            _tile_of_codes(
                product,
                (tile, inputs // GROUP, kind),
                (line, 2 * inputs, part),
                (place, out_step),
                ((sums + 4 * first, sums_step), scratch),
            )
        elif product in (QKV, HEAD):
            tile_store((line, 2 * inputs), (tile, pairs), (place, out_step, 0), part)
        elif product == GATE_UP:
            tile_silu((line, 2 * inputs), (tile, pairs), (place, out_step, 0), part)
        else:
            tile_add((line, 2 * inputs), (tile, pairs), (place, out_step, 0), part)
        done += 1
    finish(step.sync, phase + 1, done, items)


@compiled
def _size_of(weights, room, product):
    """Inputs, outputs, where the result goes, bytes from row to row and from tile to tile."""
    hidden, inner, width = weights.hidden, weights.inner, weights.heads * weights.head_dim
    projected = width + 2 * weights.kv_heads * weights.head_dim
    if product == QKV:
        return hidden, projected, room.projected, projected * 4, TILE * 4
    if product == GATE_UP:
        return hidden, 2 * inner, room.inner, inner * 2, TILE
    if product == HEAD:
        return hidden, weights.vocab, room.logits, weights.vocab * 4, TILE * 4
    return width if product == OUT else inner, hidden, room.hidden, hidden * 4, TILE * 4


@compiled
def _turn_head(source, angles, half, scale, target):
    cos, sin = angles
    for column in range(0, half, LANES):
        first = vec.load_f32(source + 4 * column)
        second = vec.load_f32(source + 4 * (column + half))
        c = vec.multiply(vec.load_f32(cos + 4 * column), scale)
        s = vec.multiply(vec.load_f32(sin + 4 * column), scale)
        vec.store_bf16(
            target + 2 * column, vec.subtract(vec.multiply(first, c), vec.multiply(second, s))
        )
        vec.store_bf16(
            target + 2 * (column + half),
            vec.add(vec.multiply(second, c), vec.multiply(first, s)),
        )


@compiled
def _place_row(row, layer, step):
    """Turn a row's queries and keys, and write its keys and values to their page."""
    weights, rows, room = step.weights, step.rows, step.room
    heads, kv_heads, head_dim = weights.heads, weights.kv_heads, weights.head_dim
    groups, half = heads // kv_heads, head_dim // 2
    offset = vec.word(rows.positions + 8 * row) * half * 4
    angles = (weights.cos + offset, weights.sin + offset)
    source = room.projected + row * (heads + 2 * kv_heads) * head_dim * 4
    one, scale = vec.splat(1.0), vec.splat(np.float32(1.0) / np.sqrt(np.float32(head_dim)))
    for head in range(heads):
        line = (head // groups * rows.rows + row) * groups + head % groups
        target = room.queries + line * head_dim * 2
        _turn_head(source + head * head_dim * 4, angles, half, scale, target)
    plane = weights.block_tokens * head_dim * 2
    page = (vec.word(rows.places + 16 * row) * weights.layers + layer) * 2 * kv_heads
    place = vec.word(rows.places + 16 * row + 8)
    for head in range(kv_heads):
        target = rows.pool + (page + head) * plane + place * head_dim * 2
        _turn_head(source + (heads + head) * head_dim * 4, angles, half, one, target)
        target += kv_heads * plane
        value = source + (heads + kv_heads + head) * head_dim * 4
        for column in range(0, head_dim, LANES):
            vec.store_bf16(target + 2 * column, vec.load_f32(value + 4 * column))


@compiled
def _place(step, phase, layer):
    done, count = 0, step.rows.rows
    while True:
        first = take(step.sync, phase, PLACE_ROWS)
        if first >= count:
            break
        last = min(first + PLACE_ROWS, count)
        for row in range(first, last):
            _place_row(row, layer, step)
        done += last - first
    finish(step.sync, phase, done, count)


@compiled
def _attend(step, phase, layer):
    weights, rows, room = step.weights, step.rows, step.room
    heads, kv_heads, head_dim = weights.heads, weights.kv_heads, weights.head_dim
    groups = heads // kv_heads
    plane = weights.block_tokens * head_dim * 2
    page_bytes = weights.layers * 2 * kv_heads * plane
    items, done = rows.blocks * kv_heads, 0
    while True:
        item = take(step.sync, phase, 1)
        if item >= items:
            break
        head = item % kv_heads
        # The last blocks of a prompt have the most pages: first come those.
        block = rows.block + 40 * (rows.blocks - 1 - item // kv_heads)
        first, count = vec.word(block), vec.word(block + 8)
        keys = rows.pool + (layer * 2 * kv_heads + head) * plane
        out = room.attended + (first * heads + head * groups) * head_dim * 2
        attend_block(
            room.queries + (head * rows.rows + first) * groups * head_dim * 2,
            (out, heads * head_dim * 2),
            (rows.tables + 8 * vec.word(block + 16), vec.word(block + 24), page_bytes),
            (keys, keys + kv_heads * plane),
            (count, groups, head_dim, weights.block_tokens, vec.word(block + 32)),
            step.scratch,
        )
        done += 1
    finish(step.sync, phase, done, items)


@compiled
def _embed(step, phase):
    hidden, count, done = step.weights.hidden, step.rows.rows, 0
    while True:
        first = take(step.sync, phase, NORM_ROWS)
        if first >= count:
            break
        last = min(first + NORM_ROWS, count)
        for row in range(first, last):
            token = vec.word(step.rows.tokens + 8 * row)
            source = step.weights.embedding + token * hidden * 2
            target = step.room.hidden + 4 * row * hidden
            for column in range(0, hidden, LANES):
                vec.store_f32(target + 4 * column, vec.load_bf16(source + 2 * column))
        done += last - first
    finish(step.sync, phase, done, count)


@compiled
def _place_of(tiles, product):
    return vec.word(tiles + 16 * product), vec.word(tiles + 16 * product + 8)


def _define(stamp: int) -> Any:
    def run_layers(part, span, sync, weights, rows, room):
        """Compute some layers; before the first of all the embedding, after the last the logits.

        Args:
            part: number of this thread, 0 is the caller's; scratch is its own.
            span: first layer, layer after the last.
            sync: address of a work.Sync of phases(layers), the same for all threads of a step.
            weights: Weights. rows: Rows. room: Room.
        """
        _ = stamp
        step = Step(room.scratch + part * room.scratch_bytes, sync, weights, rows, room)
        first, last = span
        after = weights.layers * PHASES
        if first == 0:
            _embed(step, after)
        for layer in range(first, last):
            if not may_compute(sync, layer):
                return
            phase, tiles = layer * PHASES, weights.tiles + 64 * layer
            x = _norm(step, phase, 2 * layer)
            _multiply(step, phase + 1, QKV, _place_of(tiles, QKV), x)
            _place(step, phase + 3, layer)
            _attend(step, phase + 4, layer)
            _multiply(step, phase + 5, OUT, _place_of(tiles, OUT), room.attended)
            x = _norm(step, phase + 7, 2 * layer + 1)
            _multiply(step, phase + 8, GATE_UP, _place_of(tiles, GATE_UP), x)
            _multiply(step, phase + 10, DOWN, _place_of(tiles, DOWN), room.inner)
        if last == weights.layers and rows.wanted:
            x = _norm(step, after + 1, 2 * last)
            _multiply(step, after + 2, HEAD, (weights.head, weights.head_kind), x)

    try:
        return njit(run_layers, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # nowhere to write: it is then compiled at each start
        return njit(run_layers, nogil=True, error_model="numpy")


def _stamp() -> int:
    """Of the sources that run_layers is made of.

    numba looks for a change in the file of the function that it keeps compiled, and in the values
    that this encloses, but not in the files of what it calls.
    """
    digest = xxhash.xxh3_64()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.intdigest() >> 1


run_layers = _define(_stamp())


def phases(layers: int) -> int:
    """Phases of a step: see work."""
    return layers * PHASES + 4
