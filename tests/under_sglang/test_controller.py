"""The plugin under SGLang's own host pools, failure injector and cache controller, without a GPU.
Runs with SGLang's Python only (make test-sglang)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang: make test-sglang")

from sglang.srt.environ import envs
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    HiCacheStorageFailureInjector,
)
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sim.sglang_pools import PAGE, Pools, make_pools
from sim.sidecar import Sidecar, wait_until

MakeController = Callable[..., Any]


def tokens(name: str, pages: int) -> list[int]:
    seed = hashlib.sha256(name.encode()).digest()
    return [seed[at % 32] + 256 * at for at in range(pages * PAGE)]


def hashes(name: str, pages: int) -> list[str]:
    found: list[str] = get_storage_hash_str(tokens(name, pages), None, page_size=PAGE)
    return found


def page(pools: Pools, start: int) -> torch.Tensor:
    found: torch.Tensor = pools.host.get_data_page(start).clone()
    return found


def config(sidecar: Sidecar, is_mla: bool = False) -> HiCacheStorageConfig:
    extra = {
        "backend_name": "kvist", "module_path": "kvist.engine.plugins.sglang",
        "class_name": "KvistStorage", "interface_v1": 1, "kvist.cache": str(sidecar.socket),
    }  # fmt: skip
    return HiCacheStorageConfig(0, 1, 0, 1, 0, 1, is_mla, True, False, "tiny", extra_config=extra)


def make_storage(sidecar: Sidecar, pools: Pools, is_mla: bool = False) -> Any:
    """As SGLang makes it."""
    made = StorageBackendFactory.create_backend("dynamic", config(sidecar, is_mla), pools.host)
    made.register_mem_pool_host(pools.host)
    made.on_host_pools_registered()
    return made


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *[("mha", one) for one in ("layer_first", "page_first", "page_first_direct", "page_head")],
        *[("mla", one) for one in ("layer_first", "page_first", "page_first_direct")],
    ],
)
def test_pages_of_sglangs_own_pools_come_back_as_they_were(
    sidecar: Sidecar, kind: str, layout: str
) -> None:
    pools, keys = make_pools(kind, layout), hashes(f"{kind}{layout}", 4)
    made = make_storage(sidecar, pools, kind == "mla")
    before = pools.host.kv_buffer.clone()
    there, here = pools.host.alloc(4 * PAGE), pools.host.alloc(4 * PAGE)
    assert made.batch_set_v1(keys, there, HiCacheStorageExtraInfo([])) == [True] * 4
    assert made.batch_exists([*keys, "00" * 32]) == 4
    assert made.batch_get_v1(keys, here, HiCacheStorageExtraInfo([])) == [True] * 4
    for mine, theirs in zip(here[::PAGE].tolist(), there[::PAGE].tolist(), strict=True):
        assert torch.equal(page(pools, mine), page(pools, theirs))
        pools.host.set_from_flat_data_page(mine, torch.zeros_like(page(pools, mine)))
    for start in here[::PAGE].tolist():  # nothing else was written
        pools.host.set_from_flat_data_page(start, flat_of(before, pools, start))
    assert torch.equal(pools.host.kv_buffer, before)
    made.close()


def flat_of(buffer: torch.Tensor, pools: Pools, start: int) -> torch.Tensor:
    """A page of an earlier copy of the pool's memory."""
    held, pools.host.kv_buffer = pools.host.kv_buffer, buffer
    found = page(pools, start)
    pools.host.kv_buffer = held
    return found


@pytest.mark.parametrize(("kind", "found"), [("mla", 2), ("mha", 0)])
def test_ranks_of_an_mla_model_share_pages_and_those_of_others_do_not(
    sidecar: Sidecar, kind: str, found: int
) -> None:
    pools, keys = make_pools(kind, "page_first"), hashes(f"rank{kind}", 2)
    made = []
    for rank in (0, 1):
        said = dataclasses.replace(config(sidecar, kind == "mla"), tp_rank=rank, tp_size=2)
        made.append(StorageBackendFactory.create_backend("dynamic", said, pools.host))
        made[-1].register_mem_pool_host(pools.host)
    indices = pools.host.alloc(2 * PAGE)
    assert all(made[0].batch_set_v1(keys, indices, HiCacheStorageExtraInfo([])))
    assert made[1].batch_exists(keys) == found
    for one in made:
        one.close()


def test_page_unified_is_refused_with_the_reason(sidecar: Sidecar) -> None:
    with pytest.raises(ValueError, match=r"layout page_unified\) is not served"):
        make_storage(sidecar, make_pools("mha", "page_unified"))


def write(controller: Any, indices: torch.Tensor, name: str, first: int, end: int) -> int:
    """As SGLang's tree backs up a node: pages of a prompt, with the hashes before them."""
    keys = hashes(name, end)
    wanted = tokens(name, end)[first * PAGE :]
    controller.write_storage(indices, wanted, keys[first:], keys[:first])
    done: int = controller.ack_backup_queue.get(timeout=20).completed_tokens
    return done


