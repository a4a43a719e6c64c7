"""The next token from a row of logits: greedy or drawn, and its log-probabilities.

A draw depends on the row, the request's parameters and the request's own random stream, and on
nothing else in the batch. The n-th draw of a stream is a hash of (seed, n), so a stream is one
counter, and a request that is computed again draws what it drew before.

Order of the filters, as in transformers' generate: temperature, top-k, top-p, min-p, each on what
the one before it kept. (vLLM applies min-p first, so its top-p counts only what min-p kept.)
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from kvist.engine.request import SamplingParams, TokenLogprobs

# Tokens looked at first when top-p is set: sorting 1024 of a vocabulary of 49,152 takes a tenth of
# sorting all, and their probabilities nearly always reach top-p.
TOP_P_CANDIDATES = 1024


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

    def begin(self, params: SamplingParams) -> DrawState:
        """The state of a new request."""
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        return DrawState(params, seed)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, states: Sequence[DrawState]) -> Choices:
        """Choose the next token of every row.

        Args:
            logits: (rows, vocab), float32, as the model gave them; not changed.
            states: one per row; a row that is not greedy takes one draw from its own.
        """
        tokens = likeliest(logits)
        for row, state in enumerate(states):
            if state.params.temperature > 0:
                tokens[row] = draw(logits[row], state.params, state.uniform())
        logprobs = [
            None
            if state.params.logprobs is None
            else log_probabilities(logits[row], tokens[row], state.params.logprobs)
            for row, state in enumerate(states)
        ]
        return Choices(tokens, logprobs)


def likeliest(logits: torch.Tensor) -> list[int]:
    """The first of the largest logits of each row.

    On a processor by numpy: 16 rows of 49,152 take it 50 us, torch's argmax 810.
    """
    if logits.device.type == "cpu" and len(logits):
        tokens: list[int] = logits.numpy().argmax(axis=1).tolist()
        return tokens
    return [int(token) for token in logits.argmax(dim=-1).tolist()] if len(logits) else []


def draw(logits: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """Draw a token by inverting the cumulative distribution that the filters leave.

    Args:
        logits: (vocab,), float32.
        params: temperature > 0.
        uniform: in [0, 1).
    """
    # A temperature near 0 would overflow; after the shift the largest is 0 whatever it is.
    scaled = (logits - logits.max()) / params.temperature
    weights, ids = _candidates(scaled, params)
    if params.top_p < 1:
        # A token stays while the ones before it have not reached top_p: at least one always does.
        weights = torch.where(weights.cumsum(-1) - weights < params.top_p, weights, 0.0)
    if params.min_p > 0:
        weights = torch.where(weights >= params.min_p * weights.max(), weights, 0.0)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    if place == len(weights):
        # The product can round up to the last sum itself; the last token with a weight is meant.
        place = int(weights.nonzero()[-1])
    return place if ids is None else int(ids[place])


def _candidates(
    scaled: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities after top-k, as far as top-p needs to look at them.

    Returns:
        Probabilities, likeliest first, and their token ids; ids are None when nothing had to be
        sorted: then all are there, in the order of the vocabulary.
    """
    vocab = scaled.shape[0]
    if 0 < params.top_k < vocab:
        values, ids = scaled.topk(params.top_k)
        return torch.softmax(values, dim=-1), ids
    weights = torch.softmax(scaled, dim=-1)
    if params.top_p >= 1:
        return weights, None
    if vocab > TOP_P_CANDIDATES:
        likely, ids = weights.topk(TOP_P_CANDIDATES)
        if float(likely.sum()) >= params.top_p:
            return likely, ids
    ordered, ids = weights.sort(descending=True)
    return ordered, ids


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
