"""NUMA: where the arena is to lie, and where it does; threads near a device."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sim.sidecar import Sidecar, wait_until
from sim.stores import Bench

from kvist.cachesvc.core.store import Store
from kvist.cachesvc.log import Log
from kvist.engine.device import near as near_device
from kvist.engine.device.found import CPU, Device
from kvist.engine.device.near import near, near_cores, pci_address
from kvist.proto import numa
from kvist.proto.errors import ConfigInvalid
from kvist.proto.memory import HUGE_BYTES
from kvist.proto.numa import NODES, Node, chosen_nodes, memory_nodes, parse_list
from kvist.tiers.dram import DramTier

NODE = memory_nodes()[0].number if memory_nodes() else 0
needs_numa = pytest.mark.skipif(not memory_nodes(), reason="the kernel knows no NUMA nodes")


def host(root: Path, nodes: dict[int, str], allowed: str = "0-15", memory: str = "") -> Path:
    """A host with these nodes and their cores."""
    folder = root / NODES
    for number, cores in nodes.items():
        (folder / f"node{number}").mkdir(parents=True)
        (folder / f"node{number}/cpulist").write_text(f"{cores}\n")
    (folder / "has_memory").write_text(memory or ",".join(map(str, nodes)))
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text(f"Name:\tkvistd\nMems_allowed_list:\t{allowed}\n")
    return root


def policies(arena: DramTier) -> list[str]:
    """Of the maps of an arena in this process, in their order, as the kernel tells."""
    text = Path("/proc/self/numa_maps").read_text()
    return [line.split()[1] for line in text.splitlines() if f"file={arena.path} " in f"{line} "]


def test_lists_of_the_kernel_are_read() -> None:
    assert parse_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_list("") == parse_list("none, -2, 3-x") == frozenset()


def test_nodes_are_those_with_memory_that_the_cpuset_allows(tmp_path: Path) -> None:
    root = host(tmp_path, {0: "0-3", 1: "4-7", 2: "", 3: "8-11"}, allowed="0-2", memory="0,2-3")
    assert memory_nodes(root) == [Node(0, frozenset(range(4))), Node(2, frozenset())]
    assert memory_nodes(tmp_path / "none") == []


TWO = (Node(0, frozenset({0, 1})), Node(1, frozenset({2, 3})))
AND_MEMORY = (*TWO, Node(2, frozenset()))


@pytest.mark.parametrize(
    ("wanted", "nodes", "cores", "chosen"),
    [
        ("auto", TWO[:1], {0, 1}, ()),
        ("auto", (), {0, 1}, ()),
        ("auto", TWO, {0, 1, 2, 3}, (0, 1)),
        ("auto", TWO, {2, 3}, (1,)),
        ("auto", AND_MEMORY, {1, 3}, (0, 1)),
        ("interleave", AND_MEMORY, {0}, (0, 1)),
        ("interleave", TWO[:1], {0}, ()),
        ("off", TWO, {0, 1, 2, 3}, ()),
        ("1", TWO, {0}, (1,)),
        ("2", AND_MEMORY, {0}, (2,)),
        ("0", TWO[:1], {0}, (0,)),
    ],
)
def test_the_arena_lies_where_the_setting_says(
    wanted: str, nodes: Sequence[Node], cores: set[int], chosen: tuple[int, ...]
) -> None:
    assert chosen_nodes(wanted, nodes, cores) == chosen


def test_a_node_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigInvalid, match=r"^dram_numa: no node 4 .* memory: 0, 1, 2; give one"):
        chosen_nodes("4", AND_MEMORY, {0})
    with pytest.raises(ConfigInvalid, match="none that the kernel tells"):
        chosen_nodes("0", (), {0})


def test_stripes_are_huge_pages_and_no_more_than_a_process_may_map() -> None:
    assert numa.stripe_bytes(64 << 20) == HUGE_BYTES
    for length in (1, 1 << 30, 100 << 30, (4 << 40) + 1):
        stripe = numa.stripe_bytes(length)
        assert stripe % HUGE_BYTES == 0
        assert -(-length // stripe) <= numa.STRIPES_MAX


@needs_numa
def test_the_policy_is_on_the_arena_before_its_first_page_and_placement_is_read() -> None:
    plain = DramTier(Path("/dev/shm") / f"kvist-numa-{os.getpid()}-a", 4, HUGE_BYTES)
    arena = DramTier(Path("/dev/shm") / f"kvist-numa-{os.getpid()}-b", 4, HUGE_BYTES, [NODE])
    try:
        assert policies(plain) == ["default"]
        assert policies(arena) == [f"prefer:{NODE}"]
        assert not arena.unplaced
        assert arena.node_bytes == {}
        assert arena.prefault(threading.Event())
        assert sum(arena.node_bytes.values()) == 4 * HUGE_BYTES
        assert arena.node_bytes[NODE] > 0
    finally:
        plain.close()
        arena.close()


@needs_numa
def test_several_nodes_take_stripes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    real = numa._prefer

    def prefer(start: int, length: int, node: int) -> None:
        asked.append((start, length, node))
        real(start, length, NODE)

    monkeypatch.setattr(numa, "_prefer", prefer)
    path = Path("/dev/shm") / f"kvist-numa-{os.getpid()}-c"
    arena = DramTier(path, 5, HUGE_BYTES + 4096, [0, 1, 2])
    try:
        assert [node for _, _, node in asked] == [0, 1, 2, 0, 1, 2]
        assert sum(length for _, length, _ in asked) == 5 * (HUGE_BYTES + 4096)
        starts = [start - asked[0][0] for start, _, _ in asked]
        assert starts == [each * HUGE_BYTES for each in range(6)]
        assert set(policies(arena)) == {f"prefer:{NODE}"}
    finally:
        arena.close()


def test_a_kernel_that_refuses_leaves_the_arena_as_it_would_be(tmp_path: Path) -> None:
    said = io.StringIO()
    config = replace(Bench(tmp_path, dram_slots=4).config, dram_nodes=(1023,), prefault=True)
    store = Store(config, lambda _: None, lambda: 0.0, Log(said))
    store.open()
    store.close()
    assert re.search(r"arena not placed nodes=1023 reason=", said.getvalue())
    assert "store ready" in said.getvalue()


@needs_numa
def test_a_sidecar_says_where_its_arena_lies_and_refuses_a_node_that_is_none(
    tmp_path: Path,
) -> None:
    made = Sidecar(tmp_path, ["--dram-numa", str(NODE), "--slot-bytes", "64KiB"])
    made.start()
    try:
        wait_until(lambda: "arena populated" in made.text(), "the arena")
        line = next(line for line in made.text().splitlines() if "arena populated" in line)
        assert re.search(rf'nodes="?{NODE}:\d+', line)
        (dram,) = json.loads(made.get("stats.json"))["tiers"]
        assert sum(dram["node_bytes"].values()) == 8 << 20
    finally:
        made.close()
    lost = Sidecar(tmp_path / "lost", ["--dram-numa", "1000"])
    with pytest.raises(AssertionError, match="dram_numa: no node 1000"):
        lost.start()
    lost.close()


# Near a device.


def test_cores_near_a_device_are_those_of_its_node_that_may_be_used(tmp_path: Path) -> None:
    root = host(tmp_path, {0: "0-3", 1: "4-7"})
    for name, node in (("0000:1b:00.0", "1"), ("0000:2c:00.0", "-1"), ("0000:3d:00.0", "7")):
        folder = root / near_device.PCI / name
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    cores = {2, 3, 4, 5}
    assert near_cores("0000:1b:00.0", cores, root) == {4, 5}
    assert near_cores("0000:1b:00.0", {0, 1}, root) == {0, 1}, "none of its cores may be used"
    for address in ("0000:2c:00.0", "0000:3d:00.0", "0000:99:00.0", ""):
        assert near_cores(address, cores, root) == cores


def test_threads_started_near_a_device_stay_there_and_others_where_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = os.sched_getaffinity(0)
    chosen = {min(before)}
    monkeypatch.setattr(near_device, "near_cores", lambda *_: chosen)
    seen: list[set[int]] = []
    with near(Device("cuda", "cuda:0", "one")):
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    assert seen == [chosen]
    assert os.sched_getaffinity(0) == before
    assert pci_address(CPU) == pci_address(Device("cuda", "cuda:0", "one"), "no-such.so") == ""
    with near(CPU):
        pass


def test_the_driver_says_where_a_device_is_plugged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """libcuda with two devices."""

        def cuDeviceGet(self, handle: Any, number: int) -> int:
            handle._obj.value = 10 + number
            return 0 if number < 2 else 101

        def cuDeviceGetPCIBusId(self, name: Any, length: int, handle: Any) -> int:
            name.value = f"0000:{handle.value:02X}:00.0".encode()[:length]
            return 0

    monkeypatch.setattr(near_device.ctypes, "CDLL", lambda _: Driver())
    assert pci_address(Device("cuda", "cuda:1", "second")) == "0000:0b:00.0"
    assert pci_address(Device("cuda", "cuda", "first")) == "0000:0a:00.0"
    assert pci_address(Device("cuda", "cuda:2", "none")) == ""
