"""What the engine takes of a machine: never more than its cgroups give it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvist.engine.host import free_memory_bytes, usable_cores

GIB = 1 << 30
MEMINFO = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {64 * GIB >> 10} kB\n"}


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def siblings(*cores: str) -> dict[str, str]:
    """Topology of CPUs 0, 1, ...: which hardware threads each one's core has."""
    name = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {name.format(number): core + "\n" for number, core in enumerate(cores)}


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        (siblings("0", "1", "2", "3"), 4),
        (siblings("0,2", "1,3", "0,2", "1,3"), 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        # A service of systemd: the limit is its own, or its slice's, and the root has none.
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "100000 100000\n",
            },
            1,
        ),
        ({"proc/self/cgroup": "0::/../other\n", "sys/fs/other/cpu.max": "100000 100000"}, 4),
    ],
)
def test_threads_are_the_cores_that_affinity_and_quotas_leave(
    tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    assert usable_cores(machine(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 64),
        (
            {
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/a/memory.max": str(8 * GIB),
                "sys/fs/cgroup/a/memory.current": str(5 * GIB),
                "sys/fs/cgroup/a/memory.stat": f"anon {GIB}\ninactive_file {3 * GIB}\n",
                "sys/fs/cgroup/memory.max": str(16 * GIB),
                "sys/fs/cgroup/memory.current": str(6 * GIB),
            },
            6,
        ),
        (
            {
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/a/memory.max": str(GIB),
                "sys/fs/cgroup/a/memory.current": str(2 * GIB),
            },
            0,
        ),
    ],
)
def test_free_memory_is_what_the_tightest_cgroup_leaves(
    tmp_path: Path, files: dict[str, str], gib: int
) -> None:
    assert free_memory_bytes(machine(tmp_path, MEMINFO | files)) == gib * GIB


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    assert free_memory_bytes() > 0
