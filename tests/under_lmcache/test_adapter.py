"""The plugin under LMCache's own loader, memory objects, `bench l2` and server, without a GPU.
Runs with LMCache's Python only (make test-lmcache)."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmcache", reason="needs LMCache: make test-lmcache")

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import (
    PluginL2AdapterConfig,
    _create_plugin_adapter,
)
from lmcache.v1.memory_management import MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd
from sim.sidecar import Sidecar, wait_until

from kvist.engine.local import free_port

SHAPE, DTYPE = torch.Size((2, 3, 256, 16)), torch.bfloat16
LAYOUT = {0: MemoryLayoutDesc([SHAPE], [DTYPE])}
LMCACHE = Path(sys.executable).parent / "lmcache"


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    folder = tmp_path_factory.mktemp("under-lmcache")
    made = Sidecar(folder, ["--dram-bytes", "256MiB", "--slot-bytes", "1MiB"])
    made.start()
    yield made
    made.close()


@pytest.fixture
def adapter(sidecar: Sidecar) -> Iterator[Any]:
    params = {"kvist.cache": str(sidecar.socket)}
    made = _create_plugin_adapter(
        PluginL2AdapterConfig("kvist.engine.plugins.lmcache", "KvistL2Adapter", params)
    )
    made.set_backend_identity("kvist")
    yield made
    made.close()


def memory(value: int | None, shape: torch.Size = SHAPE) -> TensorMemoryObj:
    """An object as LMCache's server hands it over, of noise, or empty."""
    size = shape.numel() * DTYPE.itemsize
    raw = torch.zeros(size, dtype=torch.uint8)
    if value is not None:
        raw.random_(0, 256, generator=torch.Generator().manual_seed(value))
    meta = MemoryObjMetadata(
        shape=shape, dtype=DTYPE, address=0, phy_size=size, ref_count=1, shapes=[shape],
        dtypes=[DTYPE],
    )  # fmt: skip
    return TensorMemoryObj(raw, meta, None)


def keys(name: str, count: int) -> list[ObjectKey]:
    return [
        ObjectKey(f"{name}{at}".encode().ljust(32, b"-"), "m/1b", 0x01000100) for at in range(count)
    ]


def told(fd: int) -> None:
    """Wait as LMCache's controllers do."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(20000)
    consume_fd(fd)


def store(adapter: Any, names: list[ObjectKey], objects: list[Any]) -> Any:
    task = adapter.submit_store_task(names, objects)
    told(adapter.get_store_event_fd())
    done = adapter.pop_completed_store_tasks()
    assert set(done) == {task}
    assert adapter.pop_completed_store_tasks() == {}
    return done[task]


def find(adapter: Any, names: list[ObjectKey], layout: Any = None) -> list[int]:
    task = adapter.submit_lookup_and_lock_task(names, LAYOUT if layout is None else layout)
    told(adapter.get_lookup_and_lock_event_fd())
    bitmap = adapter.query_lookup_and_lock_result(task)
    assert adapter.query_lookup_and_lock_result(task) is None
    adapter.submit_unlock(names)
    found: list[int] = bitmap.get_indices_list()
    return found


def load(adapter: Any, names: list[ObjectKey], objects: list[Any]) -> list[int]:
    task = adapter.submit_load_task(names, objects)
    told(adapter.get_load_event_fd())
    bitmap = adapter.query_load_result(task)
    assert adapter.query_load_result(task) is None
    came: list[int] = bitmap.get_indices_list()
    return came


def test_objects_come_back_into_lmcaches_own_memory(adapter: Any) -> None:
    names, objects = keys("back", 5), [memory(at) for at in range(5)]
    fds = {
        adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    }  # fmt: skip
    assert len(fds) == 3
    assert find(adapter, names) == []
    result = store(adapter, names, objects)
    assert (result.is_successful(), result.bytes_transferred()) == (True, 5 * objects[0].get_size())
    assert store(adapter, names, objects).bytes_transferred() == 0
    assert find(adapter, [*keys("none", 2), *names]) == [2, 3, 4, 5, 6]
    targets = [memory(None) for _ in names]
    assert load(adapter, names, targets) == [0, 1, 2, 3, 4]
    for mine, theirs in zip(targets, objects, strict=True):
        assert torch.equal(mine.raw_data, theirs.raw_data)
    assert adapter.report_status()["is_healthy"]
    assert not adapter.supports_global_eviction


def test_a_fresh_adapter_finds_them_by_what_lmcache_says_of_their_layout(
    adapter: Any, sidecar: Sidecar
) -> None:
    """A server that was restarted looks up before it has stored anything."""
    names = keys("fresh", 2)
    store(adapter, names, [memory(at) for at in range(2)])
    params = {"kvist.cache": str(sidecar.socket)}
    fresh = _create_plugin_adapter(
        PluginL2AdapterConfig("kvist.engine.plugins.lmcache", "KvistL2Adapter", params)
    )
    assert find(fresh, names) == [0, 1]
    fresh.close()


def test_numbers_in_another_order_are_a_miss_though_they_are_as_many(adapter: Any) -> None:
    names = keys("order", 1)
    store(adapter, names, [memory(1)])
    other = torch.Size((3, 2, 256, 16))
    target = memory(None, other)
    assert load(adapter, names, [target]) == []
    assert load(adapter, names, [memory(None)]) == [0]


def flag(sidecar: Sidecar) -> str:
    return json.dumps(
        {
            "type": "plugin",
            "module_path": "kvist.engine.plugins.lmcache",
            "class_name": "KvistL2Adapter",
            "adapter_params": {"kvist.cache": str(sidecar.socket)},
        }
    )


def test_lmcaches_own_benchmark_verifies_what_comes_back(sidecar: Sidecar) -> None:
    command = [
        str(LMCACHE), "bench", "l2", "--l2-adapter", flag(sidecar), "--num-keys", "16",
        "--data-size-kb", "512", "--rounds", "2", "--no-skip-verify",
        "--lookup-max-hit-rate", "0.5",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    success = [int(words[-1]) for words in said if words[:2] == ["Total", "success:"]]
    assert [success[0], success[-1]] == [32, 32]  # stores and loads
    assert "mismatch" not in done.stdout.lower() or "0 mismatch" in done.stdout.lower()


def test_lmcaches_server_loads_the_plugin_and_calls_it_healthy(
    sidecar: Sidecar, tmp_path: Path
) -> None:
    http, port = free_port(), free_port()
    command = [
        str(LMCACHE), "server", "--l1-size-gb", "0.1", "--eviction-policy", "LRU",
        "--port", str(port), "--http-host", "127.0.0.1", "--http-port", str(http),
        "--supported-transfer-mode", "auto", "--l2-adapter", flag(sidecar),
    ]  # fmt: skip
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    status: dict[str, Any] = {}

    def ready() -> bool:
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{http}/status", timeout=5) as answer:
                status.update(json.load(answer))
        except OSError:
            return False
        return True

    try:
        wait_until(ready, "LMCache's server", 60.0)
        (adapter,) = status["storage_manager"]["l2_adapters"]
        assert (adapter["type"], adapter["is_healthy"]) == ("KvistL2Adapter", True)
    finally:
        server.terminate()
        server.wait(20.0)
