"""Checks of the folders: the flash folder with a short probe of its disk, and who may enter."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvist.cachesvc.tools.doctor.findings import Finding, Host, Level
from kvist.proto.sizes import format_bytes
from kvist.tiers.segment import aligned_buffer

PROBE_BYTES = 64 << 20
PROBE_S = 1.0
CHUNK_BYTES = 2 << 20
PROBE_NAME = "doctor-probe-"
# Below it a block of 2 MiB takes longer from disk than many a model needs to compute it.
SLOW_BYTES_PER_S = 500e6
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs")


def mount_of(host: Host, path: Path) -> tuple[str, str]:
    """File system and mount point that a path is on, from /proc/self/mountinfo."""
    best = ("unknown", "/")
    for line in host.text("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, point = right.split(), left.split()[4].replace("\\040", " ")
        is_above = point == "/" or path == Path(point) or Path(point) in path.parents
        if fields and is_above and len(point) >= len(best[1]):
            best = fields[0], point
    return best


def file_system(host: Host, path: Path) -> Finding:
    """A flash tier in memory, or over a network, is none."""
    kind, point = mount_of(host, path)
    found = f"{kind} on {point}"
    if kind in MEMORY_FILE_SYSTEMS:
        fix = "give a folder on a disk: flash_path"
        return Finding("flash disk", "warn", f"{found} is memory, gone with a restart", fix)
    if kind in NETWORK_FILE_SYSTEMS:
        fix = "give a folder on a disk of this node: flash_path"
        return Finding("flash disk", "bad", f"{found} is another machine's", fix)
    if kind == "overlay":
        fix = "mount a volume for it: docker run -v /data/kvist:/flash"
        return Finding("flash disk", "warn", f"{found}: a container's own layer", fix)
    return Finding("flash disk", "ok", found)


def flash_room(path: Path, flash_bytes: int) -> Finding:
    """Whether flash_bytes fit; what Kvist has there already counts as room."""
    space = os.statvfs(path)
    held = sum(entry.stat().st_blocks * 512 for entry in os.scandir(path) if entry.is_file())
    free = space.f_bavail * space.f_frsize
    found = f"{format_bytes(free)} free"
    if flash_bytes <= free + held:
        return Finding("flash room", "ok", found)
    return Finding(
        "flash room",
        "bad",
        f"{found} and {format_bytes(held)} held, flash_bytes is {format_bytes(flash_bytes)}",
        f"lower flash_bytes to {format_bytes(free + held)}, or make room (df -h {path})",
    )


@dataclass(frozen=True, slots=True)
class Rates:
    """What a probe measured, bytes per second; is_direct: the page cache was not in between."""

    write: float
    read: float
    is_direct: bool


def probe(path: Path, size: int = PROBE_BYTES, limit_s: float = PROBE_S) -> Rates:
    """Write a file in chunks and read it again, each for limit_s at most; the file goes.

    Raises: OSError.
    """
    file = path / f"{PROBE_NAME}{secrets.token_hex(4)}"
    buffer = aligned_buffer(CHUNK_BYTES)
    buffer[:8] = secrets.token_bytes(8)
    try:
        handle, is_direct = _open(file)
        try:
            written, write_s = _timed(handle, buffer, size, limit_s, os.pwritev)
            os.fsync(handle)
            read, read_s = _timed(handle, buffer, written, limit_s, os.preadv)
        finally:
            os.close(handle)
    finally:
        with suppress(FileNotFoundError):
            file.unlink()
    return Rates(written / write_s, read / read_s, is_direct)


def _open(file: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(file, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        file.unlink(missing_ok=True)
        return os.open(file, flags, 0o600), False


def _timed(
    handle: int, buffer: memoryview, size: int, limit_s: float, move: object
) -> tuple[int, float]:
    """Bytes moved, and seconds."""
    assert callable(move)
    done, started = 0, time.perf_counter()
    while done < size and (not done or time.perf_counter() - started < limit_s):
        done += int(move(handle, [buffer], done))
    return done, max(1e-9, time.perf_counter() - started)


def disk_rate(path: Path) -> Finding:
    """How fast the flash folder's disk is, in the way that Kvist uses it."""
    try:
        rates = probe(path)
    except OSError as error:
        fix = f"look at the disk: dmesg | tail; touch {path}/x"
        return Finding("flash rate", "bad", f"cannot write and read: {error.strerror}", fix)
    found = f"writes {rates.write / 1e9:.2f} GB/s, reads {rates.read / 1e9:.2f} GB/s"
    if not rates.is_direct:
        fix = "put flash_path on ext4 or xfs"
        return Finding("flash rate", "warn", f"{found}, through the page cache: no O_DIRECT", fix)
    if rates.read < SLOW_BYTES_PER_S:
        fix = "put flash_path on an NVMe disk, or do without: engines weigh loads by this rate"
        return Finding("flash rate", "warn", f"{found}, O_DIRECT: slow", fix)
    return Finding("flash rate", "ok", f"{found}, O_DIRECT, {mmap.PAGESIZE} B pages")


def check_flash(host: Host, path: Path | None, flash_bytes: int) -> Sequence[Finding]:
    """Everything about the flash folder; nothing is left in it."""
    if path is None:
        return (Finding("flash", "ok", "flash_path is not set: no flash tier"),)
    folder = path
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        fix = f"sudo mkdir -p {path} && sudo chown $USER {path}"
        return (Finding("flash", "bad", f"{path} cannot be written by this user", fix),)
    return (file_system(host, folder), flash_room(folder, flash_bytes), disk_rate(folder))


def access(name: str, path: Path, wanted: str) -> Finding:
    """Who may enter a folder or a socket: its user only.

    Args:
        wanted: "folder" or "socket".
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return Finding(name, "ok", f"{path} is not there yet; kvistd makes it")
    except OSError as error:
        fix = f"ls -ld {path.parent}; run as the user of kvistd, or give another path"
        return Finding(name, "bad", f"{path}: {error.strerror}", fix)
    is_it = stat.S_ISSOCK(status.st_mode) if wanted == "socket" else stat.S_ISDIR(status.st_mode)
    if not is_it:
        return Finding(name, "bad", f"{path} is no {wanted}", f"mv {path} {path}.old")
    mode = stat.S_IMODE(status.st_mode)
    found = f"{path}, mode {mode:04o}, user {status.st_uid}"
    if status.st_uid != os.geteuid() and os.geteuid():
        fix = "run the tools and the engines as that user"
        return Finding(name, "bad", f"{found}: another user's", fix)
    if wanted == "socket" and mode & 0o077:
        fix = f"chmod 600 {path}"
        return Finding(name, "bad", f"{found}: others may read and change the cache", fix)
    if wanted == "folder" and mode & 0o022:
        level: Level = "warn" if mode & stat.S_ISVTX else "bad"
        fix = f"chmod go-w {path}, or give a folder of its own"
        return Finding(name, level, f"{found}: others may write in it", fix)
    return Finding(name, "ok", found)
