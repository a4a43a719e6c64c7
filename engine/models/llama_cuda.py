"""The Llama family on a CUDA device: kernels of kvist.kernels over pages on the device.

Without a device the same code runs in Triton's interpreter, which is how it is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from kvist.engine.models.base import Chunk, ModelConfig
from kvist.engine.weights import LoadedModel
from kvist.kernels.device.add_norm import add_rms_norm
from kvist.kernels.device.decode_attention import (
    SPLIT,
    DecodePlan,
    decode_attention,
    new_decode_plan,
)
from kvist.kernels.device.gate import silu_gate
from kvist.kernels.device.launch import RELEASE
from kvist.kernels.device.matmul import matmul
from kvist.kernels.device.paged import Paged
from kvist.kernels.device.prefill_attention import plan_prefill, prefill_attention
from kvist.kernels.device.rope_store import find_slots, rope_store
from kvist.kernels.rope import rope_table

# Attention of one layer: turned queries, number of the layer, where the result goes.
Attend = Callable[[torch.Tensor, int, torch.Tensor], None]
# Rows, weight, where the result goes if that is there already.
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def multiply_fast(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """What kernels.device.matmul does, by cuBLAS: a row's bits depend on how many there are."""
    return torch.mm(x, weight.T) if out is None else torch.mm(x, weight.T, out=out)


