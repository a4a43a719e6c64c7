"""The next token of every row on the device, without a softmax and without a sort.

    w[t]   = exp((x[t] - max x) / temperature)
    top-k  = tokens whose x is at least the k-th largest
    top-p  = of these, tokens whose likelier ones together have less than p of the mass
    min-p  = of these, tokens with w[t] >= min_p
    token  = argmax over these of log w[t] + g[t],    g[t] = -log(-log(u[t]))    (Gumbel-max)

which draws t with probability w[t] / sum of w (order of the filters: engine/sampler). Tokens that
are equal at a threshold are all kept, as in transformers. A temperature of 0 is argmax x. u is
Philox of (seed of the row, draws so far, t): a draw depends on its own row and on nothing else.

Bound: memory; two passes over a row, and eight more for each of top-k and top-p where it is asked
for, which a row of 128k float32 serves from the L2 cache. A threshold is found as a number of 32
bits, 4 bits a pass: 16 candidates are compared with each element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import OPTIONS

BLOCK = 1024  # logits of a step
COLDEST = tl.constexpr(1e-30)  # smallest temperature that is divided by; 0 is greedy
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Draws:
    """How each row draws; all on the device, all (rows,).

    Attributes:
        temperature: float32, >= 0; 0 is greedy.
        top_k: int32; 0 keeps all.
        top_p: float32, in (0, 1]; 1 keeps all.
        min_p: float32, in [0, 1]; 0 keeps all.
        seeds: int64.
        drawn: int64, >= 0: draws of the row's stream so far; sample does not change it.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    drawn: torch.Tensor


def new_draws(rows: int, device: torch.device) -> Draws:
    """Greedy rows."""

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return Draws(
        temperature=full(0, torch.float32),
        top_k=full(0, torch.int32),
        top_p=full(1, torch.float32),
        min_p=full(0, torch.float32),
        seeds=full(0, torch.int64),
        drawn=full(0, torch.int64),
    )


def probabilities_reference(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """What one row is drawn from, in float64: (vocab,)."""
    x = logits.double()
    if temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(), len(x)).double()
    weights = torch.exp((x - x.max()) / temperature)
    ordered, order = x.sort(descending=True)
    if 0 < top_k < len(x):
        weights = torch.where(x >= ordered[top_k - 1], weights, 0.0)
    # Of each token, how many are likelier; then what those weigh together.
    before = torch.searchsorted(-ordered, -x)
    likelier = torch.cat([x.new_zeros(1), weights[order].cumsum(0)])[before]
    kept = (likelier < top_p * weights.sum()) & (weights >= min_p)
    weights = torch.where(kept, weights, 0.0)
    return weights / weights.sum()


