"""Every other device kernel computes its reference, at odd shapes and, on a GPU, at real ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sim.device import DEVICE, DTYPES, ULP32, randn, random_pages, rounding, sizes

from kvist.kernels.activation import silu_mul_reference
from kvist.kernels.device.add_norm import add_rms_norm, add_rms_norm_reference
from kvist.kernels.device.gate import silu_gate
from kvist.kernels.device.kv_copy import gather, gather_reference, scatter
from kvist.kernels.device.matmul import matmul
from kvist.kernels.device.rope_store import find_slots, rope_store, rope_store_reference
from kvist.kernels.device.sampling import Draws, new_draws, probabilities_reference, sample
from kvist.kernels.linear import linear_reference
from kvist.kernels.narrow import FLOAT8, LIMITS
from kvist.kernels.rope import RopeParams, rope_table

# rows, heads, kv_heads, block_tokens, head_dim
ROPE_SHAPES = [(5, 9, 3, 16, 80), (3, 4, 2, 4, 16)]
ROPE_DTYPES = [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float8_e4m3fn)]


def carries(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where rounding up gives a power of two: there the interpreter loses a bit of float8."""
    rounded = exact.to(dtype).double().abs()
    up = (rounded >= exact.abs()) & (torch.frexp(rounded).mantissa == 0.5)
    return up & (DEVICE.type == "cpu" and dtype == torch.float8_e4m3fn)


