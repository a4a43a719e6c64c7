"""The contract between a checkpoint on disk and who loads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from kvist.engine.models.base import ModelConfig
from kvist.kernels.rope import RopeParams
from kvist.proto.errors import ConfigInvalid


class ModelFilesError(ConfigInvalid):
    """The files of --model are not one that this engine runs; the message says what and where."""


class TensorSource(Protocol):
    """An open checkpoint of the Llama family.

    Attributes:
        path: file or folder, for messages.
        config: shape of the model.
        rope: its rotary embedding.
    """

    path: Path
    config: ModelConfig
    rope: RopeParams

    def names(self) -> Iterable[str]:
        """Every tensor in the files, by its Hugging Face name."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One of them, on the CPU, in whatever dtype it is stored; raises ModelFilesError."""
        ...


def take_number(
    fields: Mapping[str, Any], name: str, where: Path, default: float | None = None
) -> float:
    """A positive number from a file's configuration.

    Raises:
        ModelFilesError: it is missing (and has no default), or is not a positive number.
    """
    value = fields.get(name)
    if value is None:
        value = default
    if value is None:
        raise ModelFilesError(f"{where}: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelFilesError(f"{where}: {name} must be a positive number, got {value!r}")
    return value


def take_count(
    fields: Mapping[str, Any], name: str, where: Path, default: int | None = None
) -> int:
    """Like take_number, for whole numbers."""
    value = take_number(fields, name, where, default)
    if value != int(value):
        raise ModelFilesError(f"{where}: {name} must be a whole number, got {value!r}")
    return int(value)


def check_heads(config: ModelConfig, where: Path) -> ModelConfig:
    """The configuration itself, if its heads fit together.

    Raises:
        ModelFilesError: they do not.
    """
    if config.heads % config.kv_heads:
        raise ModelFilesError(
            f"{where}: {config.heads} query heads are not a multiple of {config.kv_heads} KV heads"
        )
    if config.head_dim % 2:
        raise ModelFilesError(f"{where}: head size must be even, got {config.head_dim}")
    return config
