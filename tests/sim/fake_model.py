"""A model whose next token is a hash of the whole prefix, read back through the pages.

Each position's K and V hold the token at that position and the position itself. A wrong page, a
page that was not loaded, or one that was given to somebody else gives a wrong token or an
assertion, never a plausible answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence

import torch

from kvist.engine.models.base import Chunk, ModelConfig
from kvist.engine.models.llama_cuda import Given
from kvist.kernels.device.paged import Paged
from kvist.proto.layout import BlockFormat

VOCAB = 256
BLOCK_TOKENS = 4
FORMAT = BlockFormat(1, 1, 2, "float32", BLOCK_TOKENS)


def config(max_model_len: int = 4096, eos: tuple[int, ...] = ()) -> ModelConfig:
    return ModelConfig(
        vocab=VOCAB,
        layers=1,
        hidden=2,
        heads=1,
        kv_heads=1,
        head_dim=2,
        intermediate=2,
        max_model_len=max_model_len,
        rms_eps=1e-5,
        rope_theta=1e4,
        tie_embeddings=True,
        eos_token_ids=eos,
        name="fake",
    )


def next_token(prefix: Sequence[int]) -> int:
    """The greedy token after a prefix."""
    data = b"".join(token.to_bytes(4, "little") for token in prefix)
    return hashlib.sha256(data).digest()[0]


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What a model without any cache would generate."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeModel:
    """See the top of the file.

    Attributes:
        computed: tokens that went through it.
        fail_next: raise in this many of the next steps.
        nap_s: how long each step takes, so that who tests has time to do something meanwhile.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.computed = 0
        self.fail_next = 0
        self.nap_s = 0.0

    def forward(
        self,
        chunks: Sequence[Chunk],
        pool: torch.Tensor,
        before_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """See Model.forward."""
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("the sim was asked to fail")
        time.sleep(self.nap_s)
        rows = []
        size = pool.shape[4]
        for chunk in chunks:
            self.computed += len(chunk.tokens)
            for position, token in enumerate(chunk.tokens, chunk.start):
                page = chunk.pages[position // size]
                pool[page, 0, :, 0, position % size] = torch.tensor([token, position])
        if before_layer is not None:
            before_layer(0)
        for chunk in chunks:
            prefix = self._read(chunk, pool)
            assert prefix[chunk.start :] == list(chunk.tokens)
            if chunk.want_logits:
                row = torch.zeros(self.config.vocab)
                row[next_token(prefix)] = 10.0
                rows.append(row)
        return torch.stack(rows) if rows else torch.empty(0, self.config.vocab)

    def _read(self, chunk: Chunk, pool: torch.Tensor) -> list[int]:
        """The prefix that the pages hold."""
        size, end = pool.shape[4], chunk.start + len(chunk.tokens)
        pages = list(chunk.pages)[: -(-end // size)]
        rows = pool[pages, 0, :, 0].transpose(0, 1).reshape(2, -1, 2)[:, :end]
        assert torch.equal(rows[0], rows[1]), "K and V are of different blocks"
        tokens, positions = rows[0, :, 0], rows[0, :, 1]
        assert positions.tolist() == list(range(end)), "a page is not where it belongs"
        return [int(token) for token in tokens.tolist()]


class FakeDeviceModel(FakeModel):
    """The same as a device's model: see llama_cuda.CudaLlama for what it stands in for."""

    fast = False
    kv_scale = 1.0
    device = torch.device("cpu")

    def new_logits(self, rows: int) -> torch.Tensor:
        """See CudaLlama.new_logits."""
        return torch.empty(rows, self.config.vocab)

    def forward(  # type: ignore[override]
        self,
        chunks: Sequence[Chunk],
        pool: torch.Tensor,
        before_layer: Callable[[int], None] | None = None,
        given: Given | None = None,
    ) -> torch.Tensor:
        """See CudaLlama.forward."""
        known = list(chunks)
        if given is not None:
            for chunk, token in zip(given.chunks, given.tokens.tolist(), strict=True):
                assert len(known[chunk].tokens) == 1
                known[chunk] = dataclasses.replace(known[chunk], tokens=[token])
        return super().forward(known, pool, before_layer)

    def decode(self, tokens: torch.Tensor, paged: Paged, plan: object, out: torch.Tensor) -> None:
        """See CudaLlama.decode."""
        del plan
        chunks, rows = [], []
        for row, length in enumerate(paged.lengths.tolist()):
            if length:
                pages = paged.tables[row].tolist()
                chunks.append(Chunk([int(tokens[row])], length - 1, pages, True))
                rows.append(row)
        out.zero_()
        out[rows] = FakeModel.forward(self, chunks, paged.pool)
