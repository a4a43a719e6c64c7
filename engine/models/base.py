"""The contract between the scheduler's batch and a model: chunks of tokens in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-family decoder.

    Attributes:
        vocab: tokens in the vocabulary.
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; heads is a multiple of it.
        head_dim: elements of one head.
        intermediate: width of the MLP.
        max_model_len: positions the model was trained for.
        rms_eps: added to the mean square in RMSNorm.
        rope_theta: base of the rotary frequencies.
        tie_embeddings: the output projection is the input embedding.
        eos_token_ids: tokens that end an output.
        name: architecture as its files call it, for example "llama".
    """

    vocab: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_model_len: int
    rms_eps: float
    rope_theta: float
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    name: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request, computed in this step.

    Attributes:
        tokens: ids at positions [start, start + len(tokens)), at least one.
        start: position of the first; all positions before it have their KV in the pages.
        pages: page of position p is pages[p // block_tokens]; covers at least the last position.
        want_logits: return logits for the chunk's last token.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    want_logits: bool


class Model(Protocol):
    """A decoder over a page-first pool.

    The result for a token depends on the tokens before it and on nothing else in the batch: not
    on how a prompt was cut into chunks, not on what was cached, not on other requests. Cached and
    computed answers are equal because of this, bit for bit.
    """

    config: ModelConfig

    def forward(
        self,
        chunks: Sequence[Chunk],
        pool: torch.Tensor,
        before_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Compute the chunks, write their K and V to their pages.

        Args:
            chunks: a page written by one is in no other chunk's pages unless
                that other chunk only reads it, or goes on where that one ends: a sequence may come
                as several chunks, in their order.
            pool: (pages, layers, 2, kv_heads, block_tokens, head_dim), contiguous.
            before_layer: called with each layer's number right before that layer first reads the
                pages; complete pages of earlier positions may be filled until it returns.

        Returns:
            (chunks with want_logits, vocab), float32, in the order of the chunks.
        """
        ...
