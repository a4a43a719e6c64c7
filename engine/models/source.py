"""The contract between a checkpoint on disk and who loads it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from kvist.engine.models.base import ModelConfig
from kvist.engine.models.files import ModelFilesError
from kvist.kernels.groups import Grouped
from kvist.kernels.rope import RopeParams


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

    def groups(self, name: str) -> Grouped | None:
        """The codes of one of them, if it is stored in 4 or 8 bits; what read gives is from them.

        Returns:
            (outputs, inputs); None for a tensor that is stored otherwise.
        """
        ...


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
