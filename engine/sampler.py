"""The next token from a row of logits: greedy or drawn, and its log-probabilities.

A draw depends on the row, the request's parameters and the request's own random stream, and on
nothing else in the batch. The n-th draw of a stream is a hash of (seed, n), so a stream is one
counter, and a request that is computed again draws what it drew before.

Order of the filters, as in transformers' generate: temperature, top-k, top-p, min-p, each on what
the one before it kept. (vLLM applies min-p first, so its top-p counts only what min-p kept.)
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kvist.engine.request import SamplingParams, TokenLogprobs

# A cumulative sum over a vocabulary waits for each addition before the next: 51 us for 49,152
# tokens. Sums of blocks do not: 19 us, and then one block is gone through.
CDF_BLOCK = 256
# How far below the largest scaled logit the tokens are looked for that top-k and top-p keep: to
# sort those that are near takes a tenth of finding the likeliest of all (375 us).
DEPTHS = (2.0, 4.0, 6.0, 8.0, 11.0, 15.0, 20.0, 30.0, math.inf)

Row = npt.NDArray[np.float32]


@dataclass(slots=True)
class DrawState:
    """How one request draws its tokens; kept with the request.

    Attributes:
        params: what was asked.
        seed: of its stream.
        drawn: draws so far.
    """

    params: SamplingParams
    seed: int
    drawn: int = 0

    def uniform(self) -> float:
        """The stream's next number, in [0, 1): 53 bits of xxh3 over seed and counter."""
        key = struct.pack("<QQ", self.seed & (2**64 - 1), self.drawn)
        self.drawn += 1
        return (xxhash.xxh3_64_intdigest(key) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Choices:
    """The next tokens of a step.

    Attributes:
        tokens: one id per row.
        logprobs: one per row, None where the request did not ask.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Chooses next tokens.

    Args:
        seed: of the engine: requests without a seed of their own get theirs from it, in the order
            of their arrival.
    """

    def __init__(self, seed: int) -> None:
        self._seeds = random.Random(seed)
        self._scratch = new_scratch(0)

    def begin(self, params: SamplingParams) -> DrawState:
        """The state of a new request."""
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        return DrawState(params, seed)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, states: Sequence[DrawState]) -> Choices:
        """Choose the next token of every row.

        Args:
            logits: (rows, vocab), float32, on the CPU, as the model gave them; not changed.
            states: one per row; a row that is not greedy takes one draw from its own.
        """
        drawing = [row for row, state in enumerate(states) if state.params.temperature > 0]
        if len(self._scratch) < logits.shape[1]:
            self._scratch = new_scratch(logits.shape[1])
        tokens = likeliest(logits) if len(drawing) < len(states) else [0] * len(states)
        for row in drawing:
            state = states[row]
            tokens[row] = draw(logits[row], state.params, state.uniform(), self._scratch)
        logprobs = [
            None
            if state.params.logprobs is None
            else log_probabilities(logits[row], tokens[row], state.params.logprobs)
            for row, state in enumerate(states)
        ]
        return Choices(tokens, logprobs)


def likeliest(logits: torch.Tensor) -> list[int]:
    """The first of the largest logits of each row.

    By numpy: 16 rows of 49,152 take it 50 us, torch's argmax 810.
    """
    tokens: list[int] = logits.numpy().argmax(axis=1).tolist() if len(logits) else []
    return tokens


def draw(
    logits: torch.Tensor, params: SamplingParams, uniform: float, scratch: Row | None = None
) -> int:
    """Draw a token by inverting the cumulative distribution that the filters leave.

    Row by row and not for all at once: a row stays in the processor's second cache, where it is
    gone through three times; sixteen do not, and took ten times as long.

    Args:
        logits: (vocab,), float32, on the CPU.
        params: temperature > 0.
        uniform: in [0, 1).
        scratch: room for the row, rounded up to whole blocks of CDF_BLOCK; None makes it.
    """
    row: Row = logits.numpy()
    vocab = len(row)
    if scratch is None:
        scratch = new_scratch(vocab)
    scaled = scratch[:vocab]
    # A temperature near 0 would overflow; after the shift the largest is 0 whatever it is.
    np.subtract(row, row.max(), out=scaled)
    with np.errstate(over="ignore"):
        np.divide(scaled, np.float32(params.temperature), out=scaled)
    if not 0 < params.top_k < vocab and params.top_p >= 1:
        np.exp(scaled, out=scaled)
        if params.min_p <= 0:
            return _invert_blocks(scratch, vocab, uniform)
        ids = np.flatnonzero(scaled >= params.min_p)
        return int(ids[_invert(scaled[ids], uniform)])
    ids, weights = _likely(scaled, params)
    weights = weights[weights >= params.min_p * weights[0]]
    return int(ids[_invert(weights, uniform)])


def new_scratch(vocab: int) -> Row:
    """Room for draws from rows of so many logits."""
    return np.zeros(-(-vocab // CDF_BLOCK) * CDF_BLOCK, np.float32)


def _likely(scaled: Row, params: SamplingParams) -> tuple[npt.NDArray[np.intp], Row]:
    """What top-k and top-p keep, likeliest first, the lower id of equal ones; and their weights."""
    kept = params.top_k if 0 < params.top_k < len(scaled) else len(scaled)
    mass = 0.0
    if kept == len(scaled):
        mass = params.top_p * float(np.exp(scaled).sum(dtype=np.float64))
    for depth in DEPTHS:
        ids = np.flatnonzero(scaled >= -depth)
        weights: Row = np.exp(scaled[ids])
        enough = weights.sum(dtype=np.float64) >= mass if mass else len(ids) >= kept
        if enough or len(ids) == len(scaled):
            break
    order = np.argsort(-weights, kind="stable")[:kept]
    ids, weights = ids[order], weights[order]
    if params.top_p < 1:
        # A token stays while the ones before it have not reached top_p: at least one always does.
        sums = weights.cumsum(dtype=np.float64)
        stays = int(np.count_nonzero(sums - weights < (mass or params.top_p * sums[-1])))
        ids, weights = ids[:stays], weights[:stays]
    return ids, weights


def _invert(weights: Row, uniform: float) -> int:
    """The place at which the cumulative distribution passes uniform."""
    sums = weights.cumsum(dtype=np.float64)
    return _place(weights, int(np.searchsorted(sums, uniform * sums[-1], side="right")))


def _invert_blocks(weights: Row, count: int, uniform: float) -> int:
    """The same for many: first the block, then the place in it. What is not in the first count
    weights is 0."""
    blocks = weights.reshape(-1, CDF_BLOCK)
    if count < len(weights):
        weights[count:] = 0
    sums = blocks.sum(axis=1, dtype=np.float64).cumsum()
    target = uniform * sums[-1]
    block = _place(sums, int(np.searchsorted(sums, target, side="right")))
    rest = target - (sums[block - 1] if block else 0.0)
    inner = blocks[block].cumsum(dtype=np.float64)
    place = _place(blocks[block], int(np.searchsorted(inner, rest, side="right")))
    return block * CDF_BLOCK + place


def _place(weights: npt.NDArray[np.floating[Any]], place: int) -> int:
    """A place, unless rounding has led past the last one with a weight: then that is meant."""
    return place if place < len(weights) else int(np.flatnonzero(weights)[-1])


def log_probabilities(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of one token and of the likeliest, before temperature and filters.

    Args:
        logits: (vocab,), float32.
        token: the chosen one.
        count: likeliest ones to report.
    """
    logs = torch.log_softmax(logits, dim=-1)
    values, ids = logs.topk(min(count, logs.shape[0]))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logs[token]), top)
