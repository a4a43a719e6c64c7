"""What of the machine this process may use: cores and memory, cut by the limits of its cgroups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may compute on: its affinity mask, cut by quotas of its cgroups.

    Hardware threads of one core count as one: they share its vector units, and a second one that
    waits for them takes them from the first. Without the quota a container with a limit of 2 on a
    machine of 64 would start 64 threads that take turns on 2 cores, which is slower than 2 threads
    by a factor, not by a share.

    Args:
        root: where /proc and /sys are.
    """
    mask = os.sched_getaffinity(0)
    cores = float(len({_siblings(root, cpu) for cpu in mask}))
    for folder in _cgroups(root):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def free_memory_bytes(root: Path = ROOT) -> int:
    """Memory that can still be taken: the machine's, cut by limits of this process's cgroups.

    What a cgroup has in file pages that were not used lately is free, as it is for the machine:
    a model's file that was read is such, and would count as used otherwise.

    Args:
        root: where /proc and /sys are.
    """
    free = _fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    for folder in _cgroups(root):
        limit, used = _text(folder / "memory.max"), _text(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            idle = _fields(folder / "memory.stat").get("inactive_file", 0)
            free = min(free, int(limit) - int(used) + idle)
    return max(0, free)


def _siblings(root: Path, cpu: int) -> str:
    """The hardware threads of a CPU's core; the CPU alone where that is not told."""
    place = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _text(place) or str(cpu)


def _cgroups(root: Path) -> Iterator[Path]:
    """Folders of this process's cgroup (version 2) and of those above: each limits it.

    In a container the namespace has the container's own as its root; a service of systemd is
    some levels below.
    """
    lines = _text(root / "proc/self/cgroup").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    parts = [part for part in path.split("/") if part]
    # A path that leads out of the namespace names nothing that can be read here.
    depth = 0 if ".." in parts else len(parts)
    for level in range(depth, -1, -1):
        yield (root / "sys/fs/cgroup").joinpath(*parts[:level])


def _fields(path: Path) -> dict[str, int]:
    """A file of lines that begin with a name and a number."""
    words = (line.split() for line in _text(path).splitlines())
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdigit()}


def _text(path: Path) -> str:
    """A file's text; "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
