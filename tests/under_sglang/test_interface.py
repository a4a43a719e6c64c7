"""SGLang's storage interface is the one that this plugin was written for: the next release breaks
a test here and not a user. Runs with SGLang's Python only (make test-sglang)."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import pytest

sglang = pytest.importorskip("sglang", reason="needs SGLang: make test-sglang")

from sglang.srt.mem_cache import hicache_storage as real  # noqa: E402
from sglang.srt.observability.metrics_collector import StorageMetrics  # noqa: E402
from sim import sglang_memory as standin  # noqa: E402

from kvist.engine.plugins.common import check_version  # noqa: E402
from kvist.engine.plugins.sglang import KvistStorage  # noqa: E402
from kvist.engine.plugins.sglang.identity import SUPPORTED  # noqa: E402

SIGNATURES = {
    "batch_exists": ("keys", "extra_info"),
    "batch_exists_v2": ("keys", "pool_transfers", "extra_info"),
    "batch_get": ("keys", "target_locations", "target_sizes"),
    "batch_get_v1": ("keys", "host_indices", "extra_info"),
    "batch_get_v2": ("transfers", "extra_info"),
    "batch_set": ("keys", "values", "target_locations", "target_sizes"),
    "batch_set_v1": ("keys", "host_indices", "extra_info"),
    "batch_set_v2": ("transfers", "extra_info"),
    "clear": (),
    "exists": ("key",),
    "get": ("key", "target_location", "target_sizes"),
    "get_stats": (),
    "on_host_pools_registered": (),
    "register_mem_host_pool_v2": ("host_pool", "host_pool_name"),
    "register_mem_pool_host": ("mem_pool_host",),
    "set": ("key", "value", "target_location", "target_sizes"),
}
ABSTRACT = {"get", "batch_get", "set", "batch_set", "exists"}


def names(function: object) -> tuple[str, ...]:
    found = tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]
    return tuple(name for name in found if name not in ("self", "cls"))


def test_the_installed_sglang_is_a_supported_one() -> None:
    check_version("KvistStorage", "SGLang", sglang.__version__, SUPPORTED)


def test_the_interface_has_these_methods_and_no_others() -> None:
    methods = {
        name for name, one in vars(real.HiCacheStorage).items()
        if inspect.isfunction(one) and not name.startswith("_")
    }  # fmt: skip
    assert methods == set(SIGNATURES)
    assert real.HiCacheStorage.__abstractmethods__ == ABSTRACT
    assert not KvistStorage.__abstractmethods__


@pytest.mark.parametrize("method", sorted(SIGNATURES))
def test_signature_of(method: str) -> None:
    assert names(getattr(real.HiCacheStorage, method)) == SIGNATURES[method]
    assert names(getattr(KvistStorage, method)) == SIGNATURES[method]


@pytest.mark.parametrize(
    "name",
    ["HiCacheStorageConfig", "HiCacheStorageExtraInfo", "PoolTransfer", "PoolTransferResult"],
)
def test_the_stand_ins_of_the_other_tests_have_fields_that_sglangs_have(name: str) -> None:
    def fields(kind: type) -> set[str]:
        return {field.name for field in dataclasses.fields(kind)}

    assert fields(getattr(standin, name)) <= fields(getattr(real, name))
    assert fields(standin.StorageMetrics) <= fields(StorageMetrics)


def test_pools_and_policies_are_named_as_in_the_other_tests() -> None:
    for kind in ("PoolName", "PoolHitPolicy"):
        mine, theirs = getattr(standin, kind), getattr(real, kind)
        assert {one.name: one.value for one in mine}.items() <= {
            one.name: one.value for one in theirs
        }.items()
    assert str(real.PoolName.MAMBA) == "mamba"


def test_sglangs_own_factory_finds_the_storage_by_its_flags() -> None:
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    module, name = "kvist.engine.plugins.sglang", "KvistStorage"
    assert StorageBackendFactory._load_backend_class(module, name, "kvist") is KvistStorage
    config = SimpleNamespace(
        extra_config={"backend_name": "kvist", "module_path": module, "class_name": name}
    )
    with pytest.raises(ValueError, match=r"kvist\.cache"):
        StorageBackendFactory.create_backend("dynamic", config, None)
    with pytest.raises(AttributeError, match="class_name is KvistStorage"):
        StorageBackendFactory._load_backend_class(module, "Kvist", "kvist")


def test_sglangs_page_hashes_are_chains_of_sha256_seeded_by_salt_and_adapter() -> None:
    from sglang.srt.mem_cache.utils import get_hash_str, get_storage_hash_str

    one = get_hash_str(list(range(32)), None, page_size=16)
    assert [len(bytes.fromhex(page)) for page in one] == [32, 32]
    other = get_hash_str([7, *range(1, 32)], None, page_size=16)
    assert not set(one) & set(other)
    assert get_hash_str(list(range(16, 32)), one[0], page_size=16) == one[1:]

    class Key(list[int]):
        extra_key: str | None = None
        cache_salt: str | None = None

    plain, salted, adapted = Key(range(32)), Key(range(32)), Key(range(32))
    salted.cache_salt, adapted.extra_key = "acme", "lora"
    pages = [get_storage_hash_str(key, None, page_size=16) for key in (plain, salted, adapted)]
    assert len({page for key in pages for page in key}) == 6
