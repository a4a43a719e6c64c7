"""What one step touches, worked out once for all layers: rows, pages and attention products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from kvist.engine.models.base import Chunk, ModelConfig

# Pages gathered together when single tokens of several requests share a product. It bounds the
# scratch memory. 16 sequences of 512 tokens on one thread took, in two passes over the sizes, 254
# and 185 ms with 8 pages, 178 and 160 with 128, 175 and 143 with 512: the passes differ as much as
# the sizes do, so the choice is not a sharp one.
GATHER_PAGES = 128


@dataclass(frozen=True, slots=True)
class Product:
    """Rows of the step that attend together, all in the last of their pages.

    Attributes:
        first: first row of the step.
        last: row after the last one.
        tokens: keys that they attend over, whole pages.
        mask: (sequences, 1, 1, rows of each sequence, block_tokens), see kernels.attention.
    """

    first: int
    last: int
    tokens: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Gather:
    """Sequences with equally many pages whose K and V are copied together.

    Attributes:
        sequences: how many.
        pages: pages of each.
        index: (layers, 2 * sequences * kv_heads * pages), int64, see kernels.attention.
        products: what to compute on them.
    """

    sequences: int
    pages: int
    index: torch.Tensor
    products: tuple[Product, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step in the order that the model computes it, which is not the order of its chunks.

    Attributes:
        tokens: (rows,), int64, ids.
        positions: (rows,), int64.
        stores: (layers, 2, rows * kv_heads), int64: where K and V of each row go, as rows of the
            pool viewed as (-1, head_dim).
        fresh: (n,), int64, pages to zero first: their first token is new and their last is not.
        gathers: the attention of a layer.
        last_rows: (chunks that want logits,), int64, in the order of the chunks.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    stores: torch.Tensor
    fresh: torch.Tensor
    gathers: tuple[Gather, ...]
    last_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans steps for one model over one pool.

    Attributes:
        config: of the model.
        block_tokens: tokens of a page.
        mask: (block_tokens, block_tokens), from kernels.attention.page_mask, on the pool's device.
    """

    config: ModelConfig
    block_tokens: int
    mask: torch.Tensor

    def plan(self, chunks: Sequence[Chunk]) -> StepPlan:
        """Order the rows so that what is computed together lies together, and find its places."""
        order = sorted(range(len(chunks)), key=lambda i: self._group(chunks[i]))
        ordered = [chunks[i] for i in order]
        pages, places = self._targets(ordered)
        last_row = dict(zip(order, _ends(ordered), strict=True))
        wanted = [last_row[i] - 1 for i, chunk in enumerate(chunks) if chunk.want_logits]
        return StepPlan(
            tokens=self._ids([t for chunk in ordered for t in chunk.tokens]),
            positions=self._ids([p for chunk in ordered for p in _positions(chunk)]),
            stores=self._stores(self._ids(pages), self._ids(places)),
            fresh=self._ids(self._fresh(ordered)),
            gathers=tuple(self._gathers(ordered)),
            last_rows=self._ids(wanted),
        )

    def _ids(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.mask.device)

    def _pages(self, chunk: Chunk) -> int:
        """Pages that the chunk's last token attends over."""
        return (chunk.start + len(chunk.tokens) - 1) // self.block_tokens + 1

    def _group(self, chunk: Chunk) -> tuple[bool, int]:
        """Single tokens with equally many pages are computed together."""
        return len(chunk.tokens) > 1, self._pages(chunk)

    def _targets(self, chunks: Sequence[Chunk]) -> tuple[list[int], list[int]]:
        """Page, and place in the page, of every row."""
        pages: list[int] = []
        places: list[int] = []
        for chunk in chunks:
            positions = _positions(chunk)
            pages += [chunk.pages[p // self.block_tokens] for p in positions]
            places += [p % self.block_tokens for p in positions]
        return pages, places

    def _fresh(self, chunks: Sequence[Chunk]) -> list[int]:
        """Pages begun here and not filled: what an earlier owner left in them must not be read.

        It is masked, but a weight of 0 times an infinity would still be NaN.
        """
        pages = []
        for chunk in chunks:
            end = chunk.start + len(chunk.tokens)
            page = end // self.block_tokens
            if end % self.block_tokens and page * self.block_tokens >= chunk.start:
                pages.append(chunk.pages[page])
        return pages

    def _stores(self, pages: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        config = self.config
        planes = self._planes(pages)
        index = planes.transpose(2, 3) * self.block_tokens + places[:, None]
        return index.reshape(config.layers, 2, -1)

    def _planes(self, pages: torch.Tensor) -> torch.Tensor:
        """Rows of the pool viewed as (-1, block_tokens * head_dim).

        Returns:
            (layers, 2, kv_heads, pages), int64.
        """
        heads = self.config.kv_heads
        shape = (self.config.layers, 2, heads, 1)
        inside = torch.arange(self.config.layers * 2 * heads, device=pages.device).view(shape)
        return pages * (self.config.layers * 2 * heads) + inside

    def _gathers(self, chunks: Sequence[Chunk]) -> Iterator[Gather]:
        row = 0
        for (several, pages), members in groupby(chunks, self._group):
            group = list(members)
            most = 1 if several else max(1, GATHER_PAGES // pages)
            for at in range(0, len(group), most):
                part = group[at : at + most]
                yield self._gather(part, pages, row)
                row += sum(len(chunk.tokens) for chunk in part)

    def _gather(self, chunks: Sequence[Chunk], pages: int, row: int) -> Gather:
        ids = self._ids([page for chunk in chunks for page in chunk.pages[:pages]])
        heads = (self.config.layers, 2, self.config.kv_heads)
        planes = self._planes(ids).view(*heads, len(chunks), pages)
        index = planes.permute(0, 1, 3, 2, 4).reshape(self.config.layers, -1)
        if len(chunks) == 1:
            products = tuple(self._products(chunks[0], row))
        else:
            places = [chunk.start % self.block_tokens for chunk in chunks]
            mask = self.mask[self._ids(places)].view(len(chunks), 1, 1, 1, -1)
            products = (Product(row, row + len(chunks), pages * self.block_tokens, mask),)
        return Gather(len(chunks), pages, index, products)

    def _products(self, chunk: Chunk, row: int) -> Iterator[Product]:
        """Cut a chunk at page boundaries."""
        at, end = chunk.start, chunk.start + len(chunk.tokens)
        while at < end:
            page = at // self.block_tokens
            stop = min(end, (page + 1) * self.block_tokens)
            first = at - page * self.block_tokens
            mask = self.mask[first : first + stop - at].view(1, 1, 1, stop - at, -1)
            begin = row + at - chunk.start
            yield Product(begin, begin + stop - at, (page + 1) * self.block_tokens, mask)
            at = stop


def _positions(chunk: Chunk) -> range:
    return range(chunk.start, chunk.start + len(chunk.tokens))


def _ends(chunks: Sequence[Chunk]) -> Iterator[int]:
    """Row after each chunk's last."""
    row = 0
    for chunk in chunks:
        row += len(chunk.tokens)
        yield row
