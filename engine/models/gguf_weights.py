"""Llama-family weights from a GGUF file: its names, its order of rows, its quantization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvist.engine.models.base import ModelConfig
from kvist.engine.models.files import ModelFilesError, take_count, take_number
from kvist.engine.models.gguf_file import GgufFile, GgufTensor, eos_ids
from kvist.engine.models.gguf_values import codes, dequantize
from kvist.engine.models.source import check_heads
from kvist.kernels.groups import Grouped
from kvist.kernels.rope import RopeParams

ARCHITECTURE = "llama"
ROPE_DIVISORS = "rope_freqs.weight"
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource:
    """A GGUF file of architecture llama; a TensorSource. Tensors are dequantized to float32.

    Raises:
        ModelFilesError: see the message.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = GgufFile(path)
        self._tensors = {_hf_name(name): tensor for name, tensor in file.tensors.items()}
        divisors = self._tensors.pop(ROPE_DIVISORS, None)
        self.config = _config(file.metadata, self._tensors, path)
        self.rope = _rope(file.metadata, self.config, divisors, path)

    def names(self) -> Iterable[str]:
        """Every tensor of the file, by its Hugging Face name."""
        return self._tensors.keys()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, float32."""
        tensor = self._tensors[name]
        try:
            values = dequantize(tensor)
        except NotImplementedError as error:
            raise ModelFilesError(f"{self.path}: tensor {name}: {error}") from error
        if name.endswith("q_proj.weight"):
            values = unpermute(values, self.config.heads)
        elif name.endswith("k_proj.weight"):
            values = unpermute(values, self.config.kv_heads)
        # torch warns of memory that it could write to and must not, as float32 in the file is.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def groups(self, name: str) -> Grouped | None:
        """Its codes, in the order of rows that read gives."""
        found = codes(self._tensors[name])
        heads = {"q_proj.weight": self.config.heads, "k_proj.weight": self.config.kv_heads}
        count = heads.get(".".join(name.split(".")[-2:]))
        if found is None or count is None:
            return found
        order = np.arange(len(found.codes), dtype=np.float32)[:, None]
        return found.rows(torch.from_numpy(unpermute(order, count)[:, 0].astype(np.int64)))


def unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's order of rows in Q and K, which rotates pairs (2i, 2i + 1).

    Args:
        weight: (heads * head_dim, inputs).
        heads: heads in its rows.

    Returns:
        Same shape; pairs are (i, i + head_dim / 2) again.
    """
    outputs, inputs = weight.shape
    pairs = weight.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return TOP_NAMES.get(name, name)


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, object], where: Path) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ModelFilesError(
            f"{where}: general.architecture {architecture!r} is not supported, only 'llama'"
        )
    heads = take_count(metadata, "llama.attention.head_count", where)
    hidden = take_count(metadata, "llama.embedding_length", where)
    rotated = take_count(metadata, "llama.rope.dimension_count", where, max(1, hidden // heads))
    head_dim = take_count(metadata, "llama.attention.key_length", where, rotated)
    if rotated != head_dim:
        raise ModelFilesError(
            f"{where}: llama.rope.dimension_count {rotated} must be the head size, {head_dim}"
        )
    if "llama.expert_count" in metadata:
        raise ModelFilesError(f"{where}: llama.expert_count: mixtures of experts are not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    config = ModelConfig(
        vocab=take_count(metadata, "llama.vocab_size", where, len(tokens or [])),
        layers=take_count(metadata, "llama.block_count", where),
        hidden=hidden,
        heads=heads,
        kv_heads=take_count(metadata, "llama.attention.head_count_kv", where, heads),
        head_dim=head_dim,
        intermediate=take_count(metadata, "llama.feed_forward_length", where),
        max_model_len=take_count(metadata, "llama.context_length", where),
        rms_eps=take_number(metadata, "llama.attention.layer_norm_rms_epsilon", where),
        rope_theta=take_number(metadata, "llama.rope.freq_base", where, 10000.0),
        tie_embeddings="lm_head.weight" not in tensors,
        eos_token_ids=eos_ids(metadata),
        name=ARCHITECTURE,
    )
    return check_heads(config, where)


def _rope(
    metadata: Mapping[str, Any],
    config: ModelConfig,
    divisors: GgufTensor | None,
    where: Path,
) -> RopeParams:
    scaling = metadata.get("llama.rope.scaling.type", "none")
    half = config.head_dim // 2
    if scaling not in ("none", "linear"):
        raise ModelFilesError(
            f"{where}: llama.rope.scaling.type {scaling!r} is not supported, "
            "only 'none' or 'linear'"
        )
    values = [1.0] * half
    if scaling == "linear":
        values = [take_number(metadata, "llama.rope.scaling.factor", where)] * half
    if divisors is not None:
        factors = dequantize(divisors)
        if factors.shape != (half,):
            raise ModelFilesError(
                f"{where}: tensor {ROPE_DIVISORS} has shape {factors.shape}, not {(half,)}"
            )
        values = [a * float(b) for a, b in zip(values, factors, strict=True)]
    kept = tuple(values) if any(value != 1.0 for value in values) else ()
    return RopeParams(config.rope_theta, config.head_dim, config.max_model_len, kept)