def sample(logits: torch.Tensor, draws: Draws, out: torch.Tensor) -> None:
    """Choose a token for every row.

    Args:
        logits: (rows, vocab), float32 or bfloat16, rows contiguous; no NaN, and a row has at least
            one that is not minus infinity.
        draws: of these rows.
        out: (rows,), int64; overwritten with token ids.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1, "a row of logits is not contiguous"
    assert out.dtype == torch.int64, "tokens are int64"
    assert out.shape == draws.temperature.shape == (rows,), "a draw and a token for each row"
    _sample_kernel[(rows,)](
        logits,
        logits.stride(0),
        vocab,
        draws.temperature,
        draws.top_k,
        draws.top_p,
        draws.min_p,
        draws.seeds,
        draws.drawn,
        out,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
        num_warps=8,
        **OPTIONS,
    )


@triton.jit
@no_type_check
def _load(row, at, vocab, BLOCK: tl.constexpr):
    # A block of logits, where they are, and a number for each that orders as they do.
    token = at + tl.arange(0, BLOCK)
    x = tl.load(row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return x, token, order


@triton.jit
@no_type_check
def _threshold(  # noqa: PLR0913
    row, vocab, peak, rate, floor, target, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    # The largest number for which the elements at or above it, of those at or above floor, have
    # at least the target: as many of them, or as much mass. It is found from its highest digit on.
    found = floor * 0
    for digit in range(8):
        shift = tl.cast(28 - 4 * digit, tl.uint32)
        candidates = found + (tl.arange(0, 16).to(tl.uint32) << shift)
        have = tl.zeros([16], tl.float32)
        for at in range(0, vocab, BLOCK):
            x, token, order = _load(row, at, vocab, BLOCK)
            weight = tl.exp2((x - peak) * rate) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            weight = tl.where((token < vocab) & (order >= floor), weight, 0.0)
            reached = order[:, None] >= candidates[None, :]
            have += tl.sum(tl.where(reached, weight[:, None], 0.0), 0)
        # have falls from candidate to candidate, so those that reach the target are the first ones.
        reaching = tl.sum((have >= target).to(tl.int32), 0)
        found += (tl.maximum(reaching, 1) - 1).to(tl.uint32) << shift
    return found


@triton.jit
@no_type_check
def _noise(seed, drawn, token):
    # -log(-log(1 - u)) with u in steps of 2^-31. 1 - u is rounded to 2^-24 where u is small, and
    # there the largest noise comes from: the series keeps it exact.
    counter = token.to(tl.uint32)
    high = (drawn >> 32).to(tl.uint32) + tl.zeros_like(counter)
    low = drawn.to(tl.uint32) + tl.zeros_like(counter)
    bits, _, _, _ = tl.philox(seed, counter, low, high, tl.zeros_like(counter))
    u = tl.uint_to_uniform_float(bits)
    small = u * (1.0 + u * (0.5 + u * 0.3333333333))
    wait = tl.where(u < 0.005, small, -tl.log(tl.maximum(1.0 - u, 1e-30)))
    return -tl.log(tl.maximum(wait, 1e-30))


@triton.jit
@no_type_check
def _choose(  # noqa: PLR0913
    row, vocab, peak, rate, floor, min_p, seed, drawn, noisy, BLOCK: tl.constexpr
):
    # The token whose logit is highest, of all; or, noisy, of those kept, with noise.
    best = tl.full([], float("-inf"), tl.float32)
    chosen = tl.zeros([], tl.int32)
    for at in range(0, vocab, BLOCK):
        x, token, order = _load(row, at, vocab, BLOCK)
        score = x
        if noisy:
            log_weight = (x - peak) * rate
            kept = (order >= floor) & (tl.exp2(log_weight) >= min_p) & (token < vocab)
            drawn_score = log_weight / LOG2_E + _noise(seed, drawn, token)
            score = tl.where(kept, drawn_score, float("-inf"))
        high = tl.max(score, 0)
        # The lowest id of several equal ones, as argmax has it.
        first = tl.min(tl.where((score == high) & (token < vocab), token, vocab), 0)
        chosen = tl.where(high > best, first, chosen)
        best = tl.maximum(best, high)
    return chosen


@triton.jit
@no_type_check
def _sample_kernel(  # noqa: PLR0913
    logits,
    row_stride,
    vocab,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    counts,
    out,
    BLOCK: tl.constexpr,
):
    # One program, one row.
    me = tl.program_id(0)
    row = logits + me.to(tl.int64) * row_stride
    temperature = tl.load(temperatures + me)
    top_k, top_p, min_p = tl.load(top_ks + me), tl.load(top_ps + me), tl.load(min_ps + me)
    seed, drawn = tl.load(seeds + me), tl.load(counts + me)
    rate = LOG2_E / tl.maximum(temperature, COLDEST)

    peak = tl.full([], float("-inf"), tl.float32)
    for at in range(0, vocab, BLOCK):
        x, _, _ = _load(row, at, vocab, BLOCK)
        peak = tl.maximum(peak, tl.max(x, 0))

    floor = tl.full([], 0, tl.uint32)
    if (top_k > 0) & (top_k < vocab) & (temperature > 0):
        floor = _threshold(row, vocab, peak, rate, floor, top_k.to(tl.float32), False, BLOCK)
    if (top_p < 1) & (temperature > 0):
        mass = tl.zeros([], tl.float32)
        for at in range(0, vocab, BLOCK):
            x, token, order = _load(row, at, vocab, BLOCK)
            weight = tl.exp2((x - peak) * rate)
            mass += tl.sum(tl.where((token < vocab) & (order >= floor), weight, 0.0), 0)
        least = _threshold(row, vocab, peak, rate, floor, top_p * mass, True, BLOCK)
        floor = tl.maximum(floor, least)

    chosen = _choose(row, vocab, peak, rate, floor, min_p, seed, drawn, temperature > 0, BLOCK)
    tl.store(out + me, chosen.to(tl.int64))
