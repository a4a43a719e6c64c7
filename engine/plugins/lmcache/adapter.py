"""The adapter itself: LMCache's tasks and event descriptors over objects in the cache.

    lmcache server ... --l2-adapter '{"type": "plugin",
        "module_path": "kvist.engine.plugins.lmcache", "class_name": "KvistL2Adapter",
        "adapter_params": {"kvist.cache": "/run/kvist/kvistd.sock"}}'

LMCache keeps its own DRAM (L1) above it; Kvist's DRAM and flash are its L2. Nothing is locked for a
load: what was evicted since its look-up is a miss of that load, which LMCache asks every adapter to
be ready for. What is evicted Kvist decides, so `delete` does nothing and no usage is reported.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface, L2TaskId
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.log import Log, debug_detail
from kvist.engine.plugins.common import check_version
from kvist.engine.plugins.lmcache.objects import ObjectStore, Piece
from kvist.proto.keys import Namespace

SUPPORTED = ("0.5.6",)
"""Releases of LMCache whose interface this plugin was tested with."""

ADDRESS, WORDS, CHUNK = "kvist.cache", "kvist.namespace", "kvist.chunk_tokens"
CHUNK_TOKENS = 256
# A sidecar that is there answers in milliseconds; one that is not comes when it comes.
ATTACH_WAIT_S = 2.0


class KvistL2Adapter(L2AdapterInterface):  # type: ignore[misc]  # LMCache is not there to check
    """See the top of the file; the methods are LMCache's, in L2AdapterInterface's words.

    Args:
        params: adapter_params. l1_memory_desc: of LMCache's own memory, not needed.

    Raises:
        RuntimeError: a release of LMCache that was not tested.
        ValueError: a wrong setting; the message says which.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()
        del l1_memory_desc
        check_version("KvistL2Adapter", "LMCache", importlib.metadata.version("lmcache"), SUPPORTED)
        self._address, words, chunk = _settings(params)
        self._log = Log(sys.stderr, detail=debug_detail("engine", os.environ))
        self._objects = ObjectStore(self._connect, words, chunk, self._log)
        self._store_fd, self._find_fd, self._load_fd = (create_event_notifier() for _ in range(3))
        self._lock = threading.Lock()
        self._next = 0
        self._stored: dict[L2TaskId, L2StoreResult] = {}
        self._found: dict[L2TaskId, Bitmap] = {}
        self._loaded: dict[L2TaskId, Bitmap] = {}

    def _connect(self, namespace: Namespace) -> CacheClient:
        name = f"lmcache-{namespace.format.payload_bytes}-{os.getpid()}"
        client = open_cache(self._address, namespace, name, self._log)
        if not client.wait_attached(ATTACH_WAIT_S):
            self._log.warning("no cache yet, serving without", address=self._address)
        return client

    def get_store_event_fd(self) -> int:
        """Told of the end of each store."""
        return int(self._store_fd.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Told of the end of each look-up."""
        return int(self._find_fd.fileno())

    def get_load_event_fd(self) -> int:
        """Told of the end of each load."""
        return int(self._load_fd.fileno())

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        """Store objects, one copy each."""
        task, pieces = self._task(), _pieces(keys, objects)

        def done(ok: bool, new: list[Piece]) -> None:
            sizes = [piece.data.nbytes for piece in new]
            with self._lock:
                self._stored[task] = L2StoreResult(ok, sum(sizes))
            self._store_fd.notify()
            if new:
                self._notify_keys_stored([piece.key for piece in new], sizes)

        self._objects.store(pieces, done)
        return task

    def pop_completed_store_tasks(self) -> dict[L2TaskId, L2StoreResult]:
        """Stores that ended since the last call."""
        with self._lock:
            stored, self._stored = self._stored, {}
        return stored

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> L2TaskId:
        """Look objects up; those on flash begin to rise."""
        task = self._task()

        def done(found: list[bool]) -> None:
            with self._lock:
                self._found[task] = _bitmap(found)
            self._find_fd.notify()
            there = [key for key, has in zip(keys, found, strict=True) if has]
            if there:
                self._notify_keys_accessed(there)

        self._objects.find(keys, _sizes(group_layout_descs), done)
        return task

    def query_lookup_and_lock_result(self, task_id: L2TaskId) -> Bitmap | None:
        """The end of a look-up, once."""
        with self._lock:
            return self._found.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Nothing: see the top of the file."""

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        """Copy objects into LMCache's memory, one copy each, and verify them there."""
        task, pieces = self._task(), _pieces(keys, objects)

        def done(came: list[bool]) -> None:
            with self._lock:
                self._loaded[task] = _bitmap(came)
            self._load_fd.notify()

        self._objects.load(pieces, done)
        return task

    def query_load_result(self, task_id: L2TaskId) -> Bitmap | None:
        """The end of a load, once."""
        with self._lock:
            return self._loaded.pop(task_id, None)

    def _task(self) -> L2TaskId:
        with self._lock:
            self._next += 1
            return self._next - 1

    def get_usage(self) -> AdapterUsage:
        """None: Kvist evicts by itself, within its own limits and quotas; see its /metrics."""
        return AdapterUsage(total_bytes_used=0, total_capacity_bytes=0)

    def report_status(self) -> dict[str, Any]:
        """For LMCache's status page."""
        state = self._objects.state
        return {
            "is_healthy": state != "detached",
            "type": type(self).__name__,
            "address": self._address,
            "state": state,
        }

    def close(self) -> None:
        """End what is under way, detach."""
        self._objects.close()
        for notifier in (self._store_fd, self._find_fd, self._load_fd):
            notifier.close()


def _settings(params: dict[str, Any]) -> tuple[str, str, int]:
    """Raises: ValueError: a setting is missing or wrong."""
    unknown = set(params) - {ADDRESS, WORDS, CHUNK}
    if unknown:
        raise ValueError(
            f"KvistL2Adapter: adapter_params has {sorted(unknown)}; known are "
            f"{ADDRESS}, {WORDS} and {CHUNK}"
        )
    if not params.get(ADDRESS):
        raise ValueError(
            f'KvistL2Adapter: adapter_params["{ADDRESS}"] is missing; give the path of the '
            "sidecar's socket, like /run/kvist/kvistd.sock"
        )
    chunk = params.get(CHUNK, CHUNK_TOKENS)
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f'KvistL2Adapter: adapter_params["{CHUNK}"] is a number of tokens, >= 1')
    return str(params[ADDRESS]), str(params.get(WORDS, "")), chunk


def _pieces(keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> list[Piece]:
    return [
        Piece(key, _layout(one.metadata), np.frombuffer(one.byte_array, np.uint8))
        for key, one in zip(keys, objects, strict=True)
    ]


def _layout(meta: Any) -> str:
    shapes = meta.shapes or [meta.shape]
    dtypes = meta.dtypes or [meta.dtype]
    return " ".join(f"{dtype}{tuple(shape)}" for dtype, shape in zip(dtypes, shapes, strict=True))


def _sizes(layouts: dict[int, MemoryLayoutDesc]) -> list[int]:
    """Bytes of the objects of each group; a group that says nothing has none."""
    sizes = {
        sum(shape.numel() * dtype.itemsize for shape, dtype in zip(
            one.shapes, one.dtypes, strict=True
        ))
        for one in layouts.values()
    }  # fmt: skip
    return sorted(size for size in sizes if size)


def _bitmap(flags: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(flags))
    for at, flag in enumerate(flags):
        if flag:
            bitmap.set(at)
    return bitmap
