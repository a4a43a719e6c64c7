"""The storage itself: SGLang's calls, handed to the pages of the pool they are about.

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "kvist", "interface_v1": 1,
        "module_path": "kvist.engine.plugins.sglang", "class_name": "KvistStorage",
        "hicache_storage_pass_prefix_keys": true, "kvist.cache": "/run/kvist/kvistd.sock"}'

SGLang makes one of these in each rank's scheduler. Nothing here raises once SGLang serves, but
clear: what cannot be had is a page that is not there.
"""

# SGLang calls some methods with more than this plugin needs.
# ruff: noqa: ARG002

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sglang
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.observability.metrics_collector import StorageMetrics

from kvist.cachesvc.client import open_cache
from kvist.cachesvc.log import Log, debug_detail
from kvist.engine.plugins.common import HashNames, check_version
from kvist.engine.plugins.sglang.identity import (
    ADDRESS,
    SUPPORTED,
    argument_words,
    model_name,
    namespace_of,
    page_identity,
    settings_of,
    sglang_arguments,
)
from kvist.engine.plugins.sglang.memory import (
    LayoutRefused,
    PageMemory,
    ScratchPage,
    flat_bytes,
    map_pool,
    page_numbers,
    try_memory,
)
from kvist.engine.plugins.sglang.pages import PageStore
from kvist.proto.record import Bytes

# A sidecar that is there answers in milliseconds; one that is not comes when it comes.
ATTACH_WAIT_S = 2.0