@dataclass(frozen=True, slots=True)
class Given:
    """Tokens of a step that only the device knows: the step before it has drawn them.

    Attributes:
        chunks: numbers of the chunks, each of one token.
        tokens: (chunks,), int64, on the device.
    """

    chunks: Sequence[int]
    tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """The weights of one decoder layer, (outputs, inputs); see llama.Layer."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def load_device_layer(
    tensors: Mapping[str, torch.Tensor], layer: int, device: torch.device
) -> DeviceLayer:
    """Put the weights of one layer on the device, named as in Hugging Face checkpoints."""

    def weight(*names: str) -> torch.Tensor:
        parts = [tensors[f"model.layers.{layer}.{name}.weight"].to(device) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return DeviceLayer(
        attention_norm=weight("input_layernorm"),
        qkv=weight("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out=weight("self_attn.o_proj"),
        mlp_norm=weight("post_attention_layernorm"),
        gate_up=weight("mlp.gate_proj", "mlp.up_proj"),
        down=weight("mlp.down_proj"),
    )


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What every layer of one forward pass shares; all on the device.

    Attributes:
        tokens: (rows,), int64.
        positions: (rows,), int64.
        slots: (rows,), int64, from kernels.device.rope_store.find_slots.
        paged: pool, tables and lengths of all sequences.
        attend: of a layer.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    paged: Paged
    attend: Attend


class CudaLlama:
    """A Model on a device.

    It keeps what base.Model promises by using one kernel with one tile for all rows, whether they
    are a prompt's or decode: a row's result then depends on its keys only. With fast, products
    are cuBLAS' and single rows attend with split keys; a row's result then depends on how many
    rows a step has, and on whether it was prefilled or decoded, as in other engines. Blocks of
    the two must not be exchanged: compute names which one it is.

    Args:
        loaded: weights and shape; its tensors can be dropped afterwards, and those that are on
            the device already are not copied.
        device: where to compute; the pool must be there too.
        fast: see above.
        kv_scale: of a float8 pool, see kernels.device.rope_store; 1 for others.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device: str = "cuda",
        *,
        fast: bool = False,
        kv_scale: float = 1.0,
    ) -> None:
        self.config: ModelConfig = loaded.config
        self.device = torch.device(device)
        self.fast = fast
        self.kv_scale = kv_scale
        tensors, layers = loaded.tensors, range(self.config.layers)
        self._embedding = tensors["model.embed_tokens.weight"].to(self.device)
        self._layers = [load_device_layer(tensors, layer, self.device) for layer in layers]
        self._norm = tensors["model.norm.weight"].to(self.device)
        tied = self.config.tie_embeddings
        self._head = self._embedding if tied else tensors["lm_head.weight"].to(self.device)
        self._table = rope_table(loaded.rope, device)
        self._multiply: Multiply = multiply_fast if fast else matmul

    def variant(self, *, fast: bool) -> CudaLlama:
        """A model of the same weights, which are not copied, that is fast or is not."""
        twin = copy.copy(self)
        twin.fast = fast
        twin._multiply = multiply_fast if fast else matmul
        return twin

    @property
    def compute(self) -> str:
        """What decides the bits of K and V besides the weights: a part of the namespace."""
        name = torch.cuda.get_device_name(self.device) if self._cuda else "interpreter"
        how = f"fast-{SPLIT}" if self.fast else "invariant"
        dtype = str(self._embedding.dtype).removeprefix("torch.")
        release = f"{RELEASE}/torch-{torch.__version__}"
        return f"{dtype}/{release}/{name}/{how}/scale-{self.kv_scale}"

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    @torch.inference_mode()
    def forward(
        self,
        chunks: Sequence[Chunk],
        pool: torch.Tensor,
        before_layer: Callable[[int], None] | None = None,
        given: Given | None = None,
    ) -> torch.Tensor:
        """Compute the chunks; the contract is Model's, but see fast.

        Args:
            chunks: see Model.
            pool: see Model.
            before_layer: called with each layer's number right before that layer's attention is
                launched, which is where a copy that it needs can be waited for on the device.
            given: tokens that stand in place of those that chunks have.
        """
        singles = sorted(range(len(chunks)), key=lambda i: len(chunks[i].tokens) > 1)
        ordered = [chunks[i] for i in singles]
        decodes = sum(len(chunk.tokens) == 1 for chunk in ordered) if self.fast else 0
        step = self._step(ordered, decodes, pool)
        ends = accumulate(len(chunk.tokens) for chunk in ordered)
        last_row = {i: end - 1 for i, end in zip(singles, ends, strict=True)}
        if given is not None and len(given.chunks):
            step.tokens[self._ids([last_row[i] for i in given.chunks])] = given.tokens
        hidden = self.run(step, before_layer)
        wanted = [last_row[i] for i, chunk in enumerate(chunks) if chunk.want_logits]
        if not wanted:
            return hidden.new_empty((0, self.config.vocab), dtype=torch.float32)
        return self.logits(hidden[self._ids(wanted)]).float()

    def run(
        self, step: DeviceStep, before_layer: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Compute all layers; see forward for before_layer.

        Returns:
            (rows, hidden): normalized, ready for logits.
        """
        config, eps = self.config, self.config.rms_eps
        rows = len(step.tokens)
        hidden = F.embedding(step.tokens, self._embedding)
        delta: torch.Tensor | None = None
        for number, layer in enumerate(self._layers):
            x = add_rms_norm(delta, hidden, layer.attention_norm, eps)
            projected = self._multiply(x, layer.qkv, None)
            queries = rope_store(
                projected, step.positions, self._table, step.paged, number, step.slots
            )
            attended = torch.empty_like(queries)
            if before_layer is not None:
                before_layer(number)
            step.attend(queries, number, attended)
            wide = attended.view(rows, config.heads * config.head_dim)
            x = self._multiply(wide, layer.out, None)
            x = add_rms_norm(x, hidden, layer.mlp_norm, eps)
            inner = silu_gate(self._multiply(x, layer.gate_up, None))
            delta = self._multiply(inner, layer.down, None)
        return add_rms_norm(delta, hidden, self._norm, eps)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Project rows that run returned: (rows, vocab), the dtype of the weights."""
        return self._multiply(hidden.contiguous(), self._head, out)

    def new_logits(self, rows: int) -> torch.Tensor:
        """Room for logits."""
        shape = (rows, self.config.vocab)
        return torch.empty(shape, dtype=self._head.dtype, device=self.device)

    def decode(
        self, tokens: torch.Tensor, paged: Paged, plan: DecodePlan | None, out: torch.Tensor
    ) -> None:
        """One token for each row of a persistent batch; nothing is read by the host.

        Args:
            tokens: (rows,), int64.
            paged: a row's length counts its token; rows of length 0 are computed for nothing and
                write nothing.
            plan: for these rows, if fast.
            out: (rows, vocab), see new_logits; the logits.
        """
        positions = (paged.lengths - 1).clamp(min=0).long()
        used = paged.lengths > 0
        rows = torch.arange(len(tokens), device=self.device)
        slots = find_slots(paged, torch.where(used, rows, -1), positions)
        if plan is not None:
            plan.cut(paged.lengths)
            attend: Attend = _decode_attend(paged, plan)
        else:
            covered = self._attend(paged, rows.int(), used.int(), len(tokens))

            def attend(queries: torch.Tensor, layer: int, out: torch.Tensor) -> None:
                # Unused rows are of no sequence: not what the memory held before.
                covered(queries, layer, out.zero_())

        self.logits(self.run(DeviceStep(tokens, positions, slots, paged, attend)), out)

    def _attend(
        self, paged: Paged, firsts: torch.Tensor, counts: torch.Tensor, rows: int
    ) -> Attend:
        """Attention of rows that may be several of a sequence."""
        plan = plan_prefill(firsts, counts, rows, self.config.heads, self.config.kv_heads)

        def attend(queries: torch.Tensor, layer: int, out: torch.Tensor) -> None:
            prefill_attention(queries, paged, layer, plan, out)

        return attend

    def _step(self, chunks: Sequence[Chunk], decodes: int, pool: torch.Tensor) -> DeviceStep:
        """Put a step's numbers on the device; the first chunks are single rows that decode."""
        block_tokens = pool.shape[4]
        ends = [chunk.start + len(chunk.tokens) for chunk in chunks]
        tables = _padded(
            [list(c.pages[: -(-e // block_tokens)]) for c, e in zip(chunks, ends, strict=True)]
        )
        counts = [len(chunk.tokens) for chunk in chunks]
        firsts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        numbers = [self._ids(part).int() for part in (ends, counts, firsts)]
        lengths, new, begins = numbers
        paged = Paged(pool, self._ids(tables).int(), lengths, self.kv_scale)
        rows = self._ids([i for i, count in enumerate(counts) for _ in range(count)])
        positions = self._ids([c.start + i for c in chunks for i in range(len(c.tokens))])
        tokens = self._ids([token for chunk in chunks for token in chunk.tokens])
        attends: list[Attend] = []
        if decodes:
            part = Paged(pool, paged.tables[:decodes], lengths[:decodes], self.kv_scale)
            plan = self.decode_plan(decodes, sum(ends[:decodes]))
            plan.cut(part.lengths)
            attends.append(_decode_attend(part, plan))
        if decodes < len(chunks):
            part = Paged(pool, paged.tables[decodes:], lengths[decodes:], self.kv_scale)
            attends.append(self._attend(part, begins[decodes:], new[decodes:], len(rows)))

        def attend(queries: torch.Tensor, layer: int, out: torch.Tensor) -> None:
            for one in attends:
                one(queries, layer, out)

        return DeviceStep(tokens, positions, find_slots(paged, rows, positions), paged, attend)

    def decode_plan(self, rows: int, keys: int) -> DecodePlan:
        """Room for decode steps of fast models, see kernels.device.decode_attention."""
        return new_decode_plan(rows, keys, self.config.heads, self.config.head_dim, self.device)

    def _ids(self, values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        host = torch.tensor(values, dtype=torch.int64)
        return host.pin_memory().to(self.device, non_blocking=True) if self._cuda else host


def _decode_attend(paged: Paged, plan: DecodePlan) -> Attend:
    """Attention of the first rows of a step, one for each sequence."""
    rows = len(paged.lengths)

    def attend(queries: torch.Tensor, layer: int, out: torch.Tensor) -> None:
        decode_attention(queries[:rows], paged, layer, plan, out[:rows])

    return attend


def _padded(pages: list[list[int]]) -> list[list[int]]:
    """Page tables as lines of one length; what is added is never read."""
    width = max(len(line) for line in pages)
    return [line + [0] * (width - len(line)) for line in pages]
