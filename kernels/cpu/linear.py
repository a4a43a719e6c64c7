"""Rows times weights for AVX-512 BF16: one order of additions, whatever the number of rows.

    y[r, o] = sum_i x[r, i] * weight[o, i]      two neighbours i at a time, first i first

A lane belongs to one output. It adds pairs of inputs in their order into one float32 register,
from the first to the last, so a row's result cannot depend on how many rows are computed with it;
that is true of the code and not measured. Rows are taken up to 12 at a time to use a weight in a
register more than once. Weights lie in tiles of 32 outputs: (inputs / 2, 32, 2), 64-byte aligned.

Weights in groups of 4 or 8 bits enter the products as whole numbers, which bfloat16 has exactly;
each group's sum is then scaled, and the offset times the sum of the group's inputs is added. So
no weight is rounded, and a row costs the same for any number of neighbours in bits and a third of
the bytes. A group is opened once for all rows of a call, in the first cache.

Bound: memory for few rows, arithmetic (one instruction of 32 products per cycle on a Zen 4) after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import types

from kvist.kernels.cpu import vectors as vec
from kvist.kernels.cpu.vectors import FLOATS, I8, I16, I32, I64, LANES, WORDS, compiled
from kvist.kernels.groups import GROUP

TILE = 32
PAIR_BYTES = 4 * TILE  # of one pair of inputs for the outputs of a tile, in bfloat16
GROUP4_BYTES = 4 * TILE + GROUP * TILE // 2
GROUP8_BYTES = 2 * TILE + GROUP * TILE
# Of an opened group: its codes in bfloat16, then scales and offsets in float32.
CODES_BYTES = GROUP // 2 * PAIR_BYTES
GROUP_BYTES = CODES_BYTES + 8 * TILE
BF16, INT8, INT4 = 0, 1, 2
Epilogue = Callable[[Any, list[Any], Any, Any, int], None]


def _store_tile(builder: Any, sums: list[Any], out: Any, _extra: Any, _row: int) -> None:
    vec.store(builder, sums[0], out)
    vec.store(builder, sums[1], out, 64)


def _add_tile(builder: Any, sums: list[Any], out: Any, _extra: Any, _row: int) -> None:
    for half, value in enumerate(sums):
        before = vec.load(builder, out, FLOATS, 64 * half)
        vec.store(builder, builder.fadd(before, value), out, 64 * half)


def _scale_add_tile(builder: Any, sums: list[Any], out: Any, extra: Any, row: int) -> None:
    scale = vec.broadcast(builder, vec.load(builder, extra[0], ir.FloatType(), 4 * row))
    for half, value in enumerate(sums):
        before = vec.load(builder, out, FLOATS, 64 * half)
        vec.store(builder, vec.fused(builder, before, scale, value), out, 64 * half)


def _group_tile(builder: Any, sums: list[Any], out: Any, extra: Any, row: int) -> None:
    """out += scale * product + offset * sum of the row's inputs."""
    sums_at, tile = extra
    total = vec.broadcast(builder, vec.load(builder, sums_at, ir.FloatType(), 4 * row))
    for half, value in enumerate(sums):
        scale = vec.load(builder, tile, FLOATS, CODES_BYTES + 64 * half)
        offset = vec.load(builder, tile, FLOATS, CODES_BYTES + 4 * TILE + 64 * half)
        before = vec.load(builder, out, FLOATS, 64 * half)
        with_scale = vec.fused(builder, value, scale, before)
        vec.store(builder, vec.fused(builder, total, offset, with_scale), out, 64 * half)


def _silu_tile(builder: Any, sums: list[Any], out: Any, _extra: Any, _row: int) -> None:
    gate, up = sums
    power = vec.exponential(builder, builder.fneg(gate))
    silu = builder.fdiv(gate, builder.fadd(vec.constant(1.0), power))
    vec.store(builder, vec.to_bf16(builder, builder.fmul(silu, up)), out)


