"""One step on the device: scheduled work in, chosen tokens out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Works
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch

from kvist.engine.loading import LoadGate, waiter
from kvist.engine.models.base import Chunk, Model
from kvist.engine.request import SamplingParams, TokenLogprobs
from kvist.engine.sampler import DrawState, Sampler
from kvist.engine.sequence import Sequence
from kvist.engine.step import Work


class Sampled(NamedTuple):
    """The next token of a sequence.

    Attributes:
        work: that it came out of.
        token: its id.
        logprobs: if the request asked for them.
    """

    work: Work
    token: int
    logprobs: TokenLogprobs | None


class Landing(Protocol):
    """A step that was launched."""

    def result(self) -> list[Sampled]:
        """Wait for it; see Runner.launch. Raises: what the step raised."""
        ...


class StepRunner(Protocol):
    """Runner, or engine.device.runner.DeviceRunner."""

    @property
    def model(self) -> Model:
        """What computes."""
        ...

    @property
    def vocab(self) -> int:
        """Tokens in the vocabulary."""
        ...

    def begin(self, params: SamplingParams) -> DrawState:
        """See Runner.begin."""
        ...

    def run_aside(self) -> None:
        """See Runner.run_aside."""
        ...

    def launch(self, works: Works[Work]) -> Landing:
        """See Runner.launch."""
        ...

    def close(self) -> None:
        """See Runner.close."""
        ...


class _Input(NamedTuple):
    """A work as it was when the step was launched; the sequence may change while it runs.

    Attributes:
        tokens: those that were known: the last may be one that the step before it gives.
        gate: see Sequence.
        state: how its token is drawn; None when it gives none.
    """

    work: Work
    tokens: list[int]
    pages: list[int]
    gate: LoadGate | None
    state: DrawState | None


class Runner:
    """A model, its pool and the sampler.

    Steps are launched by one thread and computed in that order. Where a token is needed that the
    step before gives, it does not pass through the thread that launches.

    Args:
        model: see models.base.
        pool: (pages, layers, 2, kv_heads, block_tokens, head_dim), on the model's device.
        sampler: chooses tokens.
    """

    def __init__(self, model: Model, pool: torch.Tensor, sampler: Sampler) -> None:
        self._model = model
        self._pool = pool
        self._sampler = sampler
        self._latest: dict[Sequence, int] = {}
        self._aside: ThreadPoolExecutor | None = None

    @property
    def model(self) -> Model:
        """What computes."""
        return self._model

    @property
    def vocab(self) -> int:
        """Tokens in the vocabulary."""
        return self._model.config.vocab

    def begin(self, params: SamplingParams) -> DrawState:
        """The random stream of a new request; without a seed of its own, by order of arrival."""
        return self._sampler.begin(params)

    def run_aside(self) -> None:
        """From now on compute on a thread of its own, so that launch returns at once."""
        self._aside = ThreadPoolExecutor(1, "kvist-step")

    def close(self) -> None:
        """Wait for what is under way."""
        if self._aside is not None:
            self._aside.shutdown()

    def launch(self, works: Works[Work]) -> Future[list[Sampled]]:
        """Begin to compute a step.

        A work whose sequence has a gate waits for its blocks layer by layer. When the step is done
        the gate has ended, and nothing was sampled from a load that failed.

        Args:
            works: at least one, each with its pages.

        Returns:
            A token for each work that reaches its sequence's end, in their order; or what the
            step raised.
        """
        inputs = [_input(work) for work in works]
        if self._aside is not None:
            return self._aside.submit(self._run, inputs)
        done: Future[list[Sampled]] = Future()
        try:
            done.set_result(self._run(inputs))
        except Exception as error:
            done.set_exception(error)
        return done

    @torch.inference_mode()
    def _run(self, inputs: list[_Input]) -> list[Sampled]:
        latest, self._latest = self._latest, {}
        gates = [one.gate for one in inputs if one.gate is not None]
        chunks = [_chunk(one, latest) for one in inputs]
        logits = self._model.forward(chunks, self._pool, waiter(gates))
        ending = [one for one in inputs if one.state is not None]
        sound = [gate.finish() for gate in gates]  # also of those that do not end here
        if not all(sound):
            stands = [one.gate is None or one.gate.sound for one in ending]
            logits = logits[torch.tensor(stands, dtype=torch.bool)]
            ending = [one for one, good in zip(ending, stands, strict=True) if good]
        choices = self._sampler.sample(logits, [one.state for one in ending if one.state])
        self._latest = {
            one.work.sequence: token for one, token in zip(ending, choices.tokens, strict=True)
        }
        return [
            Sampled(one.work, token, logprobs)
            for one, token, logprobs in zip(ending, choices.tokens, choices.logprobs, strict=True)
        ]


def draw_state(work: Work, ahead: int = 0) -> DrawState:
    """How the token that comes out of a work is drawn, or one so many after it."""
    sequence = work.sequence
    assert sequence.draws is not None, "a sequence was not begun"
    if not sequence.draws.params.temperature:
        return sequence.draws
    # A stream's n-th draw is its n-th token's, however often that is computed.
    drawn = work.start + work.count + ahead - sequence.prompt_tokens
    return dataclasses.replace(sequence.draws, drawn=drawn)


def _input(work: Work) -> _Input:
    sequence, end = work.sequence, work.start + work.count
    state = draw_state(work) if work.last else None
    pages = sequence.pages[: -(-end // sequence.limits.block_tokens)]
    return _Input(work, sequence.tokens[work.start : end], pages, sequence.gate, state)


def _chunk(one: _Input, latest: dict[Sequence, int]) -> Chunk:
    """What the model gets; a token that the step before has not given belongs to a void work."""
    work, tokens = one.work, one.tokens
    if len(tokens) < work.count:
        tokens = [*tokens, latest.get(work.sequence, 0)]
    return Chunk(tokens, work.start, one.pages, work.last)
