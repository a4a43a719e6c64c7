"""Checkpoints as Hugging Face saves them: config.json and safetensors, one file or shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvist.engine.models.base import ModelConfig
from kvist.engine.models.files import ModelFilesError, read_json, take_count, take_number
from kvist.engine.models.source import check_heads
from kvist.kernels.rope import RopeParams, llama3_divisors

ARCHITECTURES = ("llama", "mistral")
# Field -> values under which the model computes what engine/models/llama.py computes.
REQUIRED_VALUES: Mapping[str, tuple[object, ...]] = {
    "model_type": ARCHITECTURES,
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}


class FolderSource:
    """A folder with config.json and *.safetensors; a TensorSource.

    Raises:
        ModelFilesError: see the message.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config_path = path / "config.json"
        fields = read_json(config_path)
        _check_supported(fields, config_path)
        self.config = _config(fields, _eos_ids(path, fields), config_path)
        self.rope = _rope(fields, self.config, config_path)
        self._files = _tensor_files(path)

    def names(self) -> Iterable[str]:
        """Every tensor in the files."""
        return self._files.keys()

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFilesError(f"{file}: tensor {name} cannot be read: {error}") from error
        return tensor

    def groups(self, _name: str) -> None:
        """None: no quantized folder is supported."""
        return None


def _check_supported(fields: Mapping[str, Any], where: Path) -> None:
    for name, allowed in REQUIRED_VALUES.items():
        if fields.get(name) not in allowed:
            choices = " or ".join(repr(value) for value in allowed if value is not None)
            raise ModelFilesError(
                f"{where}: {name} {fields.get(name)!r} is not supported"
                + (f", only {choices}" if choices else "; it must be absent")
            )


def _config(fields: Mapping[str, Any], eos: tuple[int, ...], where: Path) -> ModelConfig:
    heads = take_count(fields, "num_attention_heads", where)
    hidden = take_count(fields, "hidden_size", where)
    config = ModelConfig(
        vocab=take_count(fields, "vocab_size", where),
        layers=take_count(fields, "num_hidden_layers", where),
        hidden=hidden,
        heads=heads,
        kv_heads=take_count(fields, "num_key_value_heads", where, heads),
        head_dim=take_count(fields, "head_dim", where, max(1, hidden // heads)),
        intermediate=take_count(fields, "intermediate_size", where),
        max_model_len=take_count(fields, "max_position_embeddings", where, 2048),
        rms_eps=take_number(fields, "rms_norm_eps", where, 1e-6),
        rope_theta=take_number(_rope_fields(fields), "rope_theta", where, 10000.0),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        eos_token_ids=eos,
        name=str(fields["model_type"]),
    )
    return check_heads(config, where)


def _rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters, before it were rope_theta and rope_scaling."""
    merged = {"rope_theta": fields.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(fields.get(name), dict):
            merged.update(fields[name])
    return merged


def _rope(fields: Mapping[str, Any], config: ModelConfig, where: Path) -> RopeParams:
    scaling = _rope_fields(fields)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    plain = RopeParams(config.rope_theta, config.head_dim, config.max_model_len)
    if kind == "default":
        return plain
    if kind == "linear":
        divisors = (take_number(scaling, "factor", where),) * (config.head_dim // 2)
    elif kind == "llama3":
        divisors = llama3_divisors(
            plain,
            take_number(scaling, "factor", where),
            take_number(scaling, "low_freq_factor", where),
            take_number(scaling, "high_freq_factor", where),
            take_count(scaling, "original_max_position_embeddings", where, config.max_model_len),
        )
    else:
        raise ModelFilesError(
            f"{where}: rope_type {kind!r} is not supported, only 'default', 'linear' or 'llama3'"
        )
    return RopeParams(config.rope_theta, config.head_dim, config.max_model_len, divisors)


def _eos_ids(path: Path, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens of config.json and, where there is one, of generation_config.json."""
    generation = path / "generation_config.json"
    sources = [fields, read_json(generation) if generation.exists() else {}]
    ids: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ModelFilesError(f"{path}: eos_token_id must be whole numbers, got {ids!r}")
    return tuple(sorted(set(ids)))


def _tensor_files(path: Path) -> dict[str, Path]:
    """File of every tensor: as the index says, or as the files themselves say."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelFilesError(f"{path}: has no *.safetensors")
        return {name: file for file in files for name in _keys(file)}
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ModelFilesError(f"{index}: weight_map is missing")
    for file in sorted(set(names.values())):
        if Path(file).name != file or not (path / file).exists():
            raise ModelFilesError(f"{index}: shard {file!r} is not in the folder")
    return {name: path / file for name, file in names.items()}


def _keys(file: Path) -> list[str]:
    if file.exists() and not os.access(file, os.R_OK):  # of which safetensors says "No such file"
        raise ModelFilesError(f"{file}: cannot be read: permission denied for this user")
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelFilesError(f"{file}: cannot be read: {error}") from error
