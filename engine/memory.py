"""How much memory of the machine can still be taken."""

from __future__ import annotations

from pathlib import Path


def free_memory_bytes() -> int:
    """Memory that can still be taken: the machine's, cut by a cgroup limit if there is one."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass
    return free
