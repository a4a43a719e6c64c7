"""The kernels of kernels/cpu compute their references, whatever the shape; one row or many."""

from __future__ import annotations

import pytest
import torch

from kvist.engine.models.build import missing_for_own_kernels
from kvist.kernels.attention import attention_reference
from kvist.kernels.groups import Grouped, to_groups

if lacks := missing_for_own_kernels():
    pytest.skip(f"needs {lacks}", allow_module_level=True)

from numba import njit

from kvist.kernels.cpu.attention import attend_block, scratch_bytes
from kvist.kernels.cpu.linear import (
    BF16,
    GROUP_BYTES,
    TILE,
    sum_groups,
    tile_bytes,
    tile_groups,
    tile_store,
)
from kvist.kernels.cpu.packing import pack
from kvist.kernels.cpu.work import Sync, Team, aligned, finish, take


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@njit(nogil=True)
def multiply(x, size, weights, out, sums, scratch):
    rows, inputs = size
    weights, tiles, kind = weights
    tile_size = tile_bytes(kind, inputs)
    for row in range(rows):
        sum_groups(x + 2 * row * inputs, inputs // 32, sums + 4 * row, 4 * rows)
    for tile in range(tiles):
        place = out + 4 * TILE * tile
        source = weights + tile * tile_size
        if kind == BF16:
            tile_store((x, 2 * inputs), (source, inputs // 2), (place, 4 * TILE * tiles, 0), rows)
        else:
            packed = (source, inputs // 32, kind)
            lines = (x, 2 * inputs, rows)
            tile_groups(lines, packed, (place, 4 * TILE * tiles), (sums, 4 * rows), scratch)


def product(x: torch.Tensor, weight: torch.Tensor | Grouped) -> torch.Tensor:
    """(rows, outputs) in whole tiles, float32."""
    tiles = pack(weight)
    outputs = weight.codes.shape[0] if isinstance(weight, Grouped) else len(weight)
    width = -(-outputs // TILE)
    rows, inputs = x.shape
    out, sums = torch.zeros(rows, width * TILE), torch.zeros(inputs // 32 * rows)
    scratch = aligned(GROUP_BYTES)
    packed = (tiles.address, width, tiles.kind)
    places = (out.data_ptr(), sums.data_ptr(), int(scratch.ctypes.data))
    multiply(x.data_ptr(), (rows, inputs), packed, *places)
    return out


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (96, 64), (576, 100)])
def test_a_product_is_exact_up_to_float32_and_a_row_is_the_same_alone(
    bits: int, inputs: int, outputs: int
) -> None:
    x = randn(30, inputs).bfloat16()
    plain = randn(outputs, inputs, seed=1)
    weight = plain.bfloat16() if bits == 16 else to_groups(plain, bits)
    values = weight.values() if isinstance(weight, Grouped) else weight
    exact = x.double() @ values.double().T
    magnitude = x.double().abs() @ values.double().abs().T
    if bits == 4:  # codes and offsets are added up apart, and are larger than their sum
        magnitude = magnitude + x.double().abs().sum(1, keepdim=True) * 2 * plain.abs().max()
    together = product(x, weight)
    error = (together[:, :outputs].double() - exact).abs()
    assert (error <= magnitude * inputs * 2**-24).all()
    assert not together[:, outputs:].any()
    for rows in (1, 2, 3, 4, 5, 12, 13, 17):
        assert torch.equal(product(x[:rows], weight), together[:rows])
    assert torch.equal(product(x[7:8], weight), together[7:8])


@pytest.mark.parametrize(("bits", "steps"), [(4, 15), (8, 254)])
def test_rounding_to_codes_errs_by_half_a_step_of_a_group(bits: int, steps: int) -> None:
    weight = randn(40, 96)
    weight[3, :32] = 0.0
    weight[4, 32:64] = 2.5
    groups = to_groups(weight, bits)
    wide = weight.view(40, 3, 32)
    span = wide.amax(-1) - wide.amin(-1) if bits == 4 else 2 * wide.abs().amax(-1)
    # float16 rounds scale and offset: 2^-11 of each.
    slack = (span / steps * 255 + wide.abs().amax(-1) * 2) * 2**-11
    error = (groups.values().view(40, 3, 32) - wide).abs().amax(-1)
    assert (error <= span / steps / 2 + slack).all()


@njit(nogil=True)
def attend(queries, out, table, head, shape, scratch):
    attend_block(queries, out, table, head, shape, scratch)


def attended(q: torch.Tensor, pool: torch.Tensor, pages: list[int], place: int) -> torch.Tensor:
    """q: (rows, groups, head_dim); pool: (pages, 2, block_tokens, head_dim): one KV head."""
    rows, groups, head_dim = q.shape
    block_tokens = pool.shape[2]
    lines = torch.cat((q.flatten(0, 1), q.new_zeros(3, head_dim)))
    out = torch.empty_like(q)
    table = torch.tensor(pages)
    plane = block_tokens * head_dim * 2
    scratch = aligned(scratch_bytes(head_dim, rows * groups))
    shape = (rows, groups, head_dim, block_tokens, place)
    keys = pool.data_ptr()
    pages_at = (table.data_ptr(), len(pages), 2 * plane)
    place_of_out = (out.data_ptr(), groups * head_dim * 2)
    scratch_at = int(scratch.ctypes.data)
    attend(lines.data_ptr(), place_of_out, pages_at, (keys, keys + plane), shape, scratch_at)
    return out


@pytest.mark.parametrize("block_tokens", [1, 4, 16, 32, 64, 128])
@pytest.mark.parametrize(("groups", "head_dim"), [(1, 32), (3, 64), (5, 128)])
def test_attention_is_the_softmax_over_the_pages(
    block_tokens: int, groups: int, head_dim: int
) -> None:
    pool = randn(6, 2, block_tokens, head_dim, seed=2).bfloat16()
    pages = [4, 0, 3]
    rows = min(block_tokens, 7)
    place = block_tokens - rows
    q = (randn(rows, groups, head_dim, seed=3) * head_dim**-0.5).bfloat16()
    out = attended(q, pool, pages, place)
    keys, values = (pool[pages, part].flatten(0, 1)[:, None] for part in (0, 1))
    exact = attention_reference(q, keys, values, 2 * block_tokens + place)
    # Weights are rounded to bfloat16 (2^-9 of each) and so is the result.
    assert (out.double() - exact).abs().max() <= 2**-8 * values.abs().max()
    assert torch.equal(attended(q[-1:], pool, pages, block_tokens - 1), out[-1:])


@njit(nogil=True)
def count_items(sync, phases, items, counts):
    for phase in range(phases):
        done = 0
        while True:
            item = take(sync, phase, 1)
            if item >= items:
                break
            counts[phase, item] += 1
            done += 1
        finish(sync, phase, done, items)


def test_every_item_of_every_phase_is_done_once_however_many_threads_come() -> None:
    team = Team(4)
    for _ in range(20):
        sync = Sync(50)
        counts = torch.zeros(50, 13, dtype=torch.int64).numpy()

        def work(_part: int, sync: Sync = sync, counts: object = counts) -> None:
            count_items(sync.address, 50, 13, counts)

        team.run(work, lambda work=work: work(0))
        assert (counts == 1).all()
    team.close()
