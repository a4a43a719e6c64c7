"""Decode steps whose inputs stay on the device: one stable row for each request, and CUDA graphs.

A step reads tokens, lengths and page tables from buffers that never move, and writes the tokens it
drew and the longer lengths back, so the next step needs nothing from the host. The host changes a
row's buffers in place when a request comes, gets another page, or goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvist.engine.models.llama_cuda import CudaLlama
from kvist.engine.sampler import DrawState
from kvist.kernels.device.decode_attention import DecodePlan
from kvist.kernels.device.paged import Paged
from kvist.kernels.device.sampling import Draws, new_draws, sample

# Rows that graphs are captured for; a step takes the smallest that holds its rows. Steps of 16
# waste at most 15 rows, which at these sizes cost less than the weights that are read anyway.
GRAPH_ROWS = (1, 2, 4, 8, *range(16, 257, 16))
WARM_RUNS = 2  # before a capture: kernels are compiled and handles made


def graph_sizes(rows: int) -> tuple[int, ...]:
    """Rows of the graphs of a batch: the last one holds all of it, if GRAPH_ROWS goes so far."""
    smaller = [size for size in GRAPH_ROWS if size < rows]
    return (*smaller, rows) if rows <= GRAPH_ROWS[-1] else tuple(smaller)


def draws_of(states: Sequence[DrawState], device: torch.device) -> Draws:
    """How rows draw, put on the device."""

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return put(values, dtype, device)

    params = [state.params for state in states]
    return Draws(
        temperature=column([one.temperature for one in params], torch.float32),
        top_k=column([max(one.top_k, 0) for one in params], torch.int32),
        top_p=column([one.top_p for one in params], torch.float32),
        min_p=column([one.min_p for one in params], torch.float32),
        seeds=column([_signed(state.seed) for state in states], torch.int64),
        drawn=column([state.drawn for state in states], torch.int64),
    )


class DecodeBatch:
    """The rows, and a graph for each of some numbers of them.

    Args:
        model: computes.
        pool: pages, on the model's device.
        rows: requests at once, at most.
        width: pages of the longest request.
        keys: lengths of all rows together, at most; see kernels.device.decode_attention.

    Attributes:
        rows: as given.
        tokens: (rows,), int64: what each row computes next, which is what it drew last.
        logits: (rows, vocab): of the last step, until the next one.
    """

    def __init__(
        self, model: CudaLlama, pool: torch.Tensor, rows: int, width: int, keys: int
    ) -> None:
        self._model = model
        self._pool = pool
        self.rows = rows
        device = model.device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logits = model.new_logits(rows)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tables = torch.zeros((rows, width), dtype=torch.int32, device=device)
        self._draws = new_draws(rows, device)
        self._plan = model.decode_plan(rows, keys) if model.fast else None
        # What the host knows of the rows: it says no before the device reads or writes elsewhere.
        self._keys = keys
        self._held = np.zeros(rows, dtype=np.int64)
        self._room = np.zeros(rows, dtype=np.int64)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def place(
        self, row: int, token: int, length: int, pages: Sequence[int], draws: DrawState
    ) -> None:
        """Seat a request on a row that nobody uses; see seat."""
        assert self._held[row] == 0, f"row {row} is used"
        tokens = put([token], torch.int64, self._model.device)
        self.seat([row], tokens, [length], [pages], [draws])

    def seat(
        self,
        rows: Sequence[int],
        tokens: torch.Tensor,
        lengths: Sequence[int],
        pages: Sequence[Sequence[int]],
        draws: Sequence[DrawState],
    ) -> None:
        """Seat requests, whatever their rows had before.

        Args:
            rows: of each, all different.
            tokens: (rows,), int64, on the device: what the next step computes.
            lengths: positions up to and with that token's; the others have their KV in the pages.
            pages: of each request; more can be set later.
            draws: how it draws. The device counts on from drawn by itself. What a seed draws is
                the same in any row and batch, but not what engine/sampler draws from it.
        """
        device = self._model.device
        at = put(rows, torch.int64, device)
        self.tokens[at] = tokens
        self._lengths[at] = put(lengths, torch.int32, device)
        width = max(len(one) for one in pages)
        assert width <= self._tables.shape[1], f"more than {self._tables.shape[1]} pages"
        padded = [[*one, *[0] * (width - len(one))] for one in pages]
        self._tables[at, :width] = put(padded, torch.int32, device)
        new = draws_of(draws, device)
        for field in dataclasses.fields(Draws):
            getattr(self._draws, field.name)[at] = getattr(new, field.name)
        self._held[rows] = lengths
        self._room[rows] = [len(one) * self._pool.shape[4] for one in pages]

    def set_pages(self, row: int, first: int, pages: Sequence[int]) -> None:
        """Tell where a request's positions from first * block_tokens on go, before they come."""
        last = first + len(pages)
        assert last <= self._tables.shape[1], f"more than {self._tables.shape[1]} pages"
        self._tables[row, first:last] = put(pages, torch.int32, self._model.device)
        self._room[row] = max(self._room[row], last * self._pool.shape[4])

    def move(self, source: int, target: int) -> None:
        """Give a request another row, which nobody uses."""
        assert self._held[target] == 0, f"row {target} is used"
        columns = [getattr(self._draws, field.name) for field in dataclasses.fields(Draws)]
        for buffer in (self.tokens, self._lengths, self._tables, *columns):
            buffer[target] = buffer[source]
        self._held[target], self._room[target] = self._held[source], self._room[source]
        self.clear(source)

    def clear(self, row: int) -> None:
        """Take a request away; its row is computed for nothing until it is placed anew."""
        # Not `[row] = 0`: torch copies that number from the host, which waits for all steps before.
        self._lengths[row : row + 1].zero_()
        self._held[row] = 0

    def size_of(self, rows: int) -> int:
        """Rows that a step of so many computes: those of its graph, or just these."""
        return min((size for size in self._graphs if size >= rows), default=rows)

    def has_room(self, lengths: int) -> bool:
        """Whether rows may hold so many keys together."""
        return lengths <= self._keys

    def run(self, rows: int) -> None:
        """Compute a step of rows [0, rows), which all requests are in; tokens is what each drew.

        Nothing is waited for: whoever reads tokens on the host waits.
        """
        held = self._held
        assert not held[rows:].any(), f"a request is not in the first {rows} rows"
        assert (held <= self._room)[:rows].all(), "a token has no page"
        assert self.has_room(int(held.sum())), f"more than {self._keys} keys"
        size = self.size_of(rows)
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self._step(rows)
        held += held > 0

    @torch.inference_mode()
    def _step(self, rows: int) -> None:
        lengths, tokens, logits = self._lengths[:rows], self.tokens[:rows], self.logits[:rows]
        paged = Paged(self._pool, self._tables[:rows], lengths, self._model.kv_scale)
        self._model.decode(tokens, paged, self._plan and _first(self._plan, rows), logits)
        draws = Draws(
            *(getattr(self._draws, field.name)[:rows] for field in dataclasses.fields(Draws))
        )
        sample(logits, draws, tokens)
        used = lengths > 0
        draws.drawn.add_(used & (draws.temperature > 0))
        lengths.add_(used)

    def warm(self) -> None:
        """Run a step of nobody, so that its kernels are compiled; for who captures no graphs."""
        assert not self._held.any(), "a row is used: this would advance it"
        self._step(1)

    def capture(self, sizes: Sequence[int], progress: Callable[[int, int, int], None]) -> None:
        """Capture graphs; all rows must be clear. Needs a CUDA device.

        The largest comes first, and the others share its memory: only one runs at a time.

        Args:
            sizes: rows of each graph.
            progress: told after each one: graphs done, its rows, bytes of the device left.
        """
        assert self._model.device.type == "cuda", "only a CUDA device has graphs"
        assert not self._held.any(), "a row is used: a capture would advance it"
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        memory = None
        for done, size in enumerate(sorted(sizes, reverse=True), start=1):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_RUNS):
                    self._step(size)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may copy meanwhile: what they ask of CUDA is no fault of the capture.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._step(size)
            memory = memory or graph.pool()
            self._graphs[size] = graph
            free, _ = torch.cuda.mem_get_info()
            progress(done, size, free)
        torch.cuda.empty_cache()  # what the runs before each capture took on the other stream


def put(
    values: Sequence[float] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Numbers of the host, on the device; the host does not wait."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _signed(seed: int) -> int:
    """The same 64 bits as a number that int64 holds."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed


def _first(plan: DecodePlan, rows: int) -> DecodePlan:
    """The same room for fewer rows."""
    work = dataclasses.replace(plan.work, firsts=plan.work.firsts[:rows])
    return dataclasses.replace(plan, work=work)
