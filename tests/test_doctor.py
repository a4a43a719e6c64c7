"""`kvist cache doctor`: every check on files of its own, and the whole on this machine."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sim.sidecar import Prompt, Sidecar

from kvist.cachesvc.tools.doctor import disk as disk_checks
from kvist.cachesvc.tools.doctor import host as host_checks
from kvist.cachesvc.tools.doctor.examine import as_table, check_sidecar
from kvist.cachesvc.tools.doctor.findings import Finding, Host
from kvist.engine.cli import main

GIB = 1 << 30
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max open files            {files}                20000                files
Max locked memory         {locked}              8388608              bytes
"""


def host(tmp_path: Path, files: dict[str, str], **environment: str) -> Host:
    for name, text in files.items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "dev/shm").mkdir(parents=True, exist_ok=True)
    return Host(tmp_path, environment)


OSRELEASE = "/proc/sys/kernel/osrelease"
THP = "/sys/kernel/mm/transparent_hugepage"
SOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
NODES = "/sys/devices/system/node"
MEMINFO = "MemTotal: 33554432 kB\nMemAvailable: 8388608 kB\n"


@pytest.mark.parametrize(
    ("check", "files", "level", "words"),
    [
        (host_checks.kernel, {OSRELEASE: "6.8.0-31-generic\n"}, "ok", "6.8.0-31"),
        (host_checks.kernel, {OSRELEASE: "5.15.0"}, "warn", "huge pages for the arena"),
        (host_checks.kernel, {OSRELEASE: "4.19.0"}, "warn", "populating"),
        (host_checks.kernel, {}, "warn", "unknown"),
        (host_checks.huge_pages, {f"{THP}/enabled": "always [madvise] never"}, "ok", "madvise"),
        (host_checks.huge_pages, {f"{THP}/enabled": "always madvise [never]"}, "warn", "never"),
        (host_checks.huge_pages, {}, "warn", "not in this kernel"),
        (
            host_checks.shm_huge_pages,
            {f"{THP}/shmem_enabled": "always [never] deny", OSRELEASE: "6.8.0"},
            "ok",
            "never",
        ),
        (
            host_checks.shm_huge_pages,
            {f"{THP}/shmem_enabled": "always [never] deny", OSRELEASE: "5.15.0"},
            "warn",
            "never",
        ),
        (
            host_checks.shm_huge_pages,
            {f"{THP}/shmem_enabled": "always never [deny]", OSRELEASE: "6.8.0"},
            "warn",
            "denied",
        ),
        (
            host_checks.open_files,
            {"/proc/self/limits": LIMITS.format(files=20000, locked=1)},
            "ok",
            "20000",
        ),
        (
            host_checks.open_files,
            {"/proc/self/limits": LIMITS.format(files=1024, locked=1)},
            "warn",
            "1024",
        ),
        (
            host_checks.open_files,
            {"/proc/self/limits": LIMITS.format(files=64, locked=1)},
            "bad",
            "64",
        ),
        (host_checks.numa, {f"{NODES}/node0/cpulist": "0-7"}, "ok", "one node"),
        (
            host_checks.numa,
            {f"{NODES}/node0/cpulist": "0-7", f"{NODES}/node1/cpulist": "8-15"},
            "warn",
            "node1: cores 8-15",
        ),
        (
            host_checks.kernels,
            {"/proc/cpuinfo": "flags\t: fpu avx2 avx512f avx512_bf16 avx512_vnni\n"},
            "ok",
            "BF16 and VNNI",
        ),
        (host_checks.kernels, {"/proc/cpuinfo": "flags\t: fpu avx2\n"}, "warn", "avx2, no AVX"),
        (host_checks.kernels, {}, "warn", "cannot be read"),
        (
            host_checks.processors,
            {"/proc/self/cgroup": "0::/pod/a\n", "/sys/fs/cgroup/pod/cpu.max": "50000 100000"},
            "warn",
            "0.5 of a core",
        ),
        (
            host_checks.processors,
            {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000"},
            "ok",
            "",
        ),
        (host_checks.clock, {SOURCE: "tsc\n"}, "ok", "source tsc, steady"),
        (host_checks.clock, {SOURCE: "hpet\n"}, "warn", "slow to read"),
    ],
)
def test_a_check_says_what_the_files_of_the_host_say(
    tmp_path: Path, check: Callable[[Host], Finding], files: dict[str, str], level: str, words: str
) -> None:
    finding = check(host(tmp_path, files))
    assert finding.level == level, finding
    assert words in finding.found
    assert finding.level == "ok" or finding.fix or words in ("not in this kernel", "cannot be read")


def test_memory_counts_what_a_cgroup_allows_and_what_a_running_sidecar_has(tmp_path: Path) -> None:
    files = {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": "0::/job\n"}
    plain = host(tmp_path / "plain", files)
    assert host_checks.memory(plain, 4 * GIB, 0).level == "ok"
    over = host_checks.memory(plain, 8 * GIB, 0)
    assert over.level == "bad"
    assert over.fix.startswith("lower dram_bytes to 7.5GiB")
    assert host_checks.memory(plain, 8 * GIB, 8 * GIB).level == "ok"
    limited = host(tmp_path / "limited", {**files, "/sys/fs/cgroup/job/memory.max": str(2 * GIB)})
    finding = host_checks.memory(limited, 4 * GIB, 0)
    assert finding.level == "bad"
    assert "cgroup limit 2GiB" in finding.found


def test_shared_memory_must_have_room_for_the_arena(tmp_path: Path) -> None:
    there = host(tmp_path, {})
    assert host_checks.shm_room(there, 4096, 0).level == "ok"
    finding = host_checks.shm_room(there, 1 << 60, 0)
    assert finding.level == "bad"
    assert "mount -o remount,size=" in finding.fix
    assert host_checks.shm_room(there, 1 << 60, 1 << 60).level == "ok"
    assert host_checks.shm_room(Host(tmp_path / "none"), 4096, 0).level == "bad"


def test_locked_memory_is_compared_with_the_arena(tmp_path: Path) -> None:
    little = host(tmp_path / "a", {"/proc/self/limits": LIMITS.format(files=1, locked=8388608)})
    endless = host(
        tmp_path / "b", {"/proc/self/limits": LIMITS.format(files=1, locked="unlimited")}
    )
    assert host_checks.locked_memory(little, GIB).level == "warn"
    assert host_checks.locked_memory(little, 1 << 20).level == "ok"
    assert host_checks.locked_memory(endless, GIB).level == "ok"


def test_openmp_may_not_have_more_threads_than_there_are_cores(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert host_checks.openmp(host(tmp_path, {}, OMP_NUM_THREADS="1")).level == "ok"
    finding = host_checks.openmp(host(tmp_path, {}, OMP_NUM_THREADS=str(cores + 1)))
    assert (finding.level, finding.fix) == ("warn", f"export OMP_NUM_THREADS={cores}")
    assert host_checks.openmp(host(tmp_path, {})).level == "ok"


def test_a_wall_clock_that_jumps_is_found(tmp_path: Path) -> None:
    wall = iter((1000.0, 1003.0))
    steady = iter((0.0, 0.2))
    finding = host_checks.clock(
        host(tmp_path, {SOURCE: "tsc"}), lambda: next(steady), lambda: next(wall), lambda _s: None
    )
    assert finding.level == "warn"
    assert "jumped by 2.800 s" in finding.found


MOUNTS = """20 1 8:1 / / rw - ext4 /dev/vda rw
30 20 0:5 / /tmp/memory rw - tmpfs tmpfs rw
31 20 0:6 / /data rw - nfs4 server:/data rw
32 31 0:7 / /data/own\\040disk rw - xfs /dev/vdb rw
33 20 0:8 / /layer rw - overlay overlay rw
"""


@pytest.mark.parametrize(
    ("path", "level", "kind"),
    [
        ("/srv/flash", "ok", "ext4 on /"),
        ("/tmp/memory/flash", "warn", "tmpfs on /tmp/memory"),
        ("/data/flash", "bad", "nfs4 on /data"),
        ("/data/own disk/flash", "ok", "xfs on /data/own disk"),
        ("/data-not/flash", "ok", "ext4 on /"),
        ("/layer/flash", "warn", "overlay on /layer"),
    ],
)
def test_the_file_system_of_the_flash_folder_is_that_of_the_longest_mount(
    tmp_path: Path, path: str, level: str, kind: str
) -> None:
    finding = disk_checks.file_system(host(tmp_path, {"/proc/self/mountinfo": MOUNTS}), Path(path))
    assert finding.level == level
    assert finding.found.startswith(kind)


def test_the_probe_measures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    rates = disk_checks.probe(tmp_path, size=8 << 20, limit_s=0.5)
    assert rates.write > 0
    assert rates.read > 0
    assert list(tmp_path.iterdir()) == []


def test_flash_that_does_not_fit_or_cannot_be_written_is_bad(tmp_path: Path) -> None:
    assert disk_checks.flash_room(tmp_path, 4096).level == "ok"
    finding = disk_checks.flash_room(tmp_path, 1 << 60)
    assert finding.level == "bad"
    assert "lower flash_bytes to" in finding.fix
    file = tmp_path / "file"
    file.write_text("")
    (only,) = disk_checks.check_flash(Host(), file / "flash", 4096)
    assert only.level == "bad"
    (none,) = disk_checks.check_flash(Host(), None, 4096)
    assert (none.level, none.found) == ("ok", "flash_path is not set: no flash tier")


def test_folders_and_sockets_are_for_their_user_only(tmp_path: Path) -> None:
    def level(name: str, path: Path, kind: str) -> str:
        return disk_checks.access(name, path, kind).level

    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    assert level("run", folder, "folder") == "ok"
    folder.chmod(0o777)
    assert level("run", folder, "folder") == "bad"
    folder.chmod(0o1777)
    assert level("run", folder, "folder") == "warn"
    assert level("run", tmp_path / "missing", "folder") == "ok"
    assert level("socket", folder, "socket") == "bad"
    path = tmp_path / "kvistd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        assert level("socket", path, "socket") == "ok"
        path.chmod(0o666)
        assert level("socket", path, "socket") == "bad"


def test_a_running_sidecar_is_read_and_what_is_wrong_with_it_is_told() -> None:
    tier = {
        "tier": "dram", "state": "ready", "slots": 1024, "used_slots": 5, "slot_bytes": 1 << 20,
        "quarantined_slots": 2, "huge_bytes": 0,
    }  # fmt: skip
    flash = {**tier, "tier": "flash", "state": "failed", "failure": "EIO", "quarantined_slots": 0}
    stats = {
        "version": "0.0.1", "uptime_s": 5.0, "sessions": 1, "blocks": 5, "tiers": [tier, flash],
        "advice": [
            {"level": "note", "code": "dram-large", "what": "Half would do.", "do": "Lower it."},
            {"level": "warn", "code": "ring-drops", "what": "7 reports.", "do": "A core."},
        ],
    }  # fmt: skip
    findings = {one.name: one for one in check_sidecar(stats, "/run/x.sock")}
    assert findings["kvistd"].level == "warn"
    assert "0.0.1 runs" in findings["kvistd"].found
    assert findings["tier dram"].level == "warn"
    assert "0B in huge pages" in findings["tier dram"].found
    assert findings["dram damage"].level == "warn"
    assert findings["tier flash"].level == "bad"
    assert (findings["ring-drops"].level, findings["ring-drops"].fix) == ("warn", "A core.")
    assert findings["dram-large"].level == "ok"
    text = as_table(list(findings.values()))
    assert "BAD  tier flash" in text
    assert text.endswith("1 ok, 4 to look at, 1 bad")


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path_factory.mktemp("sidecar"))
    made.start()
    made.client().store(Prompt(1, 3).items)
    yield made
    made.close()


def doctor(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = main(["cache", "doctor", *flags])
    text = capsys.readouterr()
    return code, text.out, text.err


def test_on_this_machine_the_doctor_finds_the_sidecar_and_a_flash_folder_that_is_too_small(
    sidecar: Sidecar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--socket", str(sidecar.socket), "--dram-bytes", "8MiB"]
    flags += ["--http-listen", sidecar.said("page").removeprefix("http://").rstrip("/")]
    flags += ["--shm-dir", str(sidecar.folder / "shm")]
    code, out, _ = doctor(capsys, *flags, "--json")
    findings = {one["name"]: one for one in json.loads(out)["findings"]}
    assert f"1 worker, 3 blocks, at {sidecar.socket}" in findings["kvistd"]["found"]
    assert findings["kvistd"]["level"] == "ok"
    assert findings["tier dram"]["level"] == "ok"
    assert code == int(any(one["level"] == "bad" for one in findings.values()))
    flags += ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "1000TiB"]
    code, out, _ = doctor(capsys, *flags)
    assert code == 1
    assert "BAD  flash room" in out
    assert "-> lower flash_bytes to" in out


def test_a_running_sidecar_says_what_its_settings_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sidecar = Sidecar(tmp_path, ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "64MiB"])
    sidecar.start()
    sidecar.client().store(Prompt(1, 3).items)
    _, out, _ = doctor(capsys, "--socket", str(sidecar.socket))
    sidecar.close()
    assert "flash_path is not set" not in out
    assert "flash rate" in out
    assert f"{tmp_path}/shm, mode" in out


def test_without_a_sidecar_the_checks_are_those_before_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--socket", str(tmp_path / "none.sock"), "--http-listen", "", "--dram-bytes", "8MiB"]
    _, out, _ = doctor(capsys, *flags)
    assert f"--socket: no sidecar answers at {tmp_path}/none.sock: No such file" in out
    code, out, error = doctor(capsys, "--dram-bytes", "lots")
    assert (code, out) == (2, "")
    assert "dram_bytes" in error
