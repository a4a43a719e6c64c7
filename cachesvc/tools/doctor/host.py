"""Checks of the machine: kernel, memory, processors, clock, limits. Each reads a few files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from kvist.cachesvc.tools.doctor.findings import Finding, Host
from kvist.proto.sizes import format_bytes

THP = "/sys/kernel/mm/transparent_hugepage"
# The sidecar's tables, its interpreter and gRPC beside the arena.
OWN_BYTES = 512 << 20
FILES_LOW, FILES_WANTED = 256, 4096
GOOD_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page", "xen")
CLOCK_S = 0.2
JUMP_S = 0.05


def kernel(host: Host) -> Finding:
    """Linux 5.14 has MADV_POPULATE_WRITE, 6.1 MADV_COLLAPSE; see proto/memory.py."""
    version = host.kernel
    text = host.text("/proc/sys/kernel/osrelease") or "unknown"
    if version >= (6, 1):
        return Finding("kernel", "ok", f"Linux {text}")
    lacks = "huge pages for the arena" if version >= (5, 14) else "quick populating of memory"
    fix = "run Linux 6.1 or newer (uname -r)"
    return Finding("kernel", "warn", f"Linux {text} lacks {lacks}", fix)


def huge_pages(host: Host) -> Finding:
    """Buffers for O_DIRECT are advised to be huge; "never" halves the rate of flash."""
    setting = host.chosen(f"{THP}/enabled")
    if setting in ("always", "madvise"):
        return Finding("huge pages", "ok", f"transparent huge pages: {setting}")
    found = f"transparent huge pages: {setting or 'not in this kernel'}; flash reads at half rate"
    fix = f"echo madvise | sudo tee {THP}/enabled"
    return Finding("huge pages", "warn", found, fix if setting else "")


def shm_huge_pages(host: Host) -> Finding:
    """The arena's pages are collapsed into huge ones since 6.1, whatever the setting."""
    setting = host.chosen(f"{THP}/shmem_enabled")
    if setting == "deny":
        fix = f"echo advise | sudo tee {THP}/shmem_enabled"
        return Finding("huge shm", "warn", "huge pages in /dev/shm are denied", fix)
    if host.kernel >= (6, 1):
        found = f"the arena gets huge pages by MADV_COLLAPSE; for others: {setting or 'unknown'}"
        return Finding("huge shm", "ok", found)
    if setting in ("always", "within_size", "advise", "force"):
        return Finding("huge shm", "ok", f"huge pages in /dev/shm: {setting}")
    fix = f"echo advise | sudo tee {THP}/shmem_enabled"
    return Finding("huge shm", "warn", f"huge pages in /dev/shm: {setting or 'unknown'}", fix)


def shm_room(host: Host, dram_bytes: int, held_bytes: int) -> Finding:
    """The arena and the index lie in /dev/shm.

    Args:
        held_bytes: that a running kvistd has of it already.
    """
    try:
        space = os.statvfs(host.path("/dev/shm"))
    except OSError as error:
        found = f"/dev/shm cannot be used: {error.strerror}"
        return Finding("/dev/shm", "bad", found, "sudo mount -t tmpfs tmpfs /dev/shm")
    size, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    found = f"{format_bytes(free)} free of {format_bytes(size)}"
    if dram_bytes <= free + held_bytes:
        return Finding("/dev/shm", "ok", found)
    wanted = format_bytes(dram_bytes + OWN_BYTES)
    return Finding(
        "/dev/shm",
        "bad",
        f"{found}, dram_bytes is {format_bytes(dram_bytes)}",
        f"sudo mount -o remount,size={wanted} /dev/shm (docker run --shm-size={wanted}), or lower "
        "dram_bytes",
    )


def memory(host: Host, dram_bytes: int, held_bytes: int) -> Finding:
    """What is free of the machine, and of the cgroup."""
    available = host.memory("MemAvailable") + held_bytes
    found = f"{format_bytes(available)} available"
    limit = host.cgroup("memory.max")
    if limit.isdecimal():
        found += f", cgroup limit {format_bytes(int(limit))}"
        available = min(available, int(limit))
    needed = dram_bytes + OWN_BYTES
    if needed <= available:
        return Finding("memory", "ok", found)
    words = f"{found}; dram_bytes and the sidecar need {format_bytes(needed)}"
    room = max(0, available - OWN_BYTES)
    fix = f"lower dram_bytes to {format_bytes(room)}, or raise memory.max of the cgroup"
    return Finding("memory", "bad", words, fix)


def locked_memory(host: Host, dram_bytes: int) -> Finding:
    """A device copies fastest from memory that is locked; a CPU engine needs none."""
    limit = host.limit("Max locked memory")
    if limit is None or limit >= dram_bytes:
        shown = "unlimited" if limit is None else format_bytes(limit)
        return Finding("memlock", "ok", shown)
    return Finding(
        "memlock",
        "warn",
        f"{format_bytes(limit)}; an engine on a GPU cannot pin the arena",
        "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity, docker: --ulimit memlock=-1)",
    )


