"""The Llama family on processors with AVX-512 BF16, on kernels of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import torch

from kvist.engine.models.base import Chunk, ModelConfig
from kvist.engine.models.cpu_rows import DecodeRows, Numbers, fresh_pages, step_rows
from kvist.engine.weights import LoadedModel
from kvist.kernels.cpu.attention import scratch_bytes
from kvist.kernels.cpu.layers import PRIVATE_ROWS, phases, run_layers
from kvist.kernels.cpu.linear import GROUP_BYTES, TILE
from kvist.kernels.cpu.packing import Tiles, gate_up_order, pack
from kvist.kernels.cpu.step import Room, Rows, Weights
from kvist.kernels.cpu.work import Sync, Team, aligned
from kvist.kernels.groups import GROUP, Grouped, joined
from kvist.kernels.rope import rope_table


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
        head = embedding if config.tie_embeddings else "lm_head.weight"
        self._head = pack(_weight(loaded, head))
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

        self._memory = aligned(0)
        self._decodes = DecodeRows()
        _compile(self._weights)

    def forward(
        self,
        chunks: Sequence[Chunk],
        pool: torch.Tensor,
        before_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Compute the chunks; the contract is Model's."""
        block_tokens, layers = pool.shape[4], self.config.layers
        weights = self._weights._replace(block_tokens=block_tokens)
        rows, arrays, fresh = self._rows(chunks, block_tokens, pool.data_ptr())
        for page in fresh:
            pool[page].zero_()
        logits = torch.empty((rows.wanted, self._vocab), dtype=torch.float32)
        room, memory = self._room(rows.rows, logits, block_tokens)
        sync = Sync(phases(layers))

        def compute(part: int, first: int, last: int) -> None:
            run_layers(part, (first, last), sync.address, weights, rows, room)

        def help_out(part: int) -> None:
            # A helper that is late may still look at this step's memory: it keeps it.
            _kept = arrays, memory, logits
            compute(part, 0, layers)

        def lead() -> None:
            if before_layer is None:
                sync.open(layers)
                compute(0, 0, layers)
                return
            try:
                for layer in range(layers):
                    before_layer(layer)
                    sync.open(layer + 1)
                    compute(0, layer, layer + 1)
            except BaseException:
                sync.close()
                raise

        self._team.run(help_out, lead)
        return logits[:, : self.config.vocab]

    def close(self) -> None:
        """End the threads."""
        self._team.close()

    def _rows(
        self, chunks: Sequence[Chunk], block_tokens: int, pool: int
    ) -> tuple[Rows, tuple[Numbers, ...], list[int]]:
        """What the step computes, and the pages that it begins."""
        if all(len(chunk.tokens) == 1 for chunk in chunks):
            if not self._team.idle:
                self._decodes.renew()
            return self._decodes.fill(chunks, block_tokens, pool)
        rows, arrays = step_rows(chunks, block_tokens, pool)
        return rows, arrays, fresh_pages(chunks, block_tokens)

    def _room(
        self, rows: int, logits: torch.Tensor, block_tokens: int
    ) -> tuple[Room, tuple[object, ...]]:
        config = self.config
        width = config.heads * config.head_dim
        widest = max(config.hidden, config.intermediate, width)
        lines = config.heads // config.kv_heads * min(rows, block_tokens)
        scratch = max(
            # See layers: a thread's own rows and sums, an opened group, a tile of all rows.
            PRIVATE_ROWS * (config.hidden * 2 + widest // GROUP * 4)
            + 64
            + GROUP_BYTES
            + max(rows, len(logits)) * TILE * 4,
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
            rows * (widest // GROUP) * 4,
            scratch * self._team.threads,
        )
        size = sum(-(-size // 64) * 64 for size in sizes)
        if len(self._memory) < size or not self._team.idle:
            # Kept from step to step, as fresh memory costs a fault a page; but not while a helper
            # is late, who may still write to scratch where the step before had it.
            self._memory = aligned(size)
        memory = self._memory
        places, at = [], int(memory.ctypes.data)
        for size in sizes:
            places.append(at)
            at += -(-size // 64) * 64
        room = Room._make((*places[:7], logits.data_ptr(), places[7], scratch))
        return room, (memory, logits)


def _compile(weights: Weights) -> None:
    """Compile now what forward calls: 7 s of one core, or half a second once it was kept."""
    rows, room = Rows._make([0] * len(Rows._fields)), Room._make([0] * len(Room._fields))
    typed: Any = numba.typeof
    run_layers.compile(tuple(typed(value) for value in (0, (0, 0), 0, weights, rows, room)))


def _weight(loaded: LoadedModel, *names: str) -> torch.Tensor | Grouped:
    """Weights of a layer below one another: as codes if all are, in as many bits."""
    groups = [loaded.groups[name] for name in names if name in loaded.groups]
    if len(groups) == len(names) and len({part.bits for part in groups}) == 1:
        return joined(groups)
    return torch.cat([loaded.tensors[name] for name in names])


def _pack_layer(loaded: LoadedModel, layer: int) -> tuple[Tiles, ...]:
    def weight(*names: str) -> torch.Tensor | Grouped:
        return _weight(loaded, *(f"model.layers.{layer}.{name}.weight" for name in names))

    gate_up = weight("mlp.gate_proj", "mlp.up_proj")
    order = gate_up_order(loaded.config.intermediate)
    gate_up = gate_up.rows(order) if isinstance(gate_up, Grouped) else gate_up[order]
    return (
        pack(weight("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        pack(weight("self_attn.o_proj")),
        pack(gate_up),
        pack(weight("mlp.down_proj")),
    )
