"""Which model computes: own kernels where machine, dtype and shape allow them, torch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sim.models import tiny_llama

from kvist.engine.config import EngineConfig
from kvist.engine.models import build
from kvist.engine.models.base import Chunk
from kvist.engine.models.build import build_model, missing_for_own_kernels, quantization_of
from kvist.engine.models.llama import LlamaModel
from kvist.engine.opening import namespace_of
from kvist.engine.weights import load_model
from kvist.proto.errors import ConfigInvalid
from kvist.tiers.hbm import PagePool

lacks = missing_for_own_kernels()
own = pytest.mark.skipif(bool(lacks), reason=f"needs {lacks}")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("wide"), head_dim=32)


def settings(model: Path, **changes: object) -> EngineConfig:
    fields = {"model": str(model), "dtype": "bfloat16", "threads": 1, **changes}
    return EngineConfig(**fields)  # type: ignore[arg-type]


@own
def test_bfloat16_is_computed_by_own_kernels_and_float32_by_torch(
    wide: Path, tmp_path: Path
) -> None:
    from kvist.engine.models.llama_cpu import CpuLlama

    config = settings(wide)
    loaded = load_model(wide, "bfloat16")
    assert isinstance(build_model(config, loaded, "bfloat16"), CpuLlama)
    assert isinstance(build_model(config, loaded, "float32"), LlamaModel)
    exact = load_model(wide, "float32")
    assert isinstance(build_model(config, exact, "bfloat16"), LlamaModel)
    narrow = load_model(tiny_llama(tmp_path), "bfloat16")
    assert isinstance(build_model(config, narrow, "bfloat16"), LlamaModel)


@own
def test_models_that_give_other_bits_have_other_namespaces(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {
        namespace_of(
            load_model(wide, "bfloat16", quantization=quantization), 16, "bfloat16"
        ).digest()
        for quantization in ("none", "int8", "int4")
    }
    assert len(digests) == 3
    plain = load_model(wide, "bfloat16")
    assert namespace_of(load_model(wide, "bfloat16", quantization="auto"), 16, "bfloat16") == (
        namespace_of(plain, 16, "bfloat16")  # this folder has no codes to keep
    )
    monkeypatch.setattr(build, "missing_for_own_kernels", lambda: "numba")
    assert namespace_of(plain, 16, "bfloat16").digest() not in digests


def test_bits_that_cannot_be_had_are_refused_by_flag_before_the_load(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigInvalid, match="--quantization int8: "):
        quantization_of(settings(wide, dtype="float32", quantization="int8"))
    monkeypatch.setattr(build, "missing_for_own_kernels", lambda: "a processor with AVX-512 BF16")
    with pytest.raises(ConfigInvalid, match="--quantization int4: needs a processor with AVX-512"):
        quantization_of(settings(wide, quantization="int4"))
    assert quantization_of(settings(wide)) == "none"
    assert isinstance(build_model(settings(wide), load_model(wide), "bfloat16"), LlamaModel)


@own
def test_a_shape_that_has_no_kernels_cannot_have_fewer_bits(tmp_path: Path) -> None:
    narrow = tiny_llama(tmp_path)
    config = settings(narrow, quantization="int4")
    loaded = load_model(narrow, "bfloat16", quantization=quantization_of(config))
    with pytest.raises(ConfigInvalid, match=r"--quantization int4: needs widths .* of 32"):
        build_model(config, loaded, "bfloat16")


@own
@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_the_number_of_threads_changes_no_bit(wide: Path, quantization: str) -> None:
    loaded = load_model(wide, "bfloat16", quantization=quantization)
    prompt = [number * 5 % loaded.config.vocab for number in range(90)]
    results = []
    for threads in (1, 2, 3):
        model = build_model(settings(wide, threads=threads), loaded, "bfloat16")
        pool = PagePool(loaded.block_format(16, "bfloat16"), 6).tensor
        results.append((model.forward([Chunk(prompt, 0, range(6), True)], pool), pool[:5]))
    for logits, pages in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(pages, results[0][1])
