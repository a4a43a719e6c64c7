"""Attention over pages computes its reference, reads no byte that is not a key, and gives a row the
same bits whatever is beside it. On a GPU: real sizes too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sim.device import DEVICE, DTYPES, ULP32, randn, random_pages, rounding, sizes

from kvist.kernels.device import decode_attention as decode_module
from kvist.kernels.device.decode_attention import (
    decode_attention,
    decode_reference,
    new_decode_plan,
)
from kvist.kernels.device.paged import Paged
from kvist.kernels.device.prefill_attention import (
    plan_prefill,
    prefill_attention,
    prefill_reference,
    tile_tokens,
)
from kvist.kernels.device.worklist import cut, cut_reference, new_work_list

# lengths of the sequences; heads, kv_heads, block_tokens, head_dim
SMALL = [
    ([5, 0, 97, 64], (4, 2, 16, 32)),
    ([1, 128], (9, 3, 64, 80)),
    ([33], (2, 2, 4, 64)),
    ([65, 127], (8, 1, 32, 16)),
]
REAL = [
    ([1, 300, 4096, 0, 16000, 255, 256, 257], (32, 8, 64, 128)),
    ([1000] * 64, (32, 8, 16, 128)),
    ([65536], (9, 3, 64, 64)),
]
LONG = ([4096, 1000], (32, 8, 64, 128))
Case = tuple[list[int], tuple[int, int, int, int]]


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 128 keys there would be one split of 256, and nothing to merge."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(decode_module, "SPLIT", 32)
        monkeypatch.setattr(decode_module, "MERGED", 2)


def pages_of(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Paged, int]:
    lengths, (heads, kv_heads, block_tokens, head_dim) = case
    return random_pages(lengths, (2, kv_heads, block_tokens, head_dim), dtype, seed), heads


def queries(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return (randn(rows, heads, head_dim, seed=1) * head_dim**-0.5).to(dtype)


def bound(
    q: torch.Tensor, paged: Paged, exact: torch.Tensor, magnitude: torch.Tensor
) -> torch.Tensor:
    """How far a result may be from the exact one.

    A score is a sum of head_dim products and errs by s = head_dim ulps of |q| |k|; its weight then
    by the factor 2^(s log2 e), and the sum of weights likewise, so the result by 2 s of sum w |v|.
    The sums over keys add an ulp for each, exp2 and the merges some more. Weights are rounded to
    the dtype of q before they are multiplied, the result is rounded to it.
    """
    head_dim, keys = q.shape[-1], int(paged.lengths.max())
    # Largest norms of random normal rows, with room: 3 times the root of head_dim each.
    score = (head_dim + 4) * ULP32 * 9 * head_dim**0.5
    relative = 2 * score + (keys + 16) * ULP32 + rounding(q.dtype)
    return magnitude * relative + exact.abs() * rounding(q.dtype) + 1e-30


def with_absolute_values(paged: Paged) -> Paged:
    pool = paged.pool.clone().float()
    pool[:, :, 1] = pool[:, :, 1].abs()
    return dataclasses.replace(paged, pool=pool)


def decode(q: torch.Tensor, paged: Paged, layer: int) -> torch.Tensor:
    plan = new_decode_plan(len(q), int(paged.lengths.sum()), q.shape[1], q.shape[2], DEVICE)
    plan.cut(paged.lengths)
    out = torch.full_like(q, float("nan"))
    decode_attention(q, paged, layer, plan, out)
    return out


def prefill(q: torch.Tensor, paged: Paged, layer: int, counts: list[int]) -> torch.Tensor:
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    begins, new = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (firsts, counts))
    plan = plan_prefill(begins, new, len(q), q.shape[1], paged.pool.shape[3])
    out = torch.full_like(q, float("nan"))
    prefill_attention(q, paged, layer, plan, out)
    return out


@pytest.mark.parametrize("lengths", [[0], [7], [0, 7, 8, 30, 1, 0], [1000]])
def test_a_work_list_names_every_part_of_every_sequence_once(lengths: list[int]) -> None:
    work = new_work_list(7, len(lengths), sum(lengths) // 7 + len(lengths), DEVICE)
    cut(torch.tensor(lengths, dtype=torch.int32, device=DEVICE), work)
    items = [tuple(item) for item in work.items[: int(work.count)].tolist()]
    assert items == cut_reference(lengths, 7)
    for sequence, first in enumerate(work.firsts.tolist()):
        assert lengths[sequence] == 0 or items[first] == (sequence, 0)


def test_a_work_list_that_is_too_short_is_full_and_not_overrun() -> None:
    work = new_work_list(4, 2, 8, DEVICE)
    room = dataclasses.replace(work, items=work.items[:3])
    cut(torch.tensor([8, 16], dtype=torch.int32, device=DEVICE), room)
    assert int(room.count) == 3
    assert work.items.tolist() == [[0, 0], [0, 1], [1, 0]] + [[0, 0]] * 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", sizes(SMALL, REAL), ids=str)
def test_decode_is_its_reference_over_odd_lengths_and_poisoned_pages(
    case: Case, dtype: torch.dtype
) -> None:
    paged, heads = pages_of(case, dtype)
    q = queries(len(case[0]), heads, case[1][3], dtype)
    out = decode(q, paged, layer=1)
    exact = decode_reference(q, paged, 1)
    magnitude = decode_reference(q, with_absolute_values(paged), 1)
    assert bool(((out.double() - exact).abs() <= bound(q, paged, exact, magnitude)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", sizes([SMALL[0]], REAL[:2]), ids=str)
def test_a_decoded_row_has_the_same_bits_alone_and_in_any_batch(
    case: Case, dtype: torch.dtype
) -> None:
    paged, heads = pages_of(case, dtype)
    q = queries(len(case[0]), heads, case[1][3], dtype)
    whole = decode(q, paged, layer=0)
    for rows in ([2], [3, 0], [3, 2, 1, 0]):
        tables, lengths = paged.tables[rows].contiguous(), paged.lengths[rows]
        part = dataclasses.replace(paged, tables=tables, lengths=lengths)
        assert torch.equal(decode(q[rows].contiguous(), part, layer=0), whole[rows])


def new_tokens(lengths: list[int]) -> list[int]:
    """How many are new: all of the first sequence, half of the second, none of the third."""
    kinds = [lambda n: n, lambda n: (n + 1) // 2, lambda _n: 0]
    return [kinds[i % 3](length) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", sizes(SMALL, [REAL[0], LONG]), ids=str)
def test_prefill_on_cached_prefixes_is_its_reference(case: Case, dtype: torch.dtype) -> None:
    paged, heads = pages_of(case, dtype)
    counts = [min(count, 1024) for count in new_tokens(case[0])]
    q = queries(sum(counts), heads, case[1][3], dtype)
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    out = prefill(q, paged, 1, counts)
    exact = prefill_reference(q, paged, 1, firsts, counts)
    magnitude = prefill_reference(q, with_absolute_values(paged), 1, firsts, counts)
    assert bool(((out.double() - exact).abs() <= bound(q, paged, exact, magnitude)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", sizes([([100], (4, 2, 16, 32))], [([3000], (32, 8, 64, 128))]))
def test_a_prefilled_row_has_the_same_bits_however_the_prompt_is_cut(
    case: Case, dtype: torch.dtype
) -> None:
    (length,), (heads, kv_heads, _, head_dim) = case
    paged, _ = pages_of(case, dtype)
    q = queries(length, heads, head_dim, dtype)
    whole = prefill(q, paged, 0, [length])
    tile = tile_tokens(heads, kv_heads)
    for first, last in ((0, 1), (1, tile + 2), (length - 1, length), (tile - 1, length - 3)):
        shorter = dataclasses.replace(paged, lengths=torch.full_like(paged.lengths, last))
        part = prefill(q[first:last].contiguous(), shorter, 0, [last - first])
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("case", sizes([SMALL[0], SMALL[3]], [REAL[0], LONG]), ids=str)
def test_float8_pages_are_read_as_their_values_times_the_scale(case: Case) -> None:
    paged, heads = pages_of(case, torch.float8_e4m3fn)
    paged = dataclasses.replace(paged, scale=0.5)
    # The same numbers in a dtype that the references read everywhere.
    wide = dataclasses.replace(paged, pool=paged.pool.float())
    absolute = with_absolute_values(wide)
    q = queries(len(case[0]), heads, case[1][3], torch.bfloat16)
    exact, magnitude = (decode_reference(q, one, 0) for one in (wide, absolute))
    error = (decode(q, paged, 0).double() - exact).abs()
    assert bool((error <= bound(q, paged, exact, magnitude)).all())
    counts = [min(count, 1024) for count in new_tokens(case[0])]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    q = queries(sum(counts), heads, case[1][3], torch.bfloat16)
    exact, magnitude = (prefill_reference(q, one, 1, firsts, counts) for one in (wide, absolute))
    error = (prefill(q, paged, 1, counts).double() - exact).abs()
    assert bool((error <= bound(q, paged, exact, magnitude)).all())
