"""What stands in for CUDA-only parts of SGLang, so that its engine runs on a CPU. For tests only.

* The names of torchvision's compiled operators: its wheel is for CUDA, and transformers only wants
  them to be known.
* vLLM's kernel for rotary positions, which SGLang takes where there is no GPU: in torch.
* The kernels that copy between device and host pool, and the pinning of the latter: in torch, and
  not at all. Both pools are in the same memory here.

Everything else is SGLang's: scheduler, radix tree, cache controller, host pools, storage threads.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_KEPT: list[Any] = []


def declare_vision() -> None:
    """Before SGLang is imported; does nothing where torchvision's own operators load."""
    found = importlib.util.find_spec("torchvision")
    assert found is not None
    assert found.origin is not None
    try:
        for path in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(path)
            return
    except OSError:
        pass
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


def stand_in() -> None:
    """Before an engine is made, in each of its processes."""
    kernels = types.ModuleType("vllm._custom_ops")
    kernels.rotary_embedding = _rotate  # type: ignore[attr-defined]
    sys.modules["vllm._custom_ops"] = kernels
    from sglang.srt.mem_cache.pool_host import base, common, mha

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
    common._cuda_host_register = _nothing
    base._cuda_host_unregister = mha._cuda_host_unregister = _nothing
    mha.transfer_kv_all_layer_direct_lf_pf = _device_to_host
    mha.transfer_kv_per_layer_direct_pf_lf = _host_to_device


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _rotate(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, head_size: int,
    cos_sin: torch.Tensor, is_neox: bool,
) -> None:  # fmt: skip
    cos, sin = (one.unsqueeze(1).float() for one in cos_sin[positions.flatten()].chunk(2, -1))
    assert is_neox
    half = cos.shape[-1]
    for tensor in (query, key):
        heads = tensor.view(tensor.shape[0], -1, head_size)
        one, two = heads[..., :half].float(), heads[..., half : 2 * half].float()
        heads[..., :half] = (one * cos - two * sin).to(heads.dtype)
        heads[..., half : 2 * half] = (two * cos + one * sin).to(heads.dtype)


def _device_to_host(
    src_ptrs: Sequence[torch.Tensor], dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor, dst_indices: torch.Tensor, page_size: int,
) -> None:  # fmt: skip
    """All layers of K, then of V, into a page_first_direct host pool."""
    layers, pages = len(src_ptrs) // 2, dst_indices[::page_size] // page_size
    for at, source in enumerate(src_ptrs):
        rows = source[src_indices].view(-1, page_size, *source.shape[1:])
        dst_ptrs[at // layers][pages, at % layers] = rows


def _host_to_device(
    src_ptrs: Sequence[torch.Tensor], dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor, dst_indices: torch.Tensor, layer_id: int, page_size: int,
) -> None:  # fmt: skip
    """One layer of K and of V, out of it."""
    pages = src_indices[::page_size] // page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[pages, layer_id].flatten(0, 1)
