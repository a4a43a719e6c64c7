"""One step on a device: launched without waiting, its tokens fetched when they are asked for.

Steps that only decode run as a persistent batch (models.decode_batch), whose rows the requests keep
from step to step; prompts, and decodes beside them, as chunks. Either way the token that a request
computes next stays on the device, so the next step is launched before the host has seen it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Works
from typing import NamedTuple

import torch

from kvist.engine.device.rows import Rows
from kvist.engine.loading import LoadGate, waiter
from kvist.engine.models.base import Chunk
from kvist.engine.models.decode_batch import DecodeBatch, draws_of, put
from kvist.engine.models.llama_cuda import CudaLlama, Given
from kvist.engine.request import SamplingParams, TokenLogprobs
from kvist.engine.runner import Landing, Sampled, draw_state
from kvist.engine.sampler import DrawState, Sampler
from kvist.engine.step import Work
from kvist.kernels.device.sampling import sample

Take = Callable[[], torch.Tensor]
Fetch = Callable[[torch.Tensor], Take]
"""Begins to copy a tensor to the host, behind what was launched before; what it returns waits."""


class Drawn(NamedTuple):
    """What a step drew, on the device.

    Attributes:
        works: that a token came out of.
        states: how each was drawn.
        places: of each work in tokens and logits.
        tokens: (rows,), int64.
        logits: (rows, vocab); of those rows.
    """

    works: list[Work]
    states: list[DrawState]
    places: list[int]
    tokens: torch.Tensor
    logits: torch.Tensor


class DeviceRunner:
    """What runner.Runner is on a processor. Used by the core's thread only.

    Draws are the device's: a seed gives other tokens than on a processor, but the same ones in any
    batch and however often they are computed.

    Args:
        model: on the device.
        pool: (pages, layers, 2, kv_heads, block_tokens, head_dim), there too.
        batch: its rows are as many as a step has works at most.
        sampler: gives seeds.
        fetch: see there.
    """

    def __init__(
        self,
        model: CudaLlama,
        pool: torch.Tensor,
        batch: DecodeBatch,
        sampler: Sampler,
        fetch: Fetch,
    ) -> None:
        self._model = model
        self._pool = pool
        self._block_tokens = int(pool.shape[4])
        self._batch = batch
        self._rows = Rows(batch.rows)
        self._sampler = sampler
        self._fetch = fetch

    @property
    def model(self) -> CudaLlama:
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
        """Nothing to do: the device computes aside by itself."""

    def close(self) -> None:
        """Nothing to do: what is under way writes to memory that outlives it."""

    def launch(self, works: Works[Work]) -> Landing:
        """Begin to compute a step; see Runner.launch."""
        try:
            return self._launch(works)
        except Exception as error:
            # What the rows hold is unknown now; all are seated anew from what the host knows.
            for number in self._rows.keep(()):
                self._batch.clear(number)
            return Failed(error)

    @torch.inference_mode()
    def _launch(self, works: Works[Work]) -> Landing:
        gates = [work.sequence.gate for work in works]
        decodes = all(work.last and work.count == 1 for work in works) and not any(gates)
        if decodes and self._batch.has_room(sum(work.start + 1 for work in works)):
            drawn = self._decode(works)
        else:
            drawn = self._compute(works, [gate for gate in gates if gate is not None])
        # Of any step, for it is also what tells that the step is over.
        take = self._fetch(drawn.tokens)
        return DeviceLanding(drawn, gates, take, self._logprobs(drawn))

    # Decode steps.

    def _decode(self, works: Works[Work]) -> Drawn:
        batch, rows = self._batch, self._rows
        for number in rows.keep([work.sequence for work in works]):
            batch.clear(number)
        new: list[Work] = []
        for work in works:
            row = rows.get(work.sequence)
            if row is None or not row.continues(work):
                new.append(work)
                continue
            pages = self._pages(work)
            first = row.new_pages(pages, work.sequence.registered)
            if first is not None:
                batch.set_pages(row.number, first, pages[first:])
        if new:
            # A token that nobody knows belongs to a work that is void.
            tokens = [(work.sequence.tokens[work.start : work.start + 1] or [0])[0] for work in new]
            self._seat(new, put(tokens, torch.int64, self._pool.device), 0)
        if batch.size_of(rows.end) > batch.size_of(len(rows)):
            for source, target in rows.close_gaps(batch.size_of(len(rows))):
                batch.move(source, target)
        batch.run(rows.end)
        places = []
        for work in works:
            row = rows.get(work.sequence)
            assert row is not None, "a work has no row"
            row.length += 1
            places.append(row.number)
        states = [draw_state(work) for work in works]
        return Drawn(list(works), states, places, batch.tokens[: rows.end], batch.logits)

    def _seat(self, works: Works[Work], tokens: torch.Tensor, ahead: int) -> None:
        """Give works rows, on which their next step is computed: their own, or the one ahead."""
        ends = [work.start + work.count + ahead for work in works]
        pages = [self._pages(work) for work in works]
        seated = [
            self._rows.seat(work, end, own)
            for work, end, own in zip(works, ends, pages, strict=True)
        ]
        states = [draw_state(work, ahead) for work in works]
        numbers = [row.number for row in seated]
        self._batch.seat(numbers, tokens, ends, pages, states)

    def _pages(self, work: Work) -> list[int]:
        return work.sequence.pages[: -(-(work.start + work.count) // self._block_tokens)]

    # Steps with prompts in them.

    def _compute(self, works: Works[Work], gates: list[LoadGate]) -> Drawn:
        chunks = [self._chunk(work) for work in works]
        logits = self._model.forward(chunks, self._pool, waiter(gates), self._given(works))
        ending = [work for work in works if work.last]
        states = [draw_state(work) for work in ending]
        tokens = torch.zeros(len(ending), dtype=torch.int64, device=self._pool.device)
        for number in self._rows.keep([work.sequence for work in ending]):
            self._batch.clear(number)
        if not ending:
            return Drawn([], [], [], self._batch.tokens[:1], logits)
        sample(logits, draws_of(states, self._pool.device), tokens)
        self._seat(ending, tokens, 1)
        return Drawn(ending, states, list(range(len(ending))), tokens, logits)

    def _chunk(self, work: Work) -> Chunk:
        tokens = work.sequence.tokens[work.start : work.start + work.count]
        if len(tokens) < work.count:
            tokens = [*tokens, 0]
        return Chunk(tokens, work.start, self._pages(work), work.last)

    def _given(self, works: Works[Work]) -> Given:
        """The tokens that only the device knows."""
        chunks, numbers = [], []
        for chunk, work in enumerate(works):
            row = self._rows.get(work.sequence)
            unknown = len(work.sequence.tokens) < work.start + work.count
            if unknown and row is not None and row.continues(work):
                chunks.append(chunk)
                numbers.append(row.number)
        return Given(chunks, self._batch.tokens[put(numbers, torch.int64, self._pool.device)])

    # What the host gets.

    def _logprobs(self, drawn: Drawn) -> LogProbs | None:
        asked = [i for i, state in enumerate(drawn.states) if state.params.logprobs is not None]
        if not asked:
            return None
        counts = [min(drawn.states[i].params.logprobs or 0, self.vocab) for i in asked]
        places = put([drawn.places[i] for i in asked], torch.int64, self._pool.device)
        logs = torch.log_softmax(drawn.logits[places].float(), dim=-1)
        values, ids = logs.topk(max(1, *counts))
        chosen = logs.gather(1, drawn.tokens[places][:, None])
        # One copy: a double holds any id.
        table = torch.cat([part.double() for part in (chosen, values, ids)], dim=1)
        return LogProbs(asked, counts, self._fetch(table))


@dataclasses.dataclass(frozen=True, slots=True)
class LogProbs:
    """Log-probabilities on their way: of these works, so many likeliest ones of each.

    Attributes:
        take: (works, 1 + 2 * most), float64: of the chosen token, of the likeliest, their ids.
    """

    works: list[int]
    counts: list[int]
    take: Take

    def by_work(self) -> dict[int, TokenLogprobs]:
        """Wait for them."""
        found = {}
        for work, count, row in zip(self.works, self.counts, self.take().tolist(), strict=True):
            most = (len(row) - 1) // 2
            ids = [int(number) for number in row[1 + most : 1 + most + count]]
            top = list(zip(ids, row[1 : 1 + count], strict=True))
            found[work] = TokenLogprobs(row[0], top)
        return found


class Failed:
    """A step that could not be launched."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> list[Sampled]:
        """Raises: what the launch raised."""
        raise self._error


class DeviceLanding:
    """A step that was launched, and what will come of it."""

    def __init__(
        self,
        drawn: Drawn,
        gates: Works[LoadGate | None],
        take: Take,
        logprobs: LogProbs | None,
    ) -> None:
        self._works = drawn.works
        self._places = drawn.places
        self._take = take
        self._logprobs = logprobs
        self._gates = [gate for gate in gates if gate is not None]
        # Now: a gate is taken away when its load has ended, which may be before the step has.
        self._behind = [work.sequence.gate for work in drawn.works]

    def result(self) -> list[Sampled]:
        """Wait for the step, and for loads that it did not wait for; see Runner.launch."""
        tokens = self._take().tolist()
        logprobs = {} if self._logprobs is None else self._logprobs.by_work()
        for gate in self._gates:
            gate.finish()
        return [
            Sampled(work, int(tokens[place]), logprobs.get(number))
            for number, (work, place, gate) in enumerate(
                zip(self._works, self._places, self._behind, strict=True)
            )
            if gate is None or gate.sound
        ]
