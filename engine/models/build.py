"""Which model computes: kernels of our own where the processor has what they need, else torch's."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from kvist.engine.config import EngineConfig
from kvist.engine.models.base import Model, ModelConfig
from kvist.engine.models.llama import LlamaModel
from kvist.engine.weights import LoadedModel
from kvist.kernels.linear import best_cpu_dtype
from kvist.proto.errors import ConfigInvalid

if TYPE_CHECKING:
    from kvist.engine.models.llama_cpu import CpuLlama

# Changed whenever a kernel of kernels/cpu gives other bits: engines of two releases then share
# no blocks.
CPU_KERNELS = "kvist-avx512bf16-1"
# What the widths of a layer and a head must be multiples of.
WIDTH = 32


def missing_for_own_kernels() -> str:
    """What this machine lacks for kernels/cpu; "" if nothing."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "a processor with AVX-512 BF16"
    if importlib.util.find_spec("numba") is None:
        return "numba (pip install numba)"
    return ""


def own_kernels_refuse(config: ModelConfig, dtype: str, kv_dtype: str) -> str:
    """Why a model is left to torch; "" if it is not.

    Args:
        config: its shape.
        dtype: of the computation.
        kv_dtype: of K and V in the pool.
    """
    widths = (config.hidden, config.intermediate, config.head_dim)
    if missing := missing_for_own_kernels():
        return f"needs {missing}"
    if (dtype, kv_dtype) != ("bfloat16", "bfloat16"):
        return f"computes in bfloat16 with bfloat16 K and V, not in {dtype} with {kv_dtype}"
    if any(width % WIDTH for width in widths):
        return f"needs widths and heads in multiples of {WIDTH}, this model has {widths}"
    return ""


def quantization_of(config: EngineConfig) -> str:
    """What load_model is told for --quantization.

    Raises:
        ConfigInvalid: 4 or 8 bits were asked for and cannot be had here; checked before the load.
    """
    dtype = config.dtype
    if dtype == "auto":
        dtype = str(best_cpu_dtype()).removeprefix("torch.")
    kv_dtype = "bfloat16" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    missing = missing_for_own_kernels()
    if not missing and (dtype, kv_dtype) == ("bfloat16", "bfloat16"):
        return config.quantization
    if config.quantization in ("none", "auto"):
        return "none"
    what = f"needs {missing}" if missing else "computes in bfloat16 with bfloat16 K and V"
    raise ConfigInvalid(f"--quantization {config.quantization}: {what}; give --quantization none")


def build_model(config: EngineConfig, loaded: LoadedModel, kv_dtype: str) -> Model:
    """The model that `kvist serve` computes with.

    Raises:
        ConfigInvalid: 4 or 8 bits were asked for, and this model's shape does not allow them.
    """
    why = own_kernels_refuse(loaded.config, loaded.dtype, kv_dtype)
    if not why:
        return _own(loaded, config.threads)
    if config.quantization in ("int8", "int4"):
        raise ConfigInvalid(f"--quantization {config.quantization}: {why}")
    return LlamaModel(loaded)


def _own(loaded: LoadedModel, threads: int) -> CpuLlama:
    # Here and not at the top: numba is not installed everywhere.
    from kvist.engine.models.llama_cpu import CpuLlama

    # What is left to torch is the sampler, whose OpenMP threads would only get in the way.
    torch.set_num_threads(1)
    return CpuLlama(loaded, threads)


def kernels_of(model: Model, loaded: LoadedModel) -> str:
    """What computes, for people."""
    if isinstance(model, LlamaModel):
        return "torch"
    bits = {group.bits for group in loaded.groups.values()}
    kept = f"weights kept in {' and '.join(map(str, sorted(bits)))} bits" if bits else ""
    return ", ".join(filter(None, ("Kvist's own for AVX-512 BF16", kept)))


def compute_tag(model: ModelConfig, dtype: str, kv_dtype: str) -> str:
    """What decides the bits of K and V besides the weights, see Namespace.compute.

    Processors of another instruction set and other releases of torch round differently, so they
    share no blocks: an answer must not depend on who computed its prefix. Kernels of our own say
    their release; of torch they take the tables of the rotation.
    """
    if not own_kernels_refuse(model, dtype, kv_dtype):
        return f"{dtype}/{CPU_KERNELS}/torch-{torch.__version__}"
    return f"{dtype}/torch-{torch.__version__}/{torch.backends.cpu.get_cpu_capability()}"
