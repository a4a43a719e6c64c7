"""One step on the device: scheduled work in, chosen tokens out."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Works
from dataclasses import dataclass

import torch

from kvist.engine.loading import LoadGate
from kvist.engine.models.base import Chunk, Model
from kvist.engine.request import SamplingParams, TokenLogprobs
from kvist.engine.sampler import DrawState, Sampler
from kvist.engine.scheduler import Work
from kvist.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of a sequence.

    Attributes:
        sequence: whose.
        token: its id.
        logprobs: if the request asked for them.
    """

    sequence: Sequence
    token: int
    logprobs: TokenLogprobs | None


class Runner:
    """A model, its pool and the sampler.

    Args:
        model: see models.base.
        pool: (pages, layers, 2, kv_heads, block_tokens, head_dim), on the model's device.
        sampler: chooses tokens.
    """

    def __init__(self, model: Model, pool: torch.Tensor, sampler: Sampler) -> None:
        self._model = model
        self._pool = pool
        self._sampler = sampler

    @property
    def vocab(self) -> int:
        """Tokens in the vocabulary."""
        return self._model.config.vocab

    def begin(self, params: SamplingParams) -> DrawState:
        """The random stream of a new request; without a seed of its own, by order of arrival."""
        return self._sampler.begin(params)

    @torch.inference_mode()
    def run(self, works: Works[Work]) -> list[Sampled]:
        """Compute a step.

        A work whose sequence has a gate waits for its blocks layer by layer. The gate has ended on
        return, and nothing was sampled from a load that failed.

        Args:
            works: at least one, each with its pages.

        Returns:
            A token for each work that reaches its sequence's end, in their order.
        """
        chunks = [
            Chunk(
                work.sequence.tokens[work.start : work.start + work.count],
                work.start,
                work.sequence.pages,
                work.last,
            )
            for work in works
        ]
        gates = [work.sequence.gate for work in works if work.sequence.gate is not None]
        logits = self._model.forward(chunks, self._pool, _waiter(gates))
        ending = [work.sequence for work in works if work.last]
        sound = [gate.finish() for gate in gates]  # also of those that do not end here
        if not all(sound):
            stands = [one.gate is None or one.gate.sound for one in ending]
            logits = logits[torch.tensor(stands, dtype=torch.bool)]
            ending = [one for one, good in zip(ending, stands, strict=True) if good]
        states: list[DrawState] = []
        for sequence in ending:
            assert sequence.draws is not None, "a sequence was not begun"
            states.append(sequence.draws)
        choices = self._sampler.sample(logits, states)
        return [
            Sampled(sequence, token, logprobs)
            for sequence, token, logprobs in zip(
                ending, choices.tokens, choices.logprobs, strict=True
            )
        ]


def _waiter(gates: list[LoadGate]) -> Callable[[int], None] | None:
    """What the model calls before a layer reads the pages."""
    if not gates:
        return None

    def wait(layer: int) -> None:
        for gate in gates:
            gate.wait(layer)

    return wait