def _define(rows: int, finish: Epilogue) -> Any:
    """The product of some rows and a tile, as one loop over pairs of inputs."""

    def code(builder: Any, *values: Any) -> None:
        x, x_step, weights, pairs, out, out_step, extra = values
        start = builder.block
        loop, end = builder.append_basic_block("loop"), builder.append_basic_block("end")
        lines = [
            vec.at(builder, builder.add(x, builder.mul(x_step, I64(row))), I32)
            for row in range(rows)
        ]
        tile = vec.at(builder, weights, FLOATS)
        builder.branch(loop)
        builder.position_at_end(loop)
        pair = builder.phi(I64)
        pair.add_incoming(I64(0), start)
        sums = [[builder.phi(FLOATS) for _half in range(2)] for _row in range(rows)]
        first = builder.mul(pair, I64(2))
        factors = []
        for half in range(2):
            value = builder.load(builder.gep(tile, [builder.add(first, I64(half))]))
            value.align = 64
            factors.append(builder.bitcast(value, vec.BFLOAT_PAIRS))
        done: list[list[Any]] = []
        for row in range(rows):
            value = builder.load(builder.gep(lines[row], [pair]))
            value.align = 2
            inputs = builder.bitcast(vec.broadcast(builder, value), vec.BFLOAT_PAIRS)
            done.append([])
            for half in range(2):
                total = sums[row][half]
                total.add_incoming(ir.Constant(FLOATS, None), start)
                done[row].append(vec.dot_pairs(builder, total, factors[half], inputs))
                total.add_incoming(done[row][half], loop)
        following = builder.add(pair, I64(1))
        pair.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, pairs), loop, end)
        builder.position_at_end(end)
        for row in range(rows):
            place = builder.add(out, builder.mul(out_step, I64(row)))
            finish(builder, done[row], place, (extra, weights), row)

    return vec.define(types.void, (types.int64,) * 7, code)


def _define_rows(finish: Epilogue) -> Any:
    """The product of any number of rows and a tile."""
    by12, by4, by1 = _define(12, finish), _define(4, finish), _define(1, finish)

    @compiled
    def rows_times_tile(x, tile, out, rows):
        line, line_step = x
        weights, pairs = tile
        place, place_step, extra = out
        while rows > 0:
            if rows >= 12:
                by12(line, line_step, weights, pairs, place, place_step, extra)
                count = 12
            elif rows >= 4:
                by4(line, line_step, weights, pairs, place, place_step, extra)
                count = 4
            else:
                by1(line, line_step, weights, pairs, place, place_step, extra)
                count = 1
            rows -= count
            line += count * line_step
            place += count * place_step
            extra += count * 4

    return rows_times_tile


# Each takes x: address of the rows, bytes from one to the next; tile: its address, pairs; out:
# address, bytes from row to row, address of a float32 per row (only for scale_add); rows.
# out = product; out += product; out = out * extra[row] + product; out = silu(first 16) * last 16,
# bfloat16. The others are float32.
tile_store = _define_rows(_store_tile)
tile_add = _define_rows(_add_tile)
tile_scale_add = _define_rows(_scale_add_tile)
tile_silu = _define_rows(_silu_tile)
_tile_group = _define_rows(_group_tile)


def _scales(builder: Any, source: Any, target: Any) -> None:
    """32 numbers of float16 to float32."""
    for half in range(2):
        narrow = vec.load(builder, source, ir.VectorType(ir.HalfType(), LANES), 32 * half)
        vec.store(builder, builder.fpext(narrow, FLOATS), target, 64 * half)


def _loop(builder: Any, count: int, body: Callable[[Any], None]) -> None:
    """Code for body(number) for number in range(count)."""
    start = builder.block
    loop, end = builder.append_basic_block("group"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    number = builder.phi(I64)
    number.add_incoming(I64(0), start)
    body(number)
    following = builder.add(number, I64(1))
    number.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, I64(count)), loop, end)
    builder.position_at_end(end)