def open_files(host: Host) -> Finding:
    """A session takes two descriptors, a connection one."""
    limit = host.limit("Max open files")
    if limit is None or limit >= FILES_WANTED:
        return Finding("open files", "ok", "unlimited" if limit is None else str(limit))
    level = "bad" if limit < FILES_LOW else "warn"
    fix = "ulimit -n 65536 (systemd: LimitNOFILE=65536)"
    return Finding("open files", level, f"{limit} at once", fix)  # type: ignore[arg-type]


def numa(host: Host) -> Finding:
    """Copies between nodes are slower by a third to a half."""
    nodes = sorted(host.path("/sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) < 2:
        return Finding("NUMA", "ok", "one node")
    shown = ", ".join(
        f"{node.name}: cores {host.text(f'/sys/devices/system/node/{node.name}/cpulist')}"
        for node in nodes[:4]
    )
    return Finding(
        "NUMA",
        "warn",
        f"{len(nodes)} nodes ({shown}); memory of another node is slower",
        "nothing if workers run on all of them: kvistd spreads the arena (dram_numa=auto); workers "
        "of one node: dram_numa=0, and numactl --cpunodebind=0 for kvistd and for them",
    )


def processors(host: Host) -> Finding:
    """Cores that may be used: affinity and the cgroup's quota."""
    cores = len(os.sched_getaffinity(0))
    quota = host.cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdecimal() and quota[1].isdecimal():
        share = int(quota[0]) / int(quota[1])
        if share < 1:
            fix = "raise cpu.max of the cgroup (docker --cpus, Kubernetes limits.cpu) to 1 or more"
            return Finding("cores", "warn", f"the cgroup gives {share:.2g} of a core", fix)
        return Finding("cores", "ok", f"{cores}, of which the cgroup gives {share:g}")
    return Finding("cores", "ok", str(cores))


def kernels(host: Host) -> Finding:
    """Which of the engine's CPU kernels this processor can run."""
    flags = _cpu_flags(host)
    if not flags:
        return Finding("processor", "warn", "its flags cannot be read; torch's kernels are used")
    if "avx512_bf16" in flags:
        vnni = " and VNNI" if "avx512_vnni" in flags else ""
        return Finding("processor", "ok", f"AVX-512 BF16{vnni}: the fast CPU kernels")
    best = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "no vector unit")
    found = f"{best}, no AVX-512 BF16: an engine on this CPU uses torch's kernels"
    return Finding(
        "processor", "warn", found, "nothing, or a processor from Zen 4 or Cooper Lake on"
    )


def _cpu_flags(host: Host) -> frozenset[str]:
    for line in host.text("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def openmp(host: Host) -> Finding:
    """More threads than cores take turns, and every barrier waits for a turn."""
    text = host.environment.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0))
    if not text.isdecimal():
        return Finding("OpenMP", "ok", "OMP_NUM_THREADS is not set; kvist serve --threads sets it")
    if int(text) <= cores:
        return Finding("OpenMP", "ok", f"OMP_NUM_THREADS={text}")
    found = f"OMP_NUM_THREADS={text} on {cores} cores; barriers wait for turns"
    return Finding("OpenMP", "warn", found, f"export OMP_NUM_THREADS={cores}")


def clock(
    host: Host,
    monotonic: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Finding:
    """Times are monotonic; a slow clock source costs 1 us a call, a jumping one confuses people."""
    source = host.text("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    before = wall() - monotonic()
    sleep(CLOCK_S)
    jump_s = abs(wall() - monotonic() - before)
    if jump_s > JUMP_S:
        found = (
            f"the wall clock jumped by {jump_s:.3f} s in {CLOCK_S} s; log times are not to trust"
        )
        return Finding("clock", "warn", found, "let chrony or ntpd slew it: chronyc makestep once")
    if source and source not in GOOD_CLOCKS:
        fix = "echo tsc | sudo tee /sys/devices/system/clocksource/clocksource0/current_clocksource"
        return Finding("clock", "warn", f"source {source}, slow to read", fix)
    return Finding("clock", "ok", f"source {source or 'unknown'}, steady")


def check_host(host: Host, dram_bytes: int, held_bytes: int) -> Sequence[Finding]:
    """All of the above.

    Args:
        dram_bytes: of the arena that there is or is to be.
        held_bytes: of it that a running kvistd has already.
    """
    return (
        kernel(host),
        huge_pages(host),
        shm_huge_pages(host),
        shm_room(host, dram_bytes, held_bytes),
        memory(host, dram_bytes, held_bytes),
        locked_memory(host, dram_bytes),
        open_files(host),
        numa(host),
        processors(host),
        kernels(host),
        openmp(host),
        clock(host),
    )
