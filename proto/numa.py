"""NUMA: which memory is near which cores; where a map of a shared file is to lie, and does lie.

A policy that mbind(2) gives to a map of a file in /dev/shm belongs to the file (shared policy), so
whoever maps it and touches a page first, sidecar or worker, gets the page where the policy says.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.proto.errors import ConfigInvalid
from kvist.proto.memory import HUGE_BYTES

NODES = "sys/devices/system/node"
AUTO, INTERLEAVE, OFF = "auto", "interleave", "off"
# Each stripe is a map of its own to the kernel, of which a process may have 65530.
STRIPES_MAX = 1024

# The node is asked first; when it is full the memory comes from another one. MPOL_BIND would end
# the toucher instead.
_MPOL_PREFERRED = 1
# Of mbind; libc has no name for it, only libnuma does.
_CALLS = {"x86_64": 237, "aarch64": 235, "riscv64": 235, "ppc64le": 259, "s390x": 268}
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Node:
    """A node that has memory.

    Attributes:
        number: of the node. cores: of it; none where it is memory alone, as of a GPU or over CXL.
    """

    number: int
    cores: frozenset[int]


def memory_nodes(root: Path = Path("/")) -> list[Node]:
    """Nodes with memory that this process may use; empty where the kernel knows no nodes.

    Args:
        root: before /sys and /proc.
    """
    allowed = _allowed(root)
    nodes = []
    for number in sorted(parse_list(_text(root / NODES / "has_memory"))):
        if allowed is None or number in allowed:
            cores = parse_list(_text(root / NODES / f"node{number}" / "cpulist"))
            nodes.append(Node(number, cores))
    return nodes


def _allowed(root: Path) -> frozenset[int] | None:
    """By the cpuset; None where that is not said."""
    for line in _text(root / "proc/self/status").splitlines():
        if line.startswith("Mems_allowed_list:"):
            return parse_list(line.partition(":")[2])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def parse_list(text: str) -> frozenset[int]:
    """Numbers as the kernel lists them, like 0-3,8; what is no number is left out."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def chosen_nodes(wanted: str, nodes: Sequence[Node], cores: Collection[int]) -> tuple[int, ...]:
    """Where the arena is to lie.

    Args:
        wanted: a setting: "auto", "interleave", "off" or the number of a node.
        nodes: with memory. cores: that this process may run on.

    Returns: one node, or several over which it is spread; none leaves it to the kernel, which takes
        the node of whoever touches a page first.

    Raises: ConfigInvalid: the node is not there.
    """
    if wanted == OFF:
        return ()
    if wanted not in (AUTO, INTERLEAVE):
        if int(wanted) in {node.number for node in nodes}:
            return (int(wanted),)
        there = ", ".join(str(node.number) for node in nodes) or "none that the kernel tells"
        raise ConfigInvalid(
            f"dram_numa: no node {wanted} whose memory kvistd may use; nodes with memory: {there}; "
            "give one of them, or auto, interleave or off"
        )
    # A node without cores is slow memory, or a device's; who wants that gives its number.
    near = [node for node in nodes if node.cores]
    if len(near) < 2:
        return ()
    if wanted == AUTO:
        near = [node for node in near if not node.cores.isdisjoint(cores)]
    return tuple(node.number for node in near)


def place(memory: memoryview, nodes: Sequence[int]) -> None:
    """Say where the pages of a shared map are to come from; before the first of them is there.

    Several nodes take stripes in turn. The kernel's own interleaving goes by pages, and a huge page
    is made on the node where most of its small ones are, or its first: with two nodes always on
    node 0.

    Args:
        memory: of a map that begins at a multiple of HUGE_BYTES. nodes: >= 1.

    Raises: OSError: the kernel refuses.
    """
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert start % HUGE_BYTES == 0, "not the beginning of a mapping"
    stripe = len(memory) if len(nodes) == 1 else stripe_bytes(len(memory))
    for number, offset in enumerate(range(0, len(memory), stripe)):
        length = min(stripe, len(memory) - offset)
        _prefer(start + offset, length, nodes[number % len(nodes)])


def stripe_bytes(length: int) -> int:
    """Of a map that is spread over several nodes: as small as huge pages and STRIPES_MAX allow."""
    return -(-length // (STRIPES_MAX * HUGE_BYTES)) * HUGE_BYTES


def _prefer(start: int, length: int, node: int) -> None:
    call = _CALLS.get(platform.machine())
    if call is None:
        raise OSError(errno.ENOSYS, f"mbind is not known here for {platform.machine()}")
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[-1] = 1 << node % 64
    whole = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    # The kernel reads one bit less than it is told.
    outcome = _libc.syscall(
        ctypes.c_long(call), ctypes.c_void_p(start), ctypes.c_size_t(whole),
        ctypes.c_int(_MPOL_PREFERRED), mask, ctypes.c_ulong(64 * words + 1), ctypes.c_uint(0),
    )  # fmt: skip
    if outcome:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def placement(memory: memoryview, maps: Path = Path("/proc/self/numa_maps")) -> dict[int, int]:
    """Bytes of a map on each node, as far as this process has touched it; {} if it is not told.

    The kernel walks the map for it: 10 ms a GiB of small pages, next to nothing of huge ones.
    """
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    found: dict[int, int] = {}
    for line in _text(maps).splitlines():
        first, *words = line.split()
        if start <= int(first, 16) < start + len(memory):
            sizes = dict(word.partition("=")[::2] for word in words)
            page_bytes = int(sizes.get("kernelpagesize_kB", "4")) << 10
            for word, count in sizes.items():
                if word[:1] == "N" and word[1:].isdecimal():
                    node = int(word[1:])
                    found[node] = found.get(node, 0) + int(count) * page_bytes
    return found
