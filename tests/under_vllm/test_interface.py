"""vLLM's interfaces are those that this plugin was written for: the next release breaks a test here
and not a user. Runs with vLLM's Python only (make test-vllm)."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from kvist.engine.plugins.vllm import KvistConnector  # noqa: E402
from kvist.engine.plugins.vllm.identity import SUPPORTED, check_version, refusal  # noqa: E402
from kvist.engine.plugins.vllm.lookups import (  # noqa: E402
    Adapters,
    Names,
    digest_of,
    media_of,
    unnamed,
)
from kvist.engine.plugins.vllm.tier import KvistTier  # noqa: E402
from kvist.proto.keys import Namespace  # noqa: E402
from kvist.proto.layout import BlockFormat  # noqa: E402

SIGNATURES = {
    "__init__": ("vllm_config", "role", "kv_cache_config"),
    "bind_connector_metadata": ("connector_metadata",),
    "bind_gpu_block_pool": ("gpu_block_pool",),
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
    "take_events": (),
    "update_connector_output": ("connector_output",),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "wait_for_layer_load": ("layer_name",),
    "wait_for_save": (),
}  # fmt: skip
ABSTRACT = {
    "build_connector_meta", "get_num_new_matched_tokens", "save_kv_layer", "start_load_kv",
    "update_state_after_alloc", "wait_for_layer_load", "wait_for_save",
}  # fmt: skip
TIER_SIGNATURES = {
    "drain_jobs": (),
    "get_finished_jobs": (),
    "lookup": ("key", "req_context"),
    "on_new_request": ("req_context",),
    "on_request_finished": ("req_context",),
    "shutdown": (),
    "submit_load": ("job_metadata",),
    "submit_store": ("job_metadata",),
    "take_events": (),
    "touch": ("keys", "req_context"),
}
TIER_ABSTRACT = {
    "drain_jobs", "get_finished_jobs", "lookup", "on_new_request", "submit_load", "submit_store",
}  # fmt: skip


def names(function: object) -> tuple[str, ...]:
    found = tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]
    return tuple(name for name in found if name not in ("self", "cls"))


def fields(kind: Any) -> set[str]:
    return set(kind.__dataclass_fields__)


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
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheTensor
    from vllm.v1.outputs import KVConnectorOutput

    pool = BlockPool(num_gpu_blocks=2, enable_caching=True, hash_block_size=16)
    assert [block.ref_cnt for block in pool.blocks] == [0, 0]
    assert [block.block_hash for block in pool.blocks] == [None, None]
    assert pool.null_block is pool.blocks[0]
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


def test_fields_that_names_are_made_of_are_there() -> None:
    from vllm.config import LoadConfig, ModelConfig
    from vllm.config.multimodal import MultiModalConfig
    from vllm.lora.request import LoRARequest

    assert {
        "model", "model_weights", "revision", "quantization", "hf_config", "hf_overrides",
        "max_model_len", "multimodal_config",
    } <= fields(ModelConfig)  # fmt: skip
    assert {"load_format", "download_dir", "model_loader_extra_config"} <= fields(LoadConfig)
    assert {"mm_processor_kwargs", "video_pruning_rate"} <= fields(MultiModalConfig)
    assert {"lora_int_id", "lora_path", "load_inplace"} <= set(LoRARequest.__struct_fields__)


def test_what_another_connectors_workers_said_is_refused() -> None:
    connector = KvistConnector.__new__(KvistConnector)
    with pytest.raises(ValueError, match="first in MultiConnector"):
        connector.set_xfer_handshake_metadata({0: object()})


@pytest.mark.parametrize("method", sorted(TIER_SIGNATURES))
def test_signature_of_the_tiers(method: str) -> None:
    from vllm.v1.kv_offload.tiering.base import SecondaryTierManager

    assert names(getattr(SecondaryTierManager, method)) == TIER_SIGNATURES[method]
    assert names(getattr(KvistTier, method)) == TIER_SIGNATURES[method]


def test_the_tier_is_made_and_found_as_vllm_makes_and_finds_tiers() -> None:
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    assert SecondaryTierManager.__abstractmethods__ == TIER_ABSTRACT
    assert not KvistTier.__abstractmethods__
    made = ("offloading_spec", "primary_kv_view", "tier_type", "backpressure_detector")
    assert names(SecondaryTierManager.__init__) == made
    assert names(KvistTier.__init__)[:4] == made
    listed = {"type": "KvistTier", "module_path": "kvist.engine.plugins.vllm.tier"}
    assert SecondaryTierFactory.get_tier_class(listed) is KvistTier
    assert {"job_id", "keys", "chunk_ids", "is_promotion", "req_context"} <= fields(TransferJob)
    assert list(JobResult.__dataclass_fields__) == [
        "job_id", "success", "successful_keys", "transfer_time", "transfer_bytes",
    ]  # fmt: skip


NAMESPACE = Namespace("model", BlockFormat(2, 2, 64, "bfloat16", 16), "rope", "vllm-test")


def request_of(**more: Any) -> Any:
    """vLLM's own Request."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=1)
    return Request("a", list(range(40)), params, None, **more)


