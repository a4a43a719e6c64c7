"""What the SGLang plugin serves and refuses, and what shares with what; without SGLang."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sim import sglang_fixtures as fixtures
from sim.sglang_memory import (
    LAYOUTS,
    PAGE,
    PAGES,
    HiCacheStorageExtraInfo,
    HostPool,
    at,
    chain,
    filled,
    make_config,
    make_storage,
    page,
)
from sim.sidecar import Sidecar, wait_until

from kvist.engine.plugins.common import opaque_format
from kvist.engine.plugins.sglang.identity import model_name, namespace_of, page_identity
from kvist.engine.plugins.sglang.memory import LayoutRefused, map_pool, try_memory

FIRST = HiCacheStorageExtraInfo([])


# Fixtures, and the stand-ins for SGLang around the whole module.
sglang, sidecar, pool, store = fixtures.sglang, fixtures.sidecar, fixtures.pool, fixtures.store


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_every_layout_come_back_as_they_were(sidecar: Sidecar, layout: str) -> None:
    pool = filled(HostPool(layout))
    made = make_storage(sidecar, pool)
    keys, wanted = chain(layout, 4), [page(pool, number) for number in (1, 5, 2, 9)]
    others = [page(pool, number) for number in range(6, PAGES - 1) if number not in (7, 9, 10)]
    assert made.batch_exists(keys) == 0
    assert made.batch_set_v1(keys, at(1, 5, 2, 9), FIRST) == [True] * 4
    assert made.batch_exists([*keys, "00" * 32]) == 4
    assert made.batch_get_v1(keys, at(10, 3, 7, 4), FIRST) == [True] * 4
    for number, expected in zip((10, 3, 7, 4), wanted, strict=True):
        assert torch.equal(page(pool, number), expected)
    left = [page(pool, number) for number in range(6, PAGES - 1) if number not in (7, 9, 10)]
    assert all(torch.equal(one, two) for one, two in zip(left, others, strict=True))
    made.close()


def test_ranks_layouts_and_models_share_nothing_and_ranks_of_mla_all(sidecar: Sidecar) -> None:
    def namespace(pool: HostPool, model: str = "m", **changes: Any) -> bytes:
        memory = map_pool(pool)
        return namespace_of(make_config(sidecar, **changes), pool, "kv", memory, model, {}).digest()

    latent = HostPool()
    del latent.head_num
    digests = [namespace(HostPool(layout)) for layout in LAYOUTS]
    digests += [
        namespace(HostPool(), "other"),
        namespace(HostPool(), tp_rank=1, tp_size=2),
        namespace(HostPool(), tp_rank=0, tp_size=2),
        namespace(HostPool(), pp_rank=1, pp_size=2),
        namespace(latent, is_mla_model=True),
    ]
    assert len(set(digests)) == len(digests)
    assert namespace(latent, is_mla_model=True, tp_rank=1, tp_size=2) == digests[-1]
    # A pool whose heads are parted among ranks is not shared, whatever the model is.
    assert namespace(HostPool(), is_mla_model=True, tp_rank=1, tp_size=2) != namespace(
        HostPool(), is_mla_model=True, tp_rank=0, tp_size=2
    )


def test_a_model_is_its_files_and_its_adapters_unless_it_is_named(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    lora = tmp_path / "lora"
    lora.mkdir()

    def name(content: str, adapter: str) -> str:
        weights.write_text(content)
        (lora / "adapter_model.safetensors").write_text(adapter)
        adapters = [SimpleNamespace(lora_name="a", lora_path=str(lora))]
        arguments = SimpleNamespace(model_path=str(tmp_path), revision=None, lora_paths=adapters)
        return model_name({}, arguments)

    assert name("one", "x") == name("one", "x")
    assert len({name("one", "x"), name("two", "x"), name("one", "y")}) == 3
    assert model_name({"kvist.model": "m@1"}, None) != model_name({"kvist.model": "m@2"}, None)
    with pytest.raises(ValueError, match=r"kvist\.model"):
        model_name({}, None)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no weights.*kvist\.model"):  # they are somewhere else
        model_name({}, SimpleNamespace(model_path=str(tmp_path), revision=None))


def shifted(pool: HostPool) -> None:
    """A pool whose pages lie one further than it says."""
    pool.size -= PAGE
    real = pool.get_page_buffer_meta
    pool.get_page_buffer_meta = lambda indices: real(indices + PAGE)  # type: ignore[method-assign]


def uneven(pool: HostPool) -> None:
    real = pool.get_page_buffer_meta

    def meta(indices: torch.Tensor) -> tuple[list[int], list[int]]:
        addresses, sizes = real(indices)
        return addresses, [*sizes[:-1], sizes[-1] // 2]

    pool.get_page_buffer_meta = meta  # type: ignore[method-assign]


def scattered(pool: HostPool) -> None:
    real = pool.get_page_buffer_meta

    def meta(indices: torch.Tensor) -> tuple[list[int], list[int]]:
        addresses, sizes = real(indices)
        return [one + (64 if int(indices[0]) > PAGE else 0) for one in addresses], sizes

    pool.get_page_buffer_meta = meta  # type: ignore[method-assign]


def silent(pool: HostPool) -> None:
    def meta(_: torch.Tensor) -> tuple[list[int], list[int]]:
        raise ValueError("Unsupported layout: page_unified")

    pool.get_page_buffer_meta = meta  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shifted, "not what it was"),
        (uneven, "different sizes"),
        (scattered, "even distances"),
        (silent, "Unsupported layout"),
        (lambda pool: setattr(pool, "dcp_size", 2), "dcp_size"),
    ],
)
def test_a_pool_that_does_not_lie_as_it_says_is_refused_with_the_reason(
    sidecar: Sidecar, change: Callable[[HostPool], None], reason: str
) -> None:
    pool = filled(HostPool())
    before = pool.kv_buffer.clone()
    change(pool)
    made = make_storage(sidecar)
    with pytest.raises(ValueError, match=f"'kv'.*is not served.*{reason}"):
        made.register_mem_pool_host(pool)
    assert torch.equal(pool.kv_buffer, before)
    made.close()


def test_the_trial_at_start_leaves_the_pool_as_it_was() -> None:
    pool = filled(HostPool("layer_first"))
    before = pool.kv_buffer.clone()
    try_memory(pool, map_pool(pool))
    assert torch.equal(pool.kv_buffer, before)
    small = HostPool()
    small.size = PAGE
    with pytest.raises(LayoutRefused):
        map_pool(small)


@pytest.mark.parametrize(
    ("extra", "changes", "word"),
    [
        ({}, {}, r"kvist\.cache"),
        ({"kvist.cache": "/tmp/x"}, {}, r"kvist\.model"),
        ({"kvist.cache": "/tmp/x"}, {"attn_cp_size": 2}, "context parallelism"),
        ({"kvist.cache": "/tmp/x"}, {"should_split_heads": True}, "split by heads"),
    ],
)
def test_a_setup_that_is_not_served_is_refused_with_the_way_out(
    sidecar: Sidecar, extra: dict[str, Any], changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        make_storage(sidecar, extra_config=extra, **changes)


def test_another_sglang_is_refused(sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang

    monkeypatch.setattr(sglang, "__version__", "0.5.99")
    with pytest.raises(RuntimeError, match=r"tested with SGLang 0\.5\.23; this is SGLang 0\.5\.99"):
        make_storage(sidecar)


def test_names_that_are_no_hashes_have_identities_of_their_own() -> None:
    real = chain("x", 1)[0]
    assert page_identity(real) == bytes.fromhex(real)
    assert len({page_identity(one) for one in (real, "g" * 64, real[:-1], real + "0")}) == 4
    with pytest.raises(ValueError, match="multiple of 64"):
        opaque_format(100, 16)
    assert opaque_format(6 * 64, 16).payload_bytes == 6 * 64


def test_no_descriptor_is_left_behind(sidecar: Sidecar) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    make_storage(sidecar, filled(HostPool())).close()
    before = opened()
    for _ in range(3):
        make_storage(sidecar, filled(HostPool())).close()
    # gRPC closes what was connected a moment later.
    wait_until(lambda: opened() <= before + 1, "descriptors to be closed")
