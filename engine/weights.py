"""Weights from disk: a Hugging Face folder of safetensors, a GGUF file, or the demo model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from kvist.engine.models.base import ModelConfig
from kvist.engine.models.files import ModelFilesError, model_path
from kvist.engine.models.gguf_weights import GgufSource
from kvist.engine.models.hf_folder import FolderSource
from kvist.engine.models.source import TensorSource
from kvist.kernels.groups import GROUP, Grouped, to_groups
from kvist.kernels.linear import best_cpu_dtype
from kvist.kernels.rope import RopeParams
from kvist.proto.layout import BlockFormat

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
        config: its shape.
        rope: its rotary embedding.
        dtype: "bfloat16" or "float32": of the tensors and of the computation.
        tensors: by Hugging Face name, contiguous, on the CPU.
        groups: 4 and 8-bit codes by the same names, of those weights that are to be kept in them;
            tensors has their values, rounded to dtype.
        fingerprint: 32 hex digits over the name, shape, dtype and bytes of every tensor and code,
            the config and the rope: KV of models with different fingerprints is never exchanged.
    """

    config: ModelConfig
    rope: RopeParams
    dtype: str
    tensors: Mapping[str, torch.Tensor]
    fingerprint: str
    groups: Mapping[str, Grouped] = field(default_factory=dict)

    def block_format(self, block_tokens: int, kv_dtype: str) -> BlockFormat:
        """Format of a block, and of a pool's page, for this model."""
        config = self.config
        return BlockFormat(config.layers, config.kv_heads, config.head_dim, kv_dtype, block_tokens)


def load_model(
    path: str | Path,
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    quantization: str = "none",
) -> LoadedModel:
    """Load a Llama-family model.

    Args:
        path: a folder with config.json and safetensors (one file, or shards with an index), a
            .gguf file (its weights are dequantized), or "demo".
        dtype: "bfloat16", "float32", or "auto" for what this processor computes faster.
        progress: called after each tensor with (tensors done, tensors in all).
        quantization: "none"; "auto" keeps the codes of weights that the file has in 4 or 8 bits;
            "int8" and "int4" round to so many bits in groups of 32, an output projection or
            embedding never to fewer than 8. Weights that have fewer bits already stay as they are.

    Raises:
        ModelFilesError: the files are not such a model; the message names the file and the field
            or the tensor, and what would be right.
    """
    torch_dtype = best_cpu_dtype() if dtype == "auto" else DTYPES.get(dtype)
    if torch_dtype is None:
        raise ModelFilesError(f"dtype must be auto or one of {sorted(DTYPES)}, got {dtype!r}")
    source = open_source(model_path(path))
    reader = _Reader(source, torch_dtype, quantization)
    tensors = _read_tensors(reader, progress or (lambda _done, _total: None))
    return LoadedModel(
        config=source.config,
        rope=source.rope,
        dtype=str(torch_dtype).removeprefix("torch."),
        tensors=tensors,
        fingerprint=fingerprint(source.config, source.rope, {**tensors, **_parts(reader.groups)}),
        groups=reader.groups,
    )


def open_source(path: Path) -> TensorSource:
    """Open a checkpoint and read its configuration, not yet its tensors."""
    return FolderSource(path) if path.is_dir() else GgufSource(path)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this shape has."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, inner = config.hidden, config.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab, hidden)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for number in range(config.layers):
        for name, shape in layer.items():
            shapes[f"model.layers.{number}.{name}.weight"] = shape
    return shapes


class _Reader:
    """Reads tensors as they are to be computed with.

    Attributes:
        source: the checkpoint.
        groups: of the tensors read so far.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype, quantization: str) -> None:
        self.source = source
        self.groups: dict[str, Grouped] = {}
        self._dtype = dtype
        self._quantization = quantization

    def read(self, name: str) -> torch.Tensor:
        """One tensor; its codes are put into groups if they are to be kept."""
        tensor = self.source.read(name)
        if self._quantization == "none" or tensor.ndim != 2 or tensor.shape[1] % GROUP:
            return tensor.to(self._dtype).contiguous()
        found = self.source.groups(name)
        if bits := {"int8": 8, "int4": 4}.get(self._quantization):
            bits = 8 if "_proj" not in name else bits
            if found is None or found.bits > bits:
                found = to_groups(tensor, bits)
                tensor = found.values()
        if found is not None:
            self.groups[name] = found
        return tensor.to(self._dtype).contiguous()


def _read_tensors(reader: _Reader, progress: Callable[[int, int], None]) -> dict[str, torch.Tensor]:
    source = reader.source
    expected = tensor_shapes(source.config)
    # Files of models with tied embeddings may hold the tied copy, and old ones their frequencies.
    found = {
        name
        for name in source.names()
        if not name.endswith("rotary_emb.inv_freq")
        and not (name == "lm_head.weight" and source.config.tie_embeddings)
    }
    if missing := sorted(expected.keys() - found):
        raise ModelFilesError(f"{source.path}: tensor {missing[0]} is missing{_more(missing)}")
    if extra := sorted(found - expected.keys()):
        raise ModelFilesError(
            f"{source.path}: tensor {extra[0]} is not part of a Llama model{_more(extra)}"
        )
    tensors = {}
    for done, (name, shape) in enumerate(expected.items(), start=1):
        tensor = reader.read(name)
        if tuple(tensor.shape) != shape:
            raise ModelFilesError(
                f"{source.path}: tensor {name} has shape {tuple(tensor.shape)}, "
                f"the configuration asks for {shape}"
            )
        tensors[name] = tensor
        progress(done, len(expected))
    return tensors


def _parts(groups: Mapping[str, Grouped]) -> dict[str, torch.Tensor]:
    """Codes, scales and offsets, each by a name of its own."""
    parts = {f"{name} codes": group.codes for name, group in groups.items()}
    parts |= {f"{name} scales": group.scales for name, group in groups.items()}
    return parts | {
        f"{name} offsets": group.offsets
        for name, group in groups.items()
        if group.offsets is not None
    }


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def fingerprint(config: ModelConfig, rope: RopeParams, tensors: Mapping[str, torch.Tensor]) -> str:
    """xxh3_128 over the configuration and every tensor, in the order of their names."""
    digest = xxhash.xxh3_128()
    digest.update(repr((dataclasses.asdict(config), dataclasses.asdict(rope))).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