def fetch(controller: Any, pools: Pools, name: str, first: int, end: int) -> list[int]:
    """As SGLang's tree prefetches: query, memory for the hit, transfer; where pages are now."""
    keys = hashes(name, end)
    operation = controller.prefetch(
        CacheRequestHandle(name, 0), tokens(name, end)[first * PAGE :],
        keys[first - 1] if first else None, keys[:first],
    )  # fmt: skip
    found = controller.prefetch_hit_queue.get(timeout=20)
    assert found is operation
    if not found.storage_hit_count:
        return []
    found.host_indices = pools.host.alloc(found.storage_hit_count)
    controller.prefetch_buffer.put(found)
    completed = 0
    while not (ack := controller.ack_prefetch_queue.get(timeout=20)).completed_req:
        completed = max(completed, ack.completed_tokens or 0)
    starts: list[int] = found.host_indices[:completed:PAGE].tolist()
    return starts


def test_sglangs_controller_backs_up_and_prefetches_through_its_own_threads(
    sidecar: Sidecar, make_controller: MakeController
) -> None:
    pools = make_pools("mha", "page_first_direct")
    controller = make_controller(pools, sidecar)
    indices = pools.host.alloc(6 * PAGE)
    assert write(controller, indices[: 4 * PAGE], "controller", 0, 4) == 4 * PAGE
    assert write(controller, indices[4 * PAGE :], "controller", 4, 6) == 2 * PAGE
    assert fetch(controller, pools, "nothing", 0, 6) == []
    starts = fetch(controller, pools, "controller", 0, 6)
    assert len(starts) == 6
    for mine, theirs in zip(starts, indices[::PAGE].tolist(), strict=True):
        assert torch.equal(page(pools, mine), page(pools, theirs))
    # SGLang has the first four itself, and asks for what comes behind them.
    assert len(fetch(controller, pools, "controller", 4, 6)) == 2
    assert controller.clear_storage_backend()
    assert fetch(controller, pools, "controller", 0, 6) == []


def test_a_second_controller_finds_what_the_first_one_stored_in_another_place(
    sidecar: Sidecar, make_controller: MakeController
) -> None:
    one, two = make_pools("mla", "page_first"), make_pools("mla", "page_first")
    first, second = make_controller(one, sidecar), make_controller(two, sidecar)
    indices = one.host.alloc(3 * PAGE)
    write(first, indices, "second", 0, 3)
    starts = fetch(second, two, "second", 0, 3)
    assert [torch.equal(page(two, mine), page(one, theirs)) for mine, theirs in zip(
        starts, indices[::PAGE].tolist(), strict=True
    )] == [True] * 3  # fmt: skip


def test_a_sidecar_that_dies_costs_the_controller_hits_and_no_thread(
    tmp_path: Path, make_controller: MakeController
) -> None:
    victim = Sidecar(tmp_path / "victim", ["--slot-bytes", "16KiB"])
    victim.start()
    pools = make_pools("mha", "layer_first")
    controller = make_controller(pools, victim)
    indices = pools.host.alloc(3 * PAGE)
    assert write(controller, indices, "dies", 0, 3) == 3 * PAGE
    victim.kill()
    wait_until(lambda: fetch(controller, pools, "dies", 0, 3) == [], "the end to be seen")
    assert write(controller, indices, "dead", 0, 3) == 0
    victim.start()
    wait_until(lambda: write(controller, indices, "lives", 0, 3) == 3 * PAGE, "a new session")
    assert len(fetch(controller, pools, "lives", 0, 3)) == 3
    victim.close()


def test_under_sglangs_failure_injector_what_comes_is_right(sidecar: Sidecar) -> None:
    pools = make_pools("mha", "page_first")
    with (
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3),
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.002),
    ):
        made = make_storage(sidecar, pools)
    assert isinstance(made, HiCacheStorageFailureInjector)
    indices, target = pools.host.alloc(3 * PAGE), pools.host.alloc(3 * PAGE)
    came = failed = 0
    for round_ in range(60):
        keys, prompt = hashes(f"inject{round_}", 3), HiCacheStorageExtraInfo([])
        stored = made.batch_set_v1(keys, indices, prompt)
        got = made.batch_get_v1(keys, target, prompt)
        assert made.batch_exists(keys) in (0, sum(stored))
        for has, mine, theirs in zip(
            got, target[::PAGE].tolist(), indices[::PAGE].tolist(), strict=True
        ):
            came, failed = came + has, failed + (not has)
            assert not has or torch.equal(page(pools, mine), page(pools, theirs))
            pools.host.set_from_flat_data_page(mine, torch.zeros_like(page(pools, mine)))
    assert came > 30
    assert failed > 30
    made._backend.close()
