"""What a step of the CPU's model computes, as numbers in memory.

A step that only decodes fills arrays that stay from step to step: a request keeps its row as long
as the schedule keeps its place, and its pages are written when they change. With 16 requests this
takes 20 us, half of what lists take that are made anew, as steps with prompts still have them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvist.engine.models.base import Chunk
from kvist.kernels.cpu.step import Rows

Numbers = npt.NDArray[np.int64]


class DecodeRows:
    """The arrays of steps that only decode: one token for each of their chunks."""

    def __init__(self) -> None:
        self._make(0, 0)

    def renew(self) -> None:
        """Forget all: somebody may still look at the arrays of the last step."""
        self._make(*self._tables.shape)

    def fill(
        self, chunks: Sequence[Chunk], block_tokens: int, pool: int
    ) -> tuple[Rows, tuple[Numbers, ...], list[int]]:
        """The same as step_rows, and fresh_pages.

        Args:
            chunks: of one token each. block_tokens: of a page. pool: its address.
        """
        count, widest = len(chunks), max(len(chunk.pages) for chunk in chunks)
        if count > self._tables.shape[0] or widest > self._tables.shape[1]:
            # By halves more, so that a prompt that grows does not make them anew at each page.
            old = self._tables.shape
            self._make(max(count + count // 2, old[0]), max(widest + widest // 2, old[1]))
        for row, chunk in enumerate(chunks):
            if self._pages[row] != chunk.pages:
                self._pages[row] = list(chunk.pages)
                self._tables[row, : len(chunk.pages)] = self._pages[row]
        tokens, positions = self._tokens[:count], self._positions[:count]
        tokens[:] = [chunk.tokens[0] for chunk in chunks]
        positions[:] = [chunk.start for chunk in chunks]
        numbers, inside = np.divmod(positions, block_tokens)
        self._places[:count, 0] = self._tables[self._block[:count, 0], numbers]
        self._places[:count, 1] = inside
        self._block[:count, 3] = numbers + 1
        self._block[:count, 4] = inside
        last = self._block[:count, 0].copy()
        if not all(chunk.want_logits for chunk in chunks):
            last = last[[chunk.want_logits for chunk in chunks]]
        arrays = (tokens, positions, self._places, self._block, self._tables, last)
        addresses = [int(array.ctypes.data) for array in arrays]
        begun = self._places[:count, 0][inside == 0].tolist() if block_tokens > 1 else []
        return Rows._make((count, count, len(last), *addresses, pool)), arrays, begun

    def _make(self, rows: int, width: int) -> None:
        self._pages: list[list[int]] = [[] for _ in range(rows)]
        self._tables = np.zeros((rows, width), np.int64)
        self._tokens, self._positions = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self._places = np.zeros((rows, 2), np.int64)
        # See Rows.block: a row is a block of its own, whose pages begin where the row does.
        self._block = np.zeros((rows, 5), np.int64)
        self._block[:, 0] = np.arange(rows)
        self._block[:, 1] = 1
        self._block[:, 2] = np.arange(rows) * width


def step_rows(
    chunks: Sequence[Chunk], block_tokens: int, pool: int
) -> tuple[Rows, tuple[npt.NDArray[np.int64], ...]]:
    """What a step computes, in the order of its chunks, and the arrays that it points to.

    Args:
        chunks: see Model. block_tokens: of a page. pool: its address.
    """
    tokens: list[int] = []
    positions: list[int] = []
    places: list[tuple[int, int]] = []
    blocks: list[tuple[int, int, int, int, int]] = []
    tables: list[int] = []
    last: list[int] = []
    for chunk in chunks:
        row, table, at = len(tokens), len(tables), chunk.start
        end = at + len(chunk.tokens)
        tokens += chunk.tokens
        positions += range(at, end)
        tables += chunk.pages[: (end - 1) // block_tokens + 1]
        while at < end:
            number, place = divmod(at, block_tokens)
            count = min(end - at, block_tokens - place)
            page = chunk.pages[number]
            places += [(page, place + one) for one in range(count)]
            blocks.append((row, count, table, number + 1, place))
            at += count
            row += count
        if chunk.want_logits:
            last.append(row - 1)
    lists = (tokens, positions, places, blocks, tables, last)
    arrays = tuple(np.array(values, np.int64) for values in lists)
    addresses = [int(array.ctypes.data) for array in arrays]
    return Rows._make((len(tokens), len(blocks), len(last), *addresses, pool)), arrays


def fresh_pages(chunks: Sequence[Chunk], block_tokens: int) -> list[int]:
    """Pages begun here and not filled: what an earlier owner left in them must not be read."""
    pages = []
    for chunk in chunks:
        number, place = divmod(chunk.start + len(chunk.tokens), block_tokens)
        if place and number * block_tokens >= chunk.start:
            pages.append(chunk.pages[number])
    return pages