def picture(identifier: str, offset: int) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    where = PlaceholderRange(offset=offset, length=8)
    return MultiModalFeatureSpec(None, "image", identifier, where)


def adapter(folder: Path, content: bytes, **more: Any) -> Any:
    from vllm.lora.request import LoRARequest

    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return LoRARequest(folder.name, 1, str(folder), **more)


def test_salt_and_adapter_of_vllms_requests_each_make_another_namespace(tmp_path: Path) -> None:
    adapters = Adapters()
    requests = [
        request_of(),
        request_of(cache_salt="acme:1"),
        request_of(lora_request=adapter(tmp_path / "cat", b"cat")),
        request_of(lora_request=adapter(tmp_path / "dog", b"dog")),
    ]
    assert not any(unnamed(one, adapters) for one in requests)
    digests = [digest_of(NAMESPACE, one, adapters) for one in requests]
    assert len(set(digests)) == len(digests)
    # An adapter is its content: under another name it is the same one.
    again = request_of(lora_request=adapter(tmp_path / "tabby", b"cat"))
    assert digest_of(NAMESPACE, again, adapters) == digests[2]


def test_pictures_of_vllms_requests_make_other_keys_from_where_they_stand() -> None:
    def keys(*pictures: Any) -> list[bytes]:
        request = request_of(mm_features=list(pictures))
        assert not unnamed(request, Adapters())
        names = Names(NAMESPACE.digest(), NAMESPACE.format, "", media_of(request))
        return list(names.keys(request.all_token_ids))

    assert keys(picture("dog", 30), picture("cat", 4)) == keys(
        picture("cat", 4), picture("dog", 30)
    )
    firsts = [keys(), keys(picture("cat", 4)), keys(picture("dog", 4)), keys(picture("cat", 5))]
    assert len({key for one in firsts for key in one}) == 2 * len(firsts)
    later = keys(picture("cat", 4), picture("dog", 16))
    assert later[0] == firsts[1][0]
    assert later[1] != firsts[1][1]


def test_vllms_requests_whose_tokens_do_not_say_what_they_are_have_no_names(
    tmp_path: Path,
) -> None:
    import torch

    adapters = Adapters()
    assert unnamed(request_of(prompt_embeds=torch.zeros(40, 8)), adapters) == "prompt_embeds"
    assert unnamed(request_of(resumable=True), adapters) == "streaming_input"
    replaced = adapter(tmp_path / "cat", b"cat", load_inplace=True)
    assert unnamed(request_of(lora_request=replaced), adapters) == "adapter"


def test_models_that_are_not_one_group_of_full_attention_are_refused_with_the_reason() -> None:
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    sizes = {"block_size": 128, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    full = FullAttentionSpec(**sizes)
    window = SlidingWindowSpec(**sizes, sliding_window=256)
    state = MambaSpec(block_size=128, shapes=((16, 8),), dtypes=(torch.float32,))
    sized = {
        f"{axis}_parallel_size": 1
        for axis in ("pipeline", "decode_context", "prefill_context", "tensor")
    }
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**sized),
        speculative_config=None,
        cache_config=SimpleNamespace(calculate_kv_scales=False),
    )

    def said(*specs: Any) -> str:
        groups = [KVCacheGroupSpec([f"layer.{at}"], spec) for at, spec in enumerate(specs)]
        return refusal(config, KVCacheConfig(8, [], groups))

    assert said(full) == ""
    assert "SlidingWindowSpec" in said(window)
    assert "SlidingWindowSpec" in said(full, window)
    assert "MambaSpec" in said(full, state)
    assert "hybrid" in said(full, full)
    speculative = SimpleNamespace(**{**vars(config), "speculative_config": object()})
    assert "--speculative-config" in refusal(speculative, KVCacheConfig(8, [], []))
