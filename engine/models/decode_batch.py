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


class DecodeBatch:
    """The rows, and a graph for each of some numbers of them.

    Args:
        model: computes.
        pool: pages, on the model's device.
        rows: requests at once, at most.
        width: pages of the longest request.
        keys: lengths of all rows together, at most; see kernels.device.decode_attention.
    """

    def __init__(
        self, model: CudaLlama, pool: torch.Tensor, rows: int, width: int, keys: int
    ) -> None:
        self._model = model
        self._pool = pool
        self.rows = rows
        device = model.device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
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
        """Seat a request.

        Args:
            row: not used by another request.
            token: that the next step computes.
            length: positions up to and with that token's; the others have their KV in the pages.
            pages: of the request; more can be set later.
            draws: how it draws. The device counts on from drawn by itself. What a seed draws is
                the same in any row and batch, but not what engine/sampler draws from it.
        """
        assert self._held[row] == 0, f"row {row} is used"
        self.tokens[row] = token
        self._lengths[row] = length
        self._held[row], self._room[row] = length, 0
        self.set_pages(row, 0, pages)
        mine, params = self._draws, draws.params
        mine.temperature[row] = params.temperature
        mine.top_k[row] = max(params.top_k, 0)
        mine.top_p[row] = params.top_p
        mine.min_p[row] = params.min_p
        seed = draws.seed & (2**64 - 1)
        mine.seeds[row] = seed - 2**64 if seed >= 2**63 else seed
        mine.drawn[row] = draws.drawn

    def set_pages(self, row: int, first: int, pages: Sequence[int]) -> None:
        """Tell where a request's positions from first * block_tokens on go, before they come."""
        new = torch.tensor(pages, dtype=torch.int32)
        last = first + len(new)
        assert last <= self._tables.shape[1], f"more than {self._tables.shape[1]} pages"
        self._tables[row, first:last].copy_(new, non_blocking=True)
        self._room[row] = max(self._room[row], last * self._pool.shape[4])

    def clear(self, row: int) -> None:
        """Take a request away; its row is computed for nothing until it is placed anew."""
        self._lengths[row] = 0
        self._held[row] = 0

    def run(self, rows: int) -> None:
        """Compute a step of rows [0, rows), which all requests are in; tokens is what each drew.

        Nothing is waited for: whoever reads tokens on the host waits.
        """
        held = self._held
        assert not held[rows:].any(), f"a request is not in the first {rows} rows"
        assert (held <= self._room)[:rows].all(), "a token has no page"
        assert held.sum() <= self._keys, f"more than {self._keys} keys"
        size = min((size for size in self._graphs if size >= rows), default=None)
        if size is None:
            self._step(rows)
        else:
            self._graphs[size].replay()
        held += held > 0

    @torch.inference_mode()
    def _step(self, rows: int) -> None:
        lengths, tokens = self._lengths[:rows], self.tokens[:rows]
        paged = Paged(self._pool, self._tables[:rows], lengths, self._model.kv_scale)
        logits = self._model.decode(tokens, paged, self._plan and _first(self._plan, rows))
        draws = Draws(
            *(getattr(self._draws, field.name)[:rows] for field in dataclasses.fields(Draws))
        )
        sample(logits, draws, tokens)
        used = lengths > 0
        draws.drawn.add_(used & (draws.temperature > 0))
        lengths.add_(used)

    def capture(self, sizes: Sequence[int], progress: Callable[[str], None]) -> None:
        """Capture graphs; all rows must be clear. Needs a CUDA device.

        The largest comes first, and the others share its memory: only one runs at a time.

        Args:
            sizes: rows of each graph.
            progress: told after each one, with the memory that is left.
        """
        assert self._model.device.type == "cuda", "only a CUDA device has graphs"
        assert not self._held.any(), "a row is used: a capture would advance it"
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        memory = None
        for size in sorted(sizes, reverse=True):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_RUNS):
                    self._step(size)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                self._step(size)
            memory = memory or graph.pool()
            self._graphs[size] = graph
            free, _ = torch.cuda.mem_get_info()
            progress(f"graph of {size} rows captured, {free / 2**30:.1f} GiB left")


def _first(plan: DecodePlan, rows: int) -> DecodePlan:
    """The same room for fewer rows."""
    work = dataclasses.replace(plan.work, firsts=plan.work.firsts[:rows])
    return dataclasses.replace(plan, work=work)
