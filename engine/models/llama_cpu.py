"""The Llama family on processors with AVX-512 BF16, on kernels of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from kvist.engine.models.base import Chunk, ModelConfig
from kvist.engine.weights import LoadedModel
from kvist.kernels.cpu.attention import scratch_bytes
from kvist.kernels.cpu.layers import (
    PRIVATE_ROWS,
    Room,
    Rows,
    Weights,
    phases,
    run_layers,
)
from kvist.kernels.cpu.linear import PAIR_BYTES, TILE
from kvist.kernels.cpu.packing import Grouped, Tiles, gate_up_order, joined, pack
from kvist.kernels.cpu.work import PHASE_BYTES, Team, aligned
from kvist.kernels.rope import rope_table

NARROW = 32  # what every width must be a multiple of


class CpuLlama:
    """A Model: see base for what it promises, here for any number of threads.

    K and V are bfloat16. The residual stream, the norms, the rotation, the softmax and all sums
    are float32. One thread at a time may call forward.

    Args:
        loaded: weights and shape, bfloat16; its tensors can be dropped afterwards.
        threads: to compute with, the caller's among them.
    """

    def __init__(self, loaded: LoadedModel, threads: int) -> None:
        self.config: ModelConfig = loaded.config
        config = loaded.config
        self._team = Team(threads)
        self._tiles = [_pack_layer(loaded, layer) for layer in range(config.layers)]
        embedding = "model.embed_tokens.weight"
        self._head = pack(_weight(loaded, embedding if config.tie_embeddings else "lm_head.weight"))
        self._embedding = loaded.tensors[embedding]
        names = [
            f"model.layers.{layer}.{norm}.weight"
            for layer in range(config.layers)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        norms = [loaded.tensors[name].float() for name in (*names, "model.norm.weight")]
        table = rope_table(loaded.rope)
        places = [[(t.address, t.kind) for t in tiles] for tiles in self._tiles]
        # What the addresses below point to.
        self._arrays = (torch.tensor(places), torch.stack(norms), table.cos, table.sin)
        tiles_at, norms_at, cos_at, sin_at = (array.data_ptr() for array in self._arrays)
        self._vocab = -(-config.vocab // TILE) * TILE
        self._weights = Weights(
            layers=config.layers,
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            inner=config.intermediate,
            block_tokens=0,
            vocab=self._vocab,
            eps=config.rms_eps,
            tiles=tiles_at,
            head=self._head.address,
            head_kind=self._head.kind,
            norms=norms_at,
            embedding=self._embedding.data_ptr(),
            cos=cos_at,
            sin=sin_at,
        )
        self._sync_bytes = phases(config.layers) * PHASE_BYTES
        self._buffers: tuple[int, int, int] = (0, 0, 0)

    def forward(self, chunks: Sequence[Chunk], pool: torch.Tensor) -> torch.Tensor:
        """Compute the chunks; the contract is Model's."""
        config, block_tokens = self.config, pool.shape[4]
        weights = self._weights._replace(block_tokens=block_tokens)
        fresh = [page for chunk in chunks if (page := _fresh(chunk, block_tokens)) is not None]
        for page in fresh:
            pool[page].zero_()
        rows, arrays = _rows(chunks, block_tokens, pool.data_ptr())
        logits = torch.empty((rows.wanted, self._vocab), dtype=torch.float32)
        room, memory = self._room(rows.rows, logits, block_tokens)
        sync = np.zeros(self._sync_bytes // 8, np.int64)
        at, layers = sync.ctypes.data, config.layers

        def work(part: int) -> None:
            # A late helper may still look at this step's memory: it keeps it.
            _keep = memory, sync, arrays
            run_layers(part, (0, layers), at, weights, rows, room)

        self._team.run(work, work)
        return logits[:, : config.vocab]

    def close(self) -> None:
        """End the threads."""
        self._team.close()

    def _room(
        self, rows: int, logits: torch.Tensor, block_tokens: int
    ) -> tuple[Room, tuple[object, ...]]:
        config = self.config
        width = config.heads * config.head_dim
        lines = config.heads // config.kv_heads * min(rows, block_tokens)
        scratch = PRIVATE_ROWS * config.hidden * 2 + max(
            max(config.hidden, config.intermediate, width) // 2 * PAIR_BYTES,
            scratch_bytes(config.head_dim, lines),
        )
        scratch = -(-scratch // 64) * 64
        sizes = (
            rows * config.hidden * 4,
            max(rows, len(logits)) * config.hidden * 2,
            rows * (width + 2 * config.kv_heads * config.head_dim) * 4,
            (rows * width + 3 * config.head_dim) * 2,
            rows * width * 2,
            rows * config.intermediate * 2,
            scratch * self._team.threads,
        )
        memory = aligned(sum(-(-size // 64) * 64 for size in sizes))
        places, at = [], int(memory.ctypes.data)
        for size in sizes:
            places.append(at)
            at += -(-size // 64) * 64
        room = Room(*places[:6], logits.data_ptr(), places[6], scratch)
        return room, (memory, logits)


def _weight(loaded: LoadedModel, name: str) -> torch.Tensor | Grouped:
    return loaded.tensors[name]


def _pack_layer(loaded: LoadedModel, layer: int) -> tuple[Tiles, ...]:
    def weight(*names: str) -> torch.Tensor | Grouped:
        parts = [_weight(loaded, f"model.layers.{layer}.{name}.weight") for name in names]
        return torch.cat(parts)

    gate_up = weight("mlp.gate_proj", "mlp.up_proj")
    order = gate_up_order(loaded.config.intermediate)
    gate_up = gate_up[order]
    return (
        pack(weight("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        pack(weight("self_attn.o_proj")),
        pack(gate_up),
        pack(weight("mlp.down_proj")),
    )


def _rows(chunks: Sequence[Chunk], block_tokens: int, pool: int) -> tuple[Rows, tuple[np.ndarray, ...]]:
    tokens: list[int] = []
    positions: list[int] = []
    places: list[tuple[int, int]] = []
    blocks: list[tuple[int, int, int, int, int]] = []
    tables: list[int] = []
    last: list[int] = []
    for chunk in chunks:
        row, table = len(tokens), len(tables)
        end = chunk.start + len(chunk.tokens)
        tokens += chunk.tokens
        positions += range(chunk.start, end)
        places += [(chunk.pages[p // block_tokens], p % block_tokens) for p in range(chunk.start, end)]
        tables += chunk.pages[: (end - 1) // block_tokens + 1]
        at = chunk.start
        while at < end:
            page = at // block_tokens
            stop = min(end, (page + 1) * block_tokens)
            blocks.append((row + at - chunk.start, stop - at, table, page + 1, at % block_tokens))
            at = stop
        if chunk.want_logits:
            last.append(len(tokens) - 1)
    lists = (tokens, positions, places, blocks, tables, last)
    arrays = tuple(np.array(values, np.int64) for values in lists)
    addresses = [int(array.ctypes.data) for array in arrays]
    return Rows(len(tokens), len(blocks), len(last), *addresses, pool), arrays


def _fresh(chunk: Chunk, block_tokens: int) -> int | None:
    """The page begun here and not filled: what an earlier owner left in it must not be read."""
    end = chunk.start + len(chunk.tokens)
    page = end // block_tokens
    if end % block_tokens and page * block_tokens >= chunk.start:
        return chunk.pages[page]
    return None
