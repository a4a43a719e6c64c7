"""Every kernel computes its reference, and gives a row the same bits whatever is beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvist.kernels.activation import GRAIN_ELEMENTS, silu_mul, silu_mul_reference
from kvist.kernels.attention import (
    attend,
    attention_reference,
    gather_pages,
    least_rows,
    page_mask,
)
from kvist.kernels.linear import Linear, best_cpu_dtype, linear_reference
from kvist.kernels.norm import rms_norm, rms_norm_reference
from kvist.kernels.rope import (
    CACHE_ROWS,
    RopeParams,
    inverse_frequencies,
    llama3_divisors,
    rope,
    rope_reference,
    rope_step,
    rope_table,
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def half_ulp(dtype: torch.dtype) -> float:
    """Largest relative error of rounding once to this dtype."""
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (64, 100)])
def test_linear_is_the_product_up_to_rounding(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    inputs, outputs = shape
    x = randn(9, inputs, dtype=dtype)
    weight = randn(outputs, inputs, seed=1, dtype=dtype)
    # Sums of n terms in float32 err by at most n ulps of the sum of magnitudes; then one rounding.
    magnitude = x.double().abs() @ weight.double().abs().T
    exact = linear_reference(x, weight)
    error = (Linear(weight)(x).double() - exact).abs()
    bound = magnitude * inputs * half_ulp(torch.float32) + exact.abs() * half_ulp(dtype)
    assert bool((error <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [64, 576, 1024, 1152, 1536, 4096])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_linear_does_not_depend_on_the_rows_beside_it(
    dtype: torch.dtype, inputs: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    x = randn(130, inputs, dtype=dtype)
    linear = Linear(randn(320, inputs, seed=1, dtype=dtype))
    whole = linear(x)
    for rows in (1, 2, 3, 5, 16, 17, 64, 65):
        for first in range(0, 130 - rows, max(rows, 5)):
            part = slice(first, first + rows)
            assert torch.equal(linear(x[part]), whole[part])


def test_the_dtype_for_this_processor_is_one_that_models_load_in() -> None:
    assert best_cpu_dtype() in DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_its_reference_and_keeps_rows_apart(dtype: torch.dtype) -> None:
    x, weight = randn(33, 576, dtype=dtype), randn(576, seed=1, dtype=dtype)
    whole = rms_norm(x, weight, 1e-5)
    exact = rms_norm_reference(x, weight, 1e-5)
    # Two roundings to the dtype, and a mean of 576 squares in float32 that is far more exact.
    assert bool(((whole - exact).abs() <= exact.abs() * (2.1 * half_ulp(dtype) + 1e-6)).all())
    for rows in (1, 2, 7):
        assert torch.equal(rms_norm(x[3 : 3 + rows], weight, 1e-5), whole[3 : 3 + rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_is_its_reference_up_to_its_two_roundings(dtype: torch.dtype) -> None:
    x = randn(5, 200, dtype=dtype)
    exact = silu_mul_reference(x)
    bound = exact.abs() * (2.1 * half_ulp(dtype) + 1e-6)
    assert bool(((silu_mul(x) - exact).abs() <= bound).all())


@pytest.mark.parametrize("width", [100, 1536])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_of_silu_mul_does_not_depend_on_rows_or_threads(width: int, threads: int) -> None:
    rows = 3 * GRAIN_ELEMENTS // width + 5
    x = randn(rows, 2 * width)
    alone = torch.cat([silu_mul(x[i : i + 1].clone()) for i in range(rows)])
    torch.set_num_threads(threads)
    for count in (rows, rows - 1, rows // 2, 7):
        assert torch.equal(silu_mul(x[:count].clone()), alone[:count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_turns_and_scales_as_its_reference(dtype: torch.dtype) -> None:
    params = RopeParams(10000.0, 16, 300, (1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0))
    x = randn(CACHE_ROWS + 9, 3, 16, dtype=dtype)
    positions = torch.randint(0, 300, (len(x),), generator=torch.Generator().manual_seed(2))
    scales = torch.tensor([0.25, 0.25, 1.0])
    turned = rope(x, rope_step(rope_table(params), positions, scales))
    exact = rope_reference(x, positions, params) * scales[:, None]
    # Angles reach 300 and are float32, so cos and sin are off by 300 ulps; then one rounding.
    bound = 300 * torch.finfo(torch.float32).eps * 8 + exact.abs() * half_ulp(dtype)
    assert bool(((turned - exact).abs() <= bound).all())


def test_rope_gives_a_row_the_same_bits_in_any_batch() -> None:
    params = RopeParams(10000.0, 64, 512)
    x, positions = randn(300, 2, 64), torch.arange(300)
    table, scales = rope_table(params), torch.tensor([0.125, 1.0])
    whole = rope(x, rope_step(table, positions, scales))
    for rows in (slice(0, 1), slice(7, 9), slice(100, 299)):
        part = rope(x[rows], rope_step(table, positions[rows], scales))
        assert torch.equal(part, whole[rows])


def test_llama3_scaling_leaves_fast_pairs_and_divides_slow_ones_by_the_factor() -> None:
    params = RopeParams(500000.0, 128, 131072)
    divisors = llama3_divisors(params, 8.0, 1.0, 4.0, 8192)
    turns = 8192 * inverse_frequencies(params.theta, params.head_dim) / (2 * torch.pi)
    for divisor, count in zip(divisors, turns.tolist(), strict=True):
        assert 1.0 <= divisor <= 8.0
        assert divisor == 1.0 or count < 4.0
        assert divisor == 8.0 or count > 1.0


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, block: int
) -> torch.Tensor:
    """attend over q (rows, heads, dim) in one page; k, v are (pages * block, kv_heads, dim)."""
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    place = start % block
    mask = page_mask(block, q.dtype, q.device)[place : place + rows].view(1, 1, 1, rows, block)
    groups = q.view(1, rows, kv_heads, heads // kv_heads, dim)
    keys, values = (part.permute(1, 0, 2)[None].contiguous() for part in (k, v))
    out = attend(groups, keys, values, mask, least_rows(block, dim, q.dtype))
    return out.reshape(rows, heads, dim)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (9, 3), (8, 1)])
@pytest.mark.parametrize("start", [0, 5, 37, 111])
def test_attention_is_its_reference(heads: tuple[int, int], start: int) -> None:
    query_heads, kv_heads = heads
    block = 16
    tokens = (start // block + 1) * block
    rows = min(7, tokens - start)
    q = randn(rows, query_heads, 32) / 32**0.5
    k, v = randn(tokens, kv_heads, 32, seed=1), randn(tokens, kv_heads, 32, seed=2)
    exact = attention_reference(q, k, v, start)
    # float32 with sums of at most 128 terms of order 1.
    assert (attend_rows(q, k, v, start, block) - exact).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 3, 64, 64), (4, 2, 16, 16), (4, 2, 16, 4), (4, 4, 64, 64)])
def test_a_row_of_attention_does_not_depend_on_the_rows_beside_it(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    heads, kv_heads, dim, block = shape
    for pages in (1, 2, 5, 17):
        tokens, start = pages * block, (pages - 1) * block
        k = randn(tokens, kv_heads, dim, seed=1, dtype=dtype)
        v = randn(tokens, kv_heads, dim, seed=2, dtype=dtype)
        q = randn(block, heads, dim, dtype=dtype)
        whole = attend_rows(q, k, v, start, block)
        for rows in (1, 2, 3, block // 2):
            for first in (0, 1, block - rows):
                part = q[first : first + rows]
                alone = attend_rows(part, k, v, start + first, block)
                assert torch.equal(alone, whole[first : first + rows])


def test_gather_copies_the_rows_it_is_told_to_in_their_order() -> None:
    pool, index = randn(10, 6), torch.tensor([7, 0, 7, 3])
    out = torch.empty(4, 6)
    gather_pages(pool, index, out)
    assert torch.equal(out, pool[[7, 0, 7, 3]])