class KvistStorage(HiCacheStorage):  # type: ignore[misc]  # SGLang is not there to check
    """See the top of the file; the methods are SGLang's, in HiCacheStorage's words.

    Raises:
        RuntimeError: a release of SGLang that was not tested.
        ValueError: a setup that is not served, or a wrong setting; the message says which.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        check_version("KvistStorage", "SGLang", sglang.__version__, SUPPORTED)
        self._config = storage_config
        self._settings = settings_of(storage_config)
        self._log = Log(sys.stderr, detail=debug_detail("engine", os.environ))
        if not self._settings.get("interface_v1"):
            self._log.warning("every page is copied twice", fix='set "interface_v1": 1')
        arguments = sglang_arguments()
        self._model = model_name(self._settings, arguments)
        self._words = {"engine": f"sglang-{sglang.__version__}", **argument_words(arguments)}
        self._pools: dict[str, _Pool] = {}
        self._warned = False
        self._metrics_lock = threading.Lock()
        self._metrics = StorageMetrics()

    # Pools.

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of KV pages: find its pages in memory, try them, attach. See _register."""
        super().register_mem_pool_host(mem_pool_host)
        self._register(mem_pool_host, str(PoolName.KV))

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """The same for each pool of a model that has several, the one of KV again among them."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(host_pool, str(host_pool_name))

    def _register(self, host_pool: Any, name: str) -> None:
        """Raises: ValueError: its pages cannot be served."""
        known = self._pools.get(name)
        if known is not None and known.host is host_pool:
            return
        try:
            memory = map_pool(host_pool)
            try_memory(host_pool, memory)
            namespace = namespace_of(
                self._config, host_pool, name, memory, self._model, self._words
            )
        except (LayoutRefused, ValueError) as error:
            raise ValueError(
                f"KvistStorage: the host pool {name!r} ({type(host_pool).__name__}, layout "
                f"{getattr(host_pool, 'layout', None)}) is not served: {error}"
            ) from error
        if known is not None:
            known.pages.close()
        page = ScratchPage(memory, namespace.format)
        client_name = f"sglang-{name}-{os.getpid()}"
        cache = open_cache(self._settings[ADDRESS], namespace, client_name, self._log, page)
        if not cache.wait_attached(ATTACH_WAIT_S):
            self._log.warning("no cache yet, serving without", address=self._settings[ADDRESS])
        tokens = host_pool.page_size if name == PoolName.KV else 0
        pages = PageStore(cache, HashNames(namespace), tokens, self._log)
        self._pools[name] = _Pool(host_pool, memory, pages)
        self._log.info(
            "kvist under sglang", pool=name, layout=host_pool.layout, rows=memory.rows,
            page_bytes=memory.payload_bytes, pages=memory.count, model=namespace.model,
        )  # fmt: skip

    # Pages of KV.

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many pages are there, from the first; those on flash begin to rise."""
        return self._kv.pages.leading([page_identity(key) for key in keys])

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Bring pages into the pool."""
        return self._get(self._kv, keys, host_indices)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Take pages out of the pool."""
        return self._set(self._kv, keys, host_indices, self._before(extra_info))

    @property
    def _kv(self) -> _Pool:
        return self._pools[str(PoolName.KV)]

    def _get(self, pool: _Pool, keys: Sequence[str], indices: torch.Tensor | None) -> list[bool]:
        outs = self._places(pool, keys, indices)
        if outs is None:
            return [False] * len(keys)
        started = time.monotonic()
        came = pool.pages.load([page_identity(key) for key in keys], outs)
        self._note("prefetch", sum(came), pool, started)
        return came

    def _set(
        self,
        pool: _Pool,
        keys: Sequence[str],
        indices: torch.Tensor | None,
        before: list[bytes] | None,
    ) -> list[bool]:
        payloads = self._places(pool, keys, indices)
        if payloads is None:
            return [False] * len(keys)
        started = time.monotonic()
        stored = pool.pages.store([page_identity(key) for key in keys], payloads, before)
        self._note("backup", sum(stored), pool, started)
        return stored

    def _places(
        self, pool: _Pool, keys: Sequence[str], indices: torch.Tensor | None
    ) -> list[Bytes] | None:
        """Where pages lie; None when SGLang's indices are not pages."""
        try:
            found = [] if indices is None else indices.tolist()
            numbers = page_numbers(found, pool.host.page_size, pool.memory.count)
            if len(numbers) != len(keys):
                raise ValueError(f"{len(numbers)} pages for {len(keys)} keys")
        except ValueError as error:
            self._log.error("pages not copied", reason=str(error))
            return None
        return [pool.memory.page(number) for number in numbers]

    def _before(self, extra_info: HiCacheStorageExtraInfo | None) -> list[bytes] | None:
        """Hashes of the pages that stand before a call's own."""
        if extra_info is None or extra_info.prefix_keys is None:
            if not self._warned:
                self._warned = True
                self._log.warning(
                    "SGLang does not say what stands before a page, so eviction cannot tell the "
                    "ends of prompts from their beginnings",
                    fix='set "hicache_storage_pass_prefix_keys": true',
                )
            return None
        # Of the pages before, only the last one's name is needed, and how many there are.
        last = extra_info.prefix_keys[-1:]
        return [b""] * (len(extra_info.prefix_keys) - 1) + [page_identity(key) for key in last]

    # Pages of several pools.

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """How many pages are there in every pool that has to have them."""
        found = self.batch_exists(keys, extra_info)
        hits: dict[str, int] = {PoolName.KV: found} if found else {}
        lengths = list(range(1, found + 1))
        for transfer in pool_transfers or []:
            if transfer.name == PoolName.KV or not lengths:
                continue
            pages = [page_identity(key) for key in keys[:found]]
            has = self._pools[str(transfer.name)].pages.present(pages)
            kept = _usable_lengths(transfer, has)
            if kept:
                hits[transfer.name] = max(kept)
            lengths = [length for length in lengths if length in kept]
        return PoolTransferResult(lengths[-1] if lengths else 0, hits, lengths)

    def batch_get_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        """Bring pages into their pools."""
        return {
            one.name: self._get(self._pools[str(one.name)], one.keys or [], one.host_indices)
            for one in transfers
        }

    def batch_set_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        """Take pages out of their pools."""
        before = self._before(extra_info)
        return {
            one.name: self._set(
                self._pools[str(one.name)], one.keys or [], one.host_indices, before
            )
            for one in transfers
        }

    # Single pages, without a host pool's place for them: SGLang's calls without interface_v1.

    def get(
        self,
        key: str,
        target_location: Any | None = None,
        target_sizes: Any | None = None,
    ) -> torch.Tensor | None:
        """A page into a tensor of its size; None when it is not there."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> list[torch.Tensor | None]:
        """The same for many; those behind one that is not there are not tried."""
        targets = target_locations or [self._kv.host.get_dummy_flat_data_page() for _ in keys]
        outs = [_target_bytes(target, self._kv.memory.payload_bytes) for target in targets]
        came = self._kv.pages.load([page_identity(key) for key in keys], outs)
        return [target if has else None for target, has in zip(targets, came, strict=True)]

    def set(
        self,
        key: str,
        value: Any | None = None,
        target_location: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Store a page; what stands before it is not said."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Store consecutive pages; whether all of them are cached now."""
        size = self._kv.memory.payload_bytes
        payloads = [flat_bytes(value) for value in values or []]
        if len(payloads) != len(keys) or any(one.nbytes != size for one in payloads):
            raise ValueError(f"batch_set: wants a tensor of {size} bytes for each key")
        pages = [page_identity(key) for key in keys]
        return all(self._kv.pages.store(pages, payloads, self._before(None)))

    def exists(self, key: str) -> bool:
        """Whether a page is there."""
        return self._kv.pages.present([page_identity(key)])[0]

    # The whole.

    def clear(self) -> None:
        """Drop every page of this model and setup from all tiers, also those of other engines.

        Raises: Detached: there is no sidecar to tell, so that SGLang says that it failed.
        """
        for pool in self._pools.values():
            self._log.info("cleared", pages=pool.pages.clear())

    def get_stats(self) -> StorageMetrics:
        """Pages and GB/s of the calls since the last one, for SGLang's /metrics."""
        with self._metrics_lock:
            metrics, self._metrics = self._metrics, StorageMetrics()
        return metrics

    def _note(self, what: str, pages: int, pool: _Pool, started: float) -> None:
        if self._config.enable_storage_metrics and pages:
            seconds = max(time.monotonic() - started, 1e-9)
            with self._metrics_lock:
                getattr(self._metrics, f"{what}_pgs").append(pages)
                rate = pages * pool.memory.payload_bytes / seconds / 1e9
                getattr(self._metrics, f"{what}_bandwidth").append(rate)

    def close(self) -> None:
        """Detach; SGLang's threads have ended."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.pages.close()


@dataclass(frozen=True, slots=True)
class _Pool:
    """A host pool of SGLang and its pages in the cache."""

    host: Any
    memory: PageMemory
    pages: PageStore


def _usable_lengths(transfer: PoolTransfer, has: Sequence[bool]) -> set[int]:
    """Prefix lengths, in pages, for which a pool has what its policy wants.

    Raises: ValueError: a policy that is not served; SGLang then takes the look-up for a miss.
    """
    if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
        return set(range(1, (list(has).index(False) if False in has else len(has)) + 1))
    if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
        tail = max(1, len(transfer.keys or ()))
        return {end for end in range(1, len(has) + 1) if all(has[max(0, end - tail) : end])}
    raise ValueError(f"KvistStorage: pool {transfer.name}: policy {transfer.hit_policy}")


def _target_bytes(target: torch.Tensor, size: int) -> Bytes:
    if not target.is_contiguous() or target.nbytes != size:
        raise ValueError(f"batch_get: wants a contiguous tensor of {size} bytes for each key")
    return flat_bytes(target)
