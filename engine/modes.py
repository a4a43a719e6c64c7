"""What `kvist eval` compares: modes, and the model, the pages and the kernels that each means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvist.engine.config import EngineConfig
from kvist.engine.device.found import find_device
from kvist.engine.kv_dtype import is_float8
from kvist.engine.models.base import Model
from kvist.engine.models.build import kernels_of
from kvist.engine.models.llama import LlamaModel
from kvist.engine.opening import kv_dtype_of, open_backend
from kvist.engine.weights import LoadedModel, load_model
from kvist.kernels.narrow import FLOAT8, to_float8
from kvist.proto.errors import ConfigInvalid
from kvist.tiers.hbm import PagePool


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to compute, as the flags of `kvist serve` say it."""

    dtype: str
    quantization: str
    kv_cache_dtype: str = "auto"
    kv_cache_scale: float = 1.0


REFERENCE = Mode("float32", "none")
MODES = (
    Mode("bfloat16", "none"),
    Mode("bfloat16", "auto"),
    Mode("bfloat16", "int8"),
    Mode("bfloat16", "int4"),
)
DEVICE_MODES = (Mode("bfloat16", "none"), Mode("bfloat16", "none", "fp8"))


@dataclass(frozen=True, slots=True)
class Subject:
    """A mode, ready to compute.

    Attributes:
        loaded: weights and shape.
        model: computes.
        pool: pages of one window, in their order.
        kernels: "own", "torch" or "triton".
        quantization: what load_model was told.
        kv_dtype: what K and V are rounded to.
        rounding: for Model.forward as before_layer; makes the pages hold what float8 pages would,
            where no kernel reads such. None elsewhere.
    """

    loaded: LoadedModel
    model: Model
    pool: torch.Tensor
    kernels: str
    quantization: str
    kv_dtype: str
    rounding: Callable[[int], None] | None = None


def open_subject(config: EngineConfig, tokens: int) -> Subject:
    """Load and build what `kvist serve` would compute with.

    float8 pages on a processor, which no engine has, are computed all the same: K and V of each
    layer are rounded in wider pages before attention reads them, and the rest is torch's.

    Args:
        config: of the model and the mode.
        tokens: that the pages have room for.

    Raises:
        ConfigInvalid: the mode does not work here.
        ModelFilesError: the model cannot be loaded.
    """
    device = find_device(config.device)
    if device.host and is_float8(config.kv_cache_dtype):
        return _rounded(config, tokens)
    backend = open_backend(config)
    quantization = backend.quantization()
    loaded = load_model(config.model, backend.dtype, quantization=quantization)
    kv_dtype = kv_dtype_of(config, loaded)
    model = backend.build(loaded, kv_dtype)
    if device.host:
        kernels = "torch" if kernels_of(model, loaded) == "torch" else "own"
    else:
        kernels = "triton"
    format = loaded.block_format(config.block_tokens, kv_dtype)
    pool = PagePool(format, -(-tokens // config.block_tokens), backend.device.torch).tensor
    return Subject(loaded, model, pool, kernels, quantization, kv_dtype)


def _rounded(config: EngineConfig, tokens: int) -> Subject:
    if config.quantization not in ("auto", "none"):
        raise ConfigInvalid(
            f"--quantization {config.quantization}: devices, which alone have float8 pages, "
            "compute with bfloat16 and float32 weights; give --quantization none"
        )
    loaded = load_model(config.model, config.dtype)
    format = loaded.block_format(config.block_tokens, "float32")
    pool = PagePool(format, -(-tokens // config.block_tokens)).tensor
    scale = config.kv_cache_scale

    def rounding(layer: int) -> None:
        planes = pool[:, layer]
        planes.copy_(to_float8(planes, scale).float() * scale)

    name = str(FLOAT8).removeprefix("torch.")
    return Subject(loaded, LlamaModel(loaded), pool, "torch", "none", name, rounding)
