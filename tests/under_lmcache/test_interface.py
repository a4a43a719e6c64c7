"""LMCache's L2 interface is the one that this plugin was written for: the next release breaks a
test here and not a user. Runs with LMCache's Python only (make test-lmcache)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="needs LMCache: make test-lmcache")

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import (
    PluginL2AdapterConfig,
    _create_plugin_adapter,
)
from lmcache.v1.memory_management import MemoryObjMetadata

from kvist.engine.plugins.common import check_version
from kvist.engine.plugins.lmcache import KvistL2Adapter
from kvist.engine.plugins.lmcache.adapter import SUPPORTED

SIGNATURES = {
    "close": (),
    "delete": ("keys",),
    "get_load_event_fd": (),
    "get_lookup_and_lock_event_fd": (),
    "get_store_event_fd": (),
    "get_usage": (),
    "list_l2_keys": ("model_name", "page_size", "cursor"),
    "pop_completed_store_tasks": (),
    "query_load_result": ("task_id",),
    "query_lookup_and_lock_result": ("task_id",),
    "register_listener": ("listener",),
    "report_status": (),
    "set_backend_identity": ("name", "shared"),
    "submit_load_task": ("keys", "objects"),
    "submit_lookup_and_lock_task": ("keys", "group_layout_descs"),
    "submit_store_task": ("keys", "objects"),
    "submit_unlock": ("keys",),
}
ABSTRACT = {
    "close", "get_load_event_fd", "get_lookup_and_lock_event_fd", "get_store_event_fd",
    "pop_completed_store_tasks", "query_load_result", "query_lookup_and_lock_result",
    "submit_load_task", "submit_lookup_and_lock_task", "submit_store_task", "submit_unlock",
}  # fmt: skip


def names(function: object) -> tuple[str, ...]:
    found = tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]
    return tuple(name for name in found if name not in ("self", "cls"))


def fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_the_installed_lmcache_is_a_supported_one() -> None:
    check_version("KvistL2Adapter", "LMCache", importlib.metadata.version("lmcache"), SUPPORTED)
    with pytest.raises(RuntimeError, match=r"tested with LMCache 0\.5\.6"):
        check_version("KvistL2Adapter", "LMCache", "0.6.0", SUPPORTED)


def test_the_interface_has_these_methods_and_no_others() -> None:
    methods = {
        name for name, one in vars(L2AdapterInterface).items()
        if inspect.isfunction(one) and not name.startswith("_")
    }  # fmt: skip
    assert methods == set(SIGNATURES)
    assert L2AdapterInterface.__abstractmethods__ == ABSTRACT
    assert not KvistL2Adapter.__abstractmethods__
    assert names(L2AdapterInterface._notify_keys_stored) == ("keys", "sizes")
    assert names(L2AdapterInterface._notify_keys_accessed) == ("keys",)


@pytest.mark.parametrize("method", sorted(SIGNATURES))
def test_signature_of(method: str) -> None:
    assert names(getattr(L2AdapterInterface, method)) == SIGNATURES[method]
    assert names(getattr(KvistL2Adapter, method)) == SIGNATURES[method]


def test_fields_that_are_read_of_lmcaches_objects_are_there_and_name_all_of_an_object() -> None:
    assert fields(ObjectKey) == {
        "chunk_hash", "model_name", "kv_rank", "object_group_id", "cache_salt",
    }  # fmt: skip
    assert {"shape", "dtype", "shapes", "dtypes"} <= fields(MemoryObjMetadata)
    assert fields(MemoryLayoutDesc) == {"shapes", "dtypes"}


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({}, r"kvist\.cache"),
        ({"kvist.cache": "/tmp/x", "kvist.chunk_tokens": 0}, "number of tokens"),
        ({"kvist.cache": "/tmp/x", "host": "a"}, r"\['host'\]; known are"),
    ],
)
def test_lmcaches_own_loader_finds_the_adapter_which_names_wrong_settings(
    params: dict[str, Any], word: str
) -> None:
    config = PluginL2AdapterConfig("kvist.engine.plugins.lmcache", "KvistL2Adapter", params)
    with pytest.raises(ValueError, match=word):
        _create_plugin_adapter(config)