def _unpack4(builder: Any, source: Any, target: Any) -> None:
    """Codes by a table of 16 numbers; it stands there twice, as an index has 5 bits."""
    _scales(builder, source, builder.add(target, I64(CODES_BYTES)))
    _scales(
        builder,
        builder.add(source, I64(2 * TILE)),
        builder.add(target, I64(CODES_BYTES + 4 * TILE)),
    )
    halves = ir.VectorType(I16, 2 * LANES)
    numbers = torch.arange(16.0).repeat(2).bfloat16().view(torch.int16).tolist()
    table = ir.Constant(halves, [I16(number) for number in numbers])
    data = builder.add(source, I64(4 * TILE))
    name = "llvm.x86.avx512.permvar.hi.512"

    def pair(number: Any) -> None:
        octets = builder.add(data, builder.mul(number, I64(TILE)))
        low = builder.zext(vec.load(builder, octets, ir.VectorType(I8, 2 * LANES)), halves)
        high = builder.lshr(low, ir.Constant(halves, [I16(4)] * 2 * LANES))
        place = builder.add(target, builder.mul(number, I64(PAIR_BYTES)))
        for half, codes in enumerate((low, high)):
            vec.store(builder, vec.call(builder, name, halves, table, codes), place, 64 * half)

    _loop(builder, GROUP // 2, pair)


def _unpack8(builder: Any, source: Any, target: Any) -> None:
    """Whole numbers up to 127 are exact in bfloat16."""
    _scales(builder, source, builder.add(target, I64(CODES_BYTES)))
    for half in range(2):
        offsets = builder.add(target, I64(CODES_BYTES + 4 * TILE))
        vec.store(builder, ir.Constant(FLOATS, None), offsets, 64 * half)
    data = builder.add(source, I64(2 * TILE))
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"

    def pair(number: Any) -> None:
        codes = builder.add(data, builder.mul(number, I64(2 * TILE)))
        place = builder.add(target, builder.mul(number, I64(PAIR_BYTES)))
        for half in range(2):
            parts = []
            for first in (32 * half, 32 * half + LANES):
                octets = vec.load(builder, codes, ir.VectorType(I8, LANES), first)
                parts.append(builder.sitofp(builder.sext(octets, WORDS), FLOATS))
            both = vec.call(builder, name, vec.BFLOAT_PAIRS, parts[1], parts[0])
            vec.store(builder, both, place, 64 * half)

    _loop(builder, GROUP // 2, pair)


# A group of a tile to GROUP_BYTES: (source, target).
_unpack_group4 = vec.define(types.void, (types.int64, types.int64), _unpack4)
_unpack_group8 = vec.define(types.void, (types.int64, types.int64), _unpack8)


@compiled
def tile_groups(x, weights, out, sums, scratch):
    """out += rows times a tile of codes, float32.

    Args:
        x: address of the rows, bytes from one to the next, how many.
        weights: address of the tile, its groups, INT8 or INT4.
        out: address, bytes from row to row.
        sums: address of the sums of each group's inputs, (groups, bytes from one to the next).
        scratch: GROUP_BYTES, 64-byte aligned.
    """
    lines, line_step, rows = x
    source, groups, kind = weights
    place, place_step = out
    sums_at, sums_step = sums
    for group in range(groups):
        if kind == INT4:
            _unpack_group4(source, scratch)
            source += GROUP4_BYTES
        else:
            _unpack_group8(source, scratch)
            source += GROUP8_BYTES
        line = (lines + group * GROUP * 2, line_step)
        _tile_group(line, (scratch, GROUP // 2), (place, place_step, sums_at), rows)
        sums_at += sums_step


@compiled
def sum_groups(x, groups, out, out_step):
    """The sums of a row's groups of inputs, each to its own place."""
    for group in range(groups):
        place = x + group * GROUP * 2
        both = vec.add(vec.load_bf16(place), vec.load_bf16(place + 2 * LANES))
        vec.store_number(out + group * out_step, vec.lane_sum(both))


@compiled
def tile_bytes(kind, inputs):
    """Bytes of a tile: kind is BF16, INT8 or INT4."""
    if kind == BF16:
        return inputs // 2 * PAIR_BYTES
    return inputs // GROUP * (GROUP4_BYTES if kind == INT4 else GROUP8_BYTES)
