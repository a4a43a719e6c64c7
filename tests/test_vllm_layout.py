"""What the vLLM plugin finds out at start: where blocks lie, what is served, what model it is."""

from __future__ import annotations

import mmap
import resource
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sim.vllm_memory import BLOCKS, NAMESPACE, vllm_memory

from kvist.engine.plugins.vllm.identity import (
    check_version,
    files_fingerprint,
    model_name,
    positions,
    refusal,
    unknown_settings,
)
from kvist.engine.plugins.vllm.memory import (
    BlockMemory,
    LayoutRefused,
    ScratchPage,
    map_memory,
    try_memory,
)


def test_memory_is_where_vllm_says_and_a_trial_shows_it() -> None:
    placement, caches = vllm_memory()
    memory = BlockMemory(map_memory(placement, BLOCKS, caches))
    try_memory(memory, list(caches.values()))
    assert not any(cache.any() for cache in caches.values())
    page = ScratchPage(memory, NAMESPACE.format)
    assert page.reads(page.written())
    assert not page.reads(page.written() ^ np.uint8(1))


def test_memory_that_lies_otherwise_than_vllm_says_is_refused() -> None:
    placement, caches = vllm_memory()
    placement[0].block_stride *= 2
    with pytest.raises(LayoutRefused, match="placement"):
        map_memory(placement, BLOCKS // 2, caches)
    placement, caches = vllm_memory()
    swapped = dict(zip(caches, reversed(caches.values()), strict=True))
    with pytest.raises(LayoutRefused, match="do not lie"):
        map_memory(placement, BLOCKS, swapped)
    turned = {name: cache.transpose(1, 2) for name, cache in caches.items()}
    with pytest.raises(LayoutRefused, match="one run"):
        map_memory(placement, BLOCKS, turned)


def test_a_trial_notices_layers_in_another_order() -> None:
    placement, caches = vllm_memory()
    memory = BlockMemory(map_memory(placement, BLOCKS, caches))
    with pytest.raises(LayoutRefused, match="stored and restored"):
        try_memory(memory, list(caches.values())[::-1])


def faults_of_writing(pages: np.ndarray[Any, Any]) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    pages[..., 0] += 1
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_memory_that_vllm_never_touched_is_there_before_its_first_use() -> None:
    layers, blocks, page = 4, 64, mmap.PAGESIZE
    # From the middle of a page on, as an allocator gives it, so that two pages are shared.
    runs = np.frombuffer(mmap.mmap(-1, (layers * blocks + 1) * page), np.uint8)[64 : 64 - page]
    memory = BlockMemory(runs.reshape(layers, blocks, page))
    stopped = Event()
    stopped.set()
    assert not memory.populate(stopped)
    assert memory.populate(Event())
    assert not runs.any()
    assert faults_of_writing(runs.reshape(layers, blocks, page)) <= layers * blocks // 8
    fresh = np.frombuffer(mmap.mmap(-1, layers * blocks * page), np.uint8)
    assert faults_of_writing(fresh.reshape(layers, blocks, page)) >= layers * blocks // 2


def vllm_config(**parallel: int) -> Any:
    sizes = {
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, **parallel,
    }  # fmt: skip
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes),
        speculative_config=None,
        cache_config=SimpleNamespace(calculate_kv_scales=False),
    )


def test_what_is_not_served_is_refused_with_the_reason() -> None:
    window = type("SlidingWindowSpec", (), {})()
    hybrid = SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(kv_cache_spec=window),
            SimpleNamespace(kv_cache_spec=window),
        ]
    )
    assert "pipeline_parallel_size=2" in refusal(vllm_config(pipeline_parallel_size=2), hybrid)
    assert "SlidingWindowSpec" in refusal(vllm_config(), hybrid)
    with pytest.raises(RuntimeError, match="tested with vLLM"):
        check_version("0.33.0")


def test_weights_are_known_by_content_and_not_by_name(tmp_path: Path) -> None:
    def folder(name: str, weights: bytes) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "README.md").write_text(name)
        return files_fingerprint(tmp_path / name, (".safetensors",))

    assert folder("a", b"weights") == folder("b", b"weights") != folder("c", b"Weights")


def model_config(folder: Path, **more: Any) -> Any:
    text = '{"rope_parameters": {"rope_type": "longrope"}}'
    return SimpleNamespace(
        model_config=SimpleNamespace(**{
            "model": str(folder), "revision": None, "quantization": None, "hf_overrides": {},
            "model_weights": "", "max_model_len": 4096, "multimodal_config": None,
            "hf_config": SimpleNamespace(to_json_string=lambda **_: text), **more,
        }),
        load_config=SimpleNamespace(
            load_format="auto", download_dir=None, model_loader_extra_config={}
        ),
    )  # fmt: skip


def test_models_whose_weights_are_elsewhere_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """Two finetunes have one configuration; an empty folder's content says nothing of either."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    here, there = [model_name(model_config(folder)) for folder in folders]
    assert here != there
    streamed = [
        model_name(model_config(folders[0], model_weights=f"s3://models/{name}"))
        for name in ("cat", "dog")
    ]
    assert len({here, there, *streamed}) == 4
    for folder in folders:
        (folder / "model.safetensors").write_bytes(b"weights")
    assert len({model_name(model_config(folder)) for folder in folders}) == 1


def test_what_changes_kv_beside_weights_and_text_is_in_the_names(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    media = SimpleNamespace(mm_processor_kwargs={"max_pixels": 4}, video_pruning_rate=None)
    plain = model_name(model_config(tmp_path))
    assert model_name(model_config(tmp_path, multimodal_config=media)) != plain
    # LongRoPE: vLLM chooses its factors by the limit of length.
    words = [
        positions(model_config(tmp_path, max_model_len=length).model_config)
        for length in (4096, 131072)
    ]
    assert len(set(words)) == 2


def test_settings_that_it_does_not_have_are_named() -> None:
    extra = {"kvist.cache": "a", "kvist.cahce": "b", "kvist_cache": "c", "lmcache.host": "d"}
    assert unknown_settings(extra) == ["kvist.cahce", "kvist_cache"]