@pytest.mark.parametrize("dtypes", ROPE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", sizes(ROPE_SHAPES, [(4096, 32, 8, 64, 128)]), ids=str)
def test_queries_are_turned_and_keys_and_values_are_in_their_pages(
    dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int, int, int]
) -> None:
    dtype, pool_dtype = dtypes
    rows, heads, kv_heads, block_tokens, head_dim = shape
    paged = random_pages([rows, 7], (2, kv_heads, block_tokens, head_dim), pool_dtype)
    before = paged.pool.clone()
    paged = dataclasses.replace(paged, scale=0.25 if pool_dtype == torch.float8_e4m3fn else 1.0)
    projected = randn(rows + 1, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    positions = torch.arange(rows + 1, device=DEVICE)
    table = rope_table(RopeParams(10000.0, head_dim, rows + 1), DEVICE.type)
    # The last row belongs to nobody and must not be stored.
    owners = torch.where(positions < rows, 0, -1)
    slots = find_slots(paged, owners, positions)
    queries = rope_store(projected, positions, table, paged, 1, slots)

    exact_q, exact_k, exact_v = rope_store_reference(projected, positions, table, heads, kv_heads)
    # Two products and a sum in float32, of at most the largest number each; then one rounding.
    noise = 4 * ULP32 * float(projected.abs().max())
    exact_q *= head_dim**-0.5
    error = (queries.double() - exact_q).abs()
    assert bool((error <= noise + exact_q.abs() * rounding(dtype)).all())
    # On the host, which has every operation for float8.
    at = slots[:rows].cpu()
    places = paged.pool.cpu()[at // block_tokens, 1, :, :, at % block_tokens].to(DEVICE)
    # Below 2^-6 float8 has steps of 2^-9, of which the interpreter cuts a whole one off.
    least = 2.0**-9 * paged.scale if pool_dtype == torch.float8_e4m3fn else 0.0
    for stored, exact in ((places[:, 0], exact_k[:rows]), (places[:, 1], exact_v[:rows])):
        error = (stored.double() * paged.scale - exact).abs()
        right = error <= noise + least + exact.abs() * rounding(pool_dtype)
        assert bool((right | carries(exact / paged.scale, pool_dtype)).all())
    places = torch.zeros_like(before, dtype=torch.bool)
    places[slots[:rows] // block_tokens, 1, :, :, slots[:rows] % block_tokens] = True
    untouched = ~places.cpu()
    after = paged.pool.cpu().view(torch.uint8).view(*before.shape, -1)
    assert torch.equal(
        after[untouched], before.cpu().view(torch.uint8).view(*before.shape, -1)[untouched]
    )


@pytest.mark.parametrize("pool_dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("shape", sizes(ROPE_SHAPES[1:], [(4096, 32, 8, 64, 128)]), ids=str)
def test_what_a_page_cannot_hold_is_its_largest_number_and_no_nan(
    pool_dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    rows, heads, kv_heads, block_tokens, head_dim = shape
    scale = 0.25 if pool_dtype == FLOAT8 else 1.0
    paged = random_pages([rows], (1, kv_heads, block_tokens, head_dim), pool_dtype)
    paged = dataclasses.replace(paged, scale=scale)
    limit = LIMITS[pool_dtype] * scale
    projected = randn(rows, (heads + 2 * kv_heads) * head_dim).sign() * limit * 1.01
    projected[:, -head_dim:] *= 1e30
    # At position 0 nothing is turned.
    positions, owner = torch.arange(rows, device=DEVICE), torch.zeros_like(projected[:, 0]).long()
    table = rope_table(RopeParams(10000.0, head_dim, rows), DEVICE.type)
    slots = find_slots(paged, owner, positions)
    rope_store(projected, positions * 0, table, paged, 0, slots)
    at = slots.cpu()
    stored = paged.pool.cpu()[at // block_tokens, 0, :, :, at % block_tokens].double() * scale
    wanted = projected.cpu().view(rows, heads + 2 * kv_heads, head_dim)[:, heads:]
    assert torch.equal(stored.flatten(1, 2), wanted.double().clamp(-limit, limit))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", sizes([(3, 200), (2, 64)], [(257, 4096), (5, 16384)]), ids=str)
def test_add_and_norm_are_their_references_and_keep_rows_apart(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x, stream = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    weight = randn(shape[1], seed=2, dtype=dtype)
    total = stream.double() + x.double()
    kept = stream.clone()
    whole = add_rms_norm(x, kept, weight, 1e-5)
    assert bool(((kept - total).abs() <= total.abs() * rounding(dtype) * 1.001).all())
    exact = add_rms_norm_reference(torch.zeros_like(x), kept, weight, 1e-5)
    # A mean of width squares in float32, of which the root is taken: half its error.
    relative = rounding(dtype) + shape[1] * ULP32 / 2 + 4 * ULP32
    assert bool(((whole - exact).abs() <= exact.abs() * relative).all())
    alone = add_rms_norm(x[1:2], stream[1:2].clone(), weight, 1e-5)
    assert torch.equal(alone, whole[1:2])
    assert torch.equal(add_rms_norm(None, kept, weight, 1e-5), whole)


# The interpreter warns where a device goes on with infinity, which gives the right 0.
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", sizes([(3, 130), (2, 1030)], [(300, 14336)]), ids=str)
def test_the_gate_is_its_reference_up_to_one_rounding(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = randn(shape[0], 2 * shape[1], dtype=dtype) * 4
    x[0, :3] = torch.tensor([-1000.0, 1000.0, 0.0])
    exact = silu_mul_reference(x)
    # exp errs by as many ulps as its argument, which random numbers of this size keep under 32.
    bound = exact.abs() * (rounding(dtype) + 40 * ULP32) + 1e-30
    assert bool(((silu_gate(x) - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", sizes([(70, 100, 65), (1, 64, 3)], [(333, 4096, 6144)]), ids=str)
def test_the_fixed_tile_product_is_its_reference_and_keeps_rows_apart(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    rows, inputs, outputs = shape
    x, weight = randn(rows, inputs, dtype=dtype), randn(outputs, inputs, seed=1, dtype=dtype)
    whole = matmul(x, weight)
    exact = linear_reference(x, weight)
    # A sum of as many products in float32 as there are inputs, then one rounding.
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = magnitude * inputs * ULP32 + exact.abs() * rounding(dtype)
    assert bool(((whole - exact).abs() <= bound).all())
    for first, last in ((0, 1), (rows // 2, rows)):
        assert torch.equal(matmul(x[first:last].contiguous(), weight), whole[first:last])


@pytest.mark.parametrize("layers", [slice(None), slice(1, 2)], ids=["page", "layer"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_pages_are_gathered_and_scattered_bit_for_bit(dtype: torch.dtype, layers: slice) -> None:
    # Any bits at all, NaN among them; a page is no multiple of the words that a program copies.
    raw = torch.randint(0, 256, (9, 3, 2, 5, 16, 40 * dtype.itemsize), dtype=torch.uint8)
    pool = raw.to(DEVICE).view(dtype)[:, layers]
    ids = torch.tensor([7, 0, 3, 8], device=DEVICE)
    staging = torch.zeros((5, *pool.shape[1:]), dtype=dtype, device=DEVICE)
    gather(pool, ids, staging)
    assert torch.equal(staging[:4].view(torch.uint8), gather_reference(pool.view(torch.uint8), ids))
    assert not bool(staging[4].view(torch.uint8).any())
    target = torch.zeros_like(raw.to(DEVICE).view(dtype))
    scatter(target[:, layers], ids.int(), staging)
    expected = torch.zeros_like(target).view(torch.uint8)
    expected[ids, layers] = pool.view(torch.uint8)[ids]
    assert torch.equal(target.view(torch.uint8), expected)


def philox_reference(seed: int, drawn: int, tokens: int) -> npt.NDArray[np.uint64]:
    """First words of Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3)
    of the counters (token, drawn, 0)."""
    word = 2**32 - 1
    keys = [seed & word, seed >> 32 & word]
    zero = np.zeros(tokens, np.uint64)
    c = [np.arange(tokens, dtype=np.uint64), zero + (drawn & word), zero + (drawn >> 32), zero]
    for _ in range(10):
        low, high = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            high >> np.uint64(32) ^ c[1] ^ np.uint64(keys[0]),
            high & np.uint64(word),
            low >> np.uint64(32) ^ c[3] ^ np.uint64(keys[1]),
            low & np.uint64(word),
        ]
        keys = [keys[0] + 0x9E3779B9 & word, keys[1] + 0xBB67AE85 & word]
    return c[0]


def noise_reference(seed: int, drawn: int, tokens: int) -> torch.Tensor:
    """Gumbel noise of every token, in float64: u is the word, folded to 31 bits as Triton does."""
    words = philox_reference(seed, drawn, tokens).astype(np.int64)
    folded = np.where(words < 2**31, words, 2**32 - 1 - words)
    u = torch.from_numpy(folded).double() * 4.6566127342e-10
    return -torch.log(-torch.log1p(-u))


# temperature, top_k, top_p, min_p, seed, drawn
ASKED = [
    (0.0, 0, 1.0, 0.0, 1, 0),
    (1.0, 0, 1.0, 0.0, 2, 0),
    (0.7, 5, 1.0, 0.0, 2**63 - 1, 7),
    (1.3, 0, 0.5, 0.0, 3, 2**33),
    (1.0, 0, 1.0, 0.2, 4, 1),
    (2.0, 40, 0.9, 0.01, -5, 3),
    (1e-6, 0, 0.99, 0.0, 6, 0),
    (5.0, 1, 0.01, 0.0, 7, 0),
    (0.9, 10**6, 0.8, 0.0, 8, 0),
]


def draws_of(asked: list[tuple[float, int, float, float, int, int]]) -> Draws:
    draws = new_draws(len(asked), DEVICE)
    for field, values in zip(dataclasses.fields(Draws), zip(*asked, strict=True), strict=True):
        column = getattr(draws, field.name)
        column.copy_(torch.tensor(values, dtype=column.dtype))
    return draws


@pytest.mark.parametrize("vocab", sizes([97, 128], [128256]))
def test_a_row_takes_the_token_whose_weight_and_noise_are_highest(vocab: int) -> None:
    logits = randn(len(ASKED), vocab, seed=vocab) * 3
    logits[3, 5:9] = logits[3].max() - 1  # equal ones, at or beside the threshold
    logits[4, 11] = float("-inf")
    tokens = torch.full((len(ASKED),), -1, device=DEVICE)
    sample(logits, draws_of(ASKED), tokens)
    for row, (temperature, top_k, top_p, min_p, seed, drawn) in enumerate(ASKED):
        chances = probabilities_reference(logits[row], temperature, top_k, top_p, min_p).cpu()
        noise = noise_reference(seed, drawn, vocab) if temperature else torch.zeros(vocab)
        assert int(tokens[row]) == int((chances.log() + noise).argmax()), ASKED[row]


def test_a_draw_depends_on_its_own_row_only_and_follows_its_seed_and_count() -> None:
    logits = randn(1, 64).expand(6, 64).contiguous()
    asked = [(1.0, 0, 1.0, 0.0, seed, drawn) for seed in (1, 2) for drawn in (0, 1, 2)]
    whole = torch.full((6,), -1, device=DEVICE)
    sample(logits, draws_of(asked), whole)
    assert len(set(whole.tolist())) > 2
    few = torch.full((2,), -1, device=DEVICE)
    sample(logits[:2], draws_of([asked[4], asked[1]]), few)
    assert few.tolist() == [int(whole[4]), int(whole[1])]


def test_draws_come_as_often_as_their_probability() -> None:
    rows = 90 if DEVICE.type == "cpu" else 20000
    logits = torch.tensor([0.0, 1.0, 1.5], device=DEVICE).expand(rows, 3).contiguous()
    tokens = torch.full((rows,), -1, device=DEVICE)
    sample(logits, draws_of([(1.0, 0, 1.0, 0.0, seed, 0) for seed in range(rows)]), tokens)
    counts = torch.bincount(tokens.cpu(), minlength=3)
    expected = torch.softmax(logits[0].cpu(), dim=-1) * rows
    # Chi-square with 2 degrees of freedom: 18.4 is passed once in 10,000 sets of seeds.
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.4
