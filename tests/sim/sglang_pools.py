"""SGLang's own pools and cache controller on a machine without a GPU; needs SGLang."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
    HybridCacheController,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.runtime_context import get_parallel, publish
from sglang.srt.server_args import ServerArgs

from sim.sidecar import Sidecar

PAGE, PAGES, LAYERS = 16, 40, 3
BUDGET_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Pools:
    """SGLang's device pool (its tensors are in memory here) and its host pool."""

    device: Any
    host: Any


def make_pools(kind: str, layout: str) -> Pools:
    """Of "mha" or "mla", the host pool filled with noise."""
    sizes = {"size": PAGE * PAGES, "page_size": PAGE, "dtype": torch.bfloat16}
    common = {**sizes, "layer_num": LAYERS, "device": "cpu", "enable_memory_saver": False}
    with host_memory_budget_scope(BUDGET_BYTES):
        if kind == "mha":
            device = MHATokenToKVPool(head_num=2, head_dim=8, **common)
            info = device.get_device_pool_infos()[0].buffer_info
            host = get_mha_host_pool_cls(info)(info, 2.0, 0, PAGE, layout, **_rest(device))
        else:
            device = MLATokenToKVPool(kv_lora_rank=32, qk_rope_head_dim=16, **common)
            info = device.get_device_pool_infos()[0].buffer_info
            host = MLATokenToKVPoolHost(
                info, 2.0, 0, PAGE, layout, target_layer_num=LAYERS,
                override_kv_cache_dim=device.kv_cache_dim, **_rest(device),
            )  # fmt: skip
    host.kv_buffer.copy_(torch.randn(host.kv_buffer.shape))
    return Pools(device, host)


def _rest(device: Any) -> dict[str, Any]:
    return {
        "pin_memory": False, "device_capacity_tokens": device.size,
        "start_layer": device.start_layer, "end_layer": device.end_layer,
    }  # fmt: skip


def publish_arguments(model: Path) -> None:
    """This process is a scheduler, as far as SGLang's configuration goes."""
    arguments = ServerArgs(
        model_path=str(model), device="cpu", attention_backend="torch_native", page_size=PAGE,
        enable_hierarchical_cache=True, hicache_mem_layout="page_first_direct",
        hicache_io_backend="direct", skip_tokenizer_init=True,
    )  # fmt: skip
    publish(arguments, role="scheduler")
    get_parallel().override_permanently(tp_rank=0, pp_rank=0, attn_tp_rank=0, attn_dp_rank=0)


def make_controller(pools: Pools, sidecar: Sidecar) -> Any:
    """SGLang's own controller with the storage that its flags name; its threads run here."""
    allocator = PagedTokenToKVPoolAllocator(
        PAGE * PAGES, PAGE, torch.bfloat16, "cpu", pools.device, False
    )
    entry = PoolEntry(
        PoolName.KV, pools.host, pools.device, lambda layer: layer, is_primary_index_anchor=True
    )
    return HybridCacheController(
        allocator, HostPoolGroup([entry]), PAGE, None, load_cache_event=threading.Event(),
        io_backend="direct", storage_backend="dynamic", model_name="tiny",
        storage_backend_extra_config={
            "backend_name": "kvist", "module_path": "kvist.engine.plugins.sglang",
            "class_name": "KvistStorage", "interface_v1": 1, "kvist.cache": str(sidecar.socket),
        },
    )  # fmt: skip
