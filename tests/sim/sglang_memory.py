"""A host pool as SGLang lays it out, and the few of its classes that the plugin is written against.

The real ones are compared with these in tests/under_sglang.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from sim.sidecar import Sidecar

VERSION = "0.5.23"
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
PAGE, LAYERS, HEADS, DIM, PAGES = 16, 3, 2, 8, 12


class HostPool:
    """K and V of PAGES pages in one allocation, addressed as SGLang's MHATokenToKVPoolHost does.

    Args:
        layout: of LAYOUTS.
    """

    def __init__(self, layout: str = "page_first") -> None:
        self.layout = layout
        self.page_size, self.layer_num, self.head_num, self.head_dim = PAGE, LAYERS, HEADS, DIM
        self.size, self.page_num = PAGE * PAGES, PAGES
        self.dtype = torch.bfloat16
        self.dims = {
            "layer_first": (2, LAYERS, self.size, HEADS, DIM),
            "page_first": (2, self.size, LAYERS, HEADS, DIM),
            "page_first_direct": (2, PAGES, LAYERS, PAGE, HEADS, DIM),
            "page_head": (2, PAGES, HEADS, PAGE, LAYERS, DIM),
        }[layout]
        self.kv_buffer = torch.zeros(self.dims, dtype=self.dtype)

    def _page(self, index: int) -> torch.Tensor:
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, index : index + PAGE]
        if self.layout == "page_first":
            return self.kv_buffer[:, index : index + PAGE]
        return self.kv_buffer[:, index // PAGE : index // PAGE + 1]

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """A page, behind one another where flat."""
        page = self._page(index)
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Room for one."""
        return torch.zeros(2 * LAYERS * PAGE * HEADS * DIM, dtype=self.dtype)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Its reverse."""
        self._page(index).copy_(data_page.reshape(self._page(index).shape))

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Where the runs of pages are."""
        addresses = []
        for index in indices.tolist()[::PAGE]:
            page = self._page(index)
            parts = (
                [page[kind, layer] for layer in range(LAYERS) for kind in range(2)]
                if self.layout == "layer_first"
                else [page[kind] for kind in range(2)]
            )
            addresses += [part.data_ptr() for part in parts]
        whole = 2 * LAYERS * PAGE * HEADS * DIM * self.dtype.itemsize
        runs = 2 * LAYERS if self.layout == "layer_first" else 2
        return addresses, [whole // runs] * len(addresses)


class HiCacheStorage:
    """Of SGLang's base class what the plugin leaves to it."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Keep it."""
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Keep it."""

    def on_host_pools_registered(self) -> None:
        """Nothing."""


@dataclass
class HiCacheStorageConfig:
    """SGLang's fields that the plugin reads."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    is_mla_model: bool = False
    enable_storage_metrics: bool = True
    should_split_heads: bool = False
    extra_config: dict[str, Any] | None = None


@dataclass
class HiCacheStorageExtraInfo:
    """What a call says besides its keys."""

    prefix_keys: list[str] | None = None
    extra_info: dict[str, Any] | None = None


class PoolName(str, Enum):  # noqa: UP042  # as SGLang's
    """Two of SGLang's."""

    KV = "kv"
    INDEXER = "indexer"

    def __str__(self) -> str:
        return self.value


class PoolHitPolicy(str, Enum):  # noqa: UP042
    """SGLang's."""

    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    """SGLang's fields that the plugin reads."""

    name: PoolName
    host_indices: torch.Tensor | None = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    """SGLang's."""

    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


@dataclass
class StorageMetrics:
    """SGLang's."""

    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


STANDINS: dict[str, tuple[Any, ...]] = {
    "sglang.srt.mem_cache.hicache_storage": (
        HiCacheStorage, HiCacheStorageConfig, HiCacheStorageExtraInfo, PoolHitPolicy, PoolName,
        PoolTransfer, PoolTransferResult,
    ),
    "sglang.srt.observability.metrics_collector": (StorageMetrics,),
    "sglang.srt.runtime_context": (),
}  # fmt: skip


def _no_arguments() -> None:
    raise ValueError("Global server args is not set yet!")


@contextmanager
def standins() -> Iterator[None]:
    """An `sglang` of these classes, for as long as it is open."""
    made = {name: types.ModuleType(name) for name in STANDINS}
    for name, classes in STANDINS.items():
        for one in classes:
            setattr(made[name], one.__name__, one)
    made["sglang.srt.runtime_context"].get_server_args = _no_arguments  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.observability"):
        made[name] = types.ModuleType(name)
    made["sglang"].__version__ = VERSION  # type: ignore[attr-defined]
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in [*made, "kvist.engine.plugins.sglang.storage"]:
            sys.modules.pop(name, None)


def filled(pool: HostPool) -> HostPool:
    """Each page other than the next."""
    pool.kv_buffer.copy_(torch.randn(pool.dims))
    return pool


def chain(name: str, pages: int) -> list[str]:
    """Page hashes as SGLang makes them: each of its page and the hash before it."""
    hashes, before = [], b""
    for number in range(pages):
        before = hashlib.sha256(before + f"{name}/{number}".encode()).digest()
        hashes.append(before.hex())
    return hashes


def at(*pages: int) -> torch.Tensor:
    """Host indices of pages."""
    return torch.cat([torch.arange(number * PAGE, (number + 1) * PAGE) for number in pages])


def page(pool: HostPool, number: int) -> torch.Tensor:
    """A copy of a page."""
    return pool.get_data_page(number * PAGE).clone()


def make_storage(sidecar: Sidecar, pool: HostPool | None = None, **changes: Any) -> Any:
    """The plugin, inside standins(), with its pool.

    Args:
        changes: of HiCacheStorageConfig.
    """
    from kvist.engine.plugins.sglang import KvistStorage

    made = KvistStorage(make_config(sidecar, **changes), {})
    if pool is not None:
        made.register_mem_pool_host(pool)
        made.on_host_pools_registered()
    return made


def make_config(sidecar: Sidecar, **changes: Any) -> HiCacheStorageConfig:
    """What SGLang hands over."""
    extra = {"kvist.cache": str(sidecar.socket), "kvist.model": "tiny", "interface_v1": 1}
    return HiCacheStorageConfig(**{"extra_config": extra, **changes})
