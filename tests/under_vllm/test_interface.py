"""vLLM's connector interface is the one that this plugin was written for: the next release breaks
a test here and not a user. Runs with vLLM's Python only (make test-vllm)."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from kvist.engine.plugins.vllm import KvistConnector  # noqa: E402
from kvist.engine.plugins.vllm.identity import SUPPORTED, check_version  # noqa: E402

SIGNATURES = {
    "__init__": ("vllm_config", "role", "kv_cache_config"),
    "bind_connector_metadata": ("connector_metadata",),
    "build_connector_meta": ("scheduler_output",),
    "build_connector_worker_meta": (),
    "build_kv_connector_stats": ("data",),
    "build_prom_metrics": (
        "vllm_config", "metric_types", "labelnames", "per_engine_labelvalues",
    ),
    "clear_connector_metadata": (),
    "get_block_ids_with_load_errors": (),
    "get_external_cache_hit_sources": ("request", "num_external_tokens"),
    "get_finished": ("finished_req_ids",),
    "get_handshake_metadata": (),
    "get_kv_connector_stats": (),
    "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "handle_preemptions": ("kv_connector_metadata",),
    "on_new_request": ("request",),
    "register_kv_caches": ("kv_caches",),
    "request_finished": ("request", "block_ids"),
    "reset_cache": (),
    "save_kv_layer": ("layer_name", "kv_layer", "attn_metadata", "kwargs"),
    "set_xfer_handshake_metadata": ("metadata",),
    "shutdown": (),
    "start_load_kv": ("forward_context", "kwargs"),
    "update_connector_output": ("connector_output",),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "wait_for_layer_load": ("layer_name",),
    "wait_for_save": (),
}  # fmt: skip
ABSTRACT = {
    "build_connector_meta", "get_num_new_matched_tokens", "save_kv_layer", "start_load_kv",
    "update_state_after_alloc", "wait_for_layer_load", "wait_for_save",
}  # fmt: skip


def names(function: object) -> tuple[str, ...]:
    found = tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]
    return tuple(name for name in found if name not in ("self", "cls"))


def test_the_installed_vllm_is_a_supported_one() -> None:
    check_version(vllm.__version__)


def test_another_vllm_is_refused_with_the_supported_ones_named() -> None:
    with pytest.raises(RuntimeError, match=SUPPORTED[0]):
        check_version("0.99.1")


@pytest.mark.parametrize("method", sorted(SIGNATURES))
def test_signature_of(method: str) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    assert names(getattr(KVConnectorBase_V1, method)) == SIGNATURES[method]
    assert names(getattr(KvistConnector, method)) == SIGNATURES[method]


def test_nothing_abstract_is_left_out() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

    assert KVConnectorBase_V1.__abstractmethods__ == ABSTRACT
    assert not KvistConnector.__abstractmethods__
    assert names(SupportsHMA.request_finished_all_groups) == ("request", "block_ids")


def test_vllms_own_factory_finds_the_connector_by_the_flag() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    config = SimpleNamespace(
        kv_connector="KvistConnector", kv_connector_module_path="kvist.engine.plugins.vllm"
    )
    assert KVConnectorFactory.get_connector_class(config) is KvistConnector
    assert KVConnectorFactory.supports_hma_config(config)


def test_fields_that_are_read_of_vllms_objects_are_there() -> None:
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheTensor
    from vllm.v1.outputs import KVConnectorOutput

    def fields(kind: type) -> set[str]:
        return set(kind.__dataclass_fields__)

    assert {"num_scheduled_tokens", "kv_connector_block_state"} <= fields(SchedulerOutput)
    assert names(KVConnectorBlockState.get_block_ids) == ("req_id",)
    assert "kv_connector_worker_meta" in fields(KVConnectorOutput)
    assert {"layers", "layer_stride", "block_stride", "offset"} <= fields(KVCacheTensor)
    assert {"num_blocks", "kv_cache_tensors", "kv_cache_groups", "kv_cache_layout"} <= fields(
        KVCacheConfig
    )
    assert {
        "head_size", "head_size_v", "num_kv_heads", "dtype", "kv_quant_mode", "sliding_window",
    } <= fields(FullAttentionSpec)  # fmt: skip
