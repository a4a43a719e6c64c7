"""The Llama family: RMSNorm, rotary positions, grouped-query attention, a gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvist.engine.models.base import Chunk, ModelConfig
from kvist.engine.models.plan import Gather, Planner, StepPlan
from kvist.engine.weights import LoadedModel
from kvist.kernels.activation import silu_mul
from kvist.kernels.attention import attend, gather_pages, least_rows, page_mask
from kvist.kernels.linear import Linear
from kvist.kernels.narrow import narrowed
from kvist.kernels.norm import rms_norm
from kvist.kernels.rope import RopeStep, rope, rope_step, rope_table


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer.

    Attributes:
        attention_norm: (hidden,).
        qkv: hidden -> (heads + 2 * kv_heads) * head_dim; one product reads the input once.
        out: heads * head_dim -> hidden.
        mlp_norm: (hidden,).
        gate_up: hidden -> 2 * intermediate.
        down: intermediate -> hidden.
    """

    attention_norm: torch.Tensor
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


def load_layer(tensors: Mapping[str, torch.Tensor], layer: int) -> Layer:
    """Pack the weights of one layer, named as in Hugging Face checkpoints."""

    def weight(*names: str) -> torch.Tensor:
        parts = [tensors[f"model.layers.{layer}.{name}.weight"] for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return Layer(
        attention_norm=weight("input_layernorm"),
        qkv=Linear(weight("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        out=Linear(weight("self_attn.o_proj")),
        mlp_norm=weight("post_attention_layernorm"),
        gate_up=Linear(weight("mlp.gate_proj", "mlp.up_proj")),
        down=Linear(weight("mlp.down_proj")),
    )


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward pass shares.

    Attributes:
        plan: rows, places and products.
        angles: of the rows, for query and key heads together.
        pool_rows: the pool as (-1, head_dim), for writing.
        pool_planes: the pool as (-1, block_tokens * head_dim), for reading.
        gathered: room for the largest gather, in the pool's dtype, flat.
        widened: the same in the dtype of the computation; the same memory if that is the same.
        least: query rows per product, see kernels.attention.least_rows.
        before_layer: see Model.forward.
    """

    plan: StepPlan
    angles: RopeStep
    pool_rows: torch.Tensor
    pool_planes: torch.Tensor
    gathered: torch.Tensor
    widened: torch.Tensor
    least: int
    before_layer: Callable[[int], None] | None


class LlamaModel:
    """A Model: see base for what it promises.

    It computes in the dtype of its weights. The pool may be of another: K and V are then rounded
    when they are stored, and everything reads them from there. The softmax, the norms, the
    rotation and the logits are float32 inside. One thread at a time may call forward.

    Args:
        loaded: weights and shape; its tensors can be dropped afterwards.
        device: where to compute; the pool must be there too.
    """

    def __init__(self, loaded: LoadedModel, device: str = "cpu") -> None:
        self.config: ModelConfig = loaded.config
        tensors = {name: tensor.to(device) for name, tensor in loaded.tensors.items()}
        self._embedding = tensors["model.embed_tokens.weight"]
        self._layers = [load_layer(tensors, layer) for layer in range(self.config.layers)]
        self._norm = tensors["model.norm.weight"]
        tied = self.config.tie_embeddings
        self._head = Linear(self._embedding if tied else tensors["lm_head.weight"])
        self._table = rope_table(loaded.rope, device)
        config = self.config
        self._scales = torch.ones(config.heads + config.kv_heads, device=device)
        self._scales[: config.heads] = config.head_dim**-0.5
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    @torch.inference_mode()
    def forward(
        self,
        chunks: Sequence[Chunk],
        pool: torch.Tensor,
        before_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Compute the chunks; the contract is Model's."""
        step = self._step(chunks, pool, before_layer)
        pool[step.plan.fresh] = 0
        hidden = F.embedding(step.plan.tokens, self._embedding)
        for number, layer in enumerate(self._layers):
            hidden += self._attention(
                rms_norm(hidden, layer.attention_norm, self._eps), number, step
            )
            inner = layer.gate_up(rms_norm(hidden, layer.mlp_norm, self._eps))
            hidden += layer.down(silu_mul(inner))
        wanted = hidden[step.plan.last_rows]
        if not len(wanted):
            return hidden.new_empty((0, self.config.vocab), dtype=torch.float32)
        return self._head(rms_norm(wanted, self._norm, self._eps)).float()

    @property
    def _eps(self) -> float:
        return self.config.rms_eps

    def _step(
        self,
        chunks: Sequence[Chunk],
        pool: torch.Tensor,
        before_layer: Callable[[int], None] | None,
    ) -> Step:
        block_tokens, head_dim = pool.shape[4:]
        dtype = self._embedding.dtype
        mask = page_mask(block_tokens, dtype, pool.device)
        plan = Planner(self.config, block_tokens, mask).plan(chunks)
        most = max(gather.index.shape[1] for gather in plan.gathers)
        return Step(
            plan=plan,
            angles=rope_step(self._table, plan.positions, self._scales),
            pool_rows=pool.view(-1, head_dim),
            pool_planes=pool.view(-1, block_tokens * head_dim),
            gathered=self._room(pool.dtype, most * block_tokens * head_dim),
            widened=self._room(dtype, most * block_tokens * head_dim),
            least=least_rows(block_tokens, head_dim, dtype),
            before_layer=before_layer,
        )

    def _room(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """At least count elements to write to, kept from step to step."""
        room = self._scratch.get(dtype)
        if room is None or room.numel() < count:
            room = self._scratch[dtype] = torch.empty(
                count, dtype=dtype, device=self._embedding.device
            )
        return room

    def _attention(self, x: torch.Tensor, number: int, step: Step) -> torch.Tensor:
        """Project, turn, store K and V, attend over the pages, project back: (rows, hidden)."""
        config, layer = self.config, self._layers[number]
        projected = layer.qkv(x).view(len(x), -1, config.head_dim)
        turned = rope(projected[:, : config.heads + config.kv_heads], step.angles)
        keys = turned[:, config.heads :].reshape(-1, config.head_dim)
        values = projected[:, config.heads + config.kv_heads :].reshape(-1, config.head_dim)
        dtype = step.pool_rows.dtype
        step.pool_rows.index_copy_(0, step.plan.stores[number, 0], narrowed(keys, dtype))
        step.pool_rows.index_copy_(0, step.plan.stores[number, 1], narrowed(values, dtype))
        queries = turned[:, : config.heads].view(len(x), config.kv_heads, -1, config.head_dim)
        out = torch.empty_like(queries)
        if step.before_layer is not None:
            step.before_layer(number)
        for gather in step.plan.gathers:
            self._attend(queries, out, gather, number, step)
        return layer.out(out.flatten(1))

    def _attend(
        self,
        queries: torch.Tensor,
        out: torch.Tensor,
        gather: Gather,
        number: int,
        step: Step,
    ) -> None:
        """Compute the products of one gather: queries and out are (rows, kv_heads, groups, dim)."""
        config = self.config
        index = gather.index[number]
        size = len(index) * step.pool_planes.shape[1]
        gathered, planes = step.gathered[:size], step.widened[:size]
        gather_pages(step.pool_planes, index, gathered.view(len(index), -1))
        if gathered.dtype != planes.dtype:
            planes.copy_(gathered)
        shape = (2, gather.sequences, config.kv_heads, -1, config.head_dim)
        keys, values = planes.view(shape)
        for product in gather.products:
            rows = slice(product.first, product.last)
            out[rows] = attend(
                queries[rows].view(gather.sequences, -1, *queries.shape[1:]),
                keys[:, :, : product.tokens],
                values[:, :, : product.tokens],
                product.mask,
                step.least,
            ).flatten(0, 1)
