"""Shared memory or descriptors that run out: an error at the start, never a dead process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.cachesvc.catalog.index import IndexWriter
from kvist.cachesvc.core.sessions import Sessions
from kvist.cachesvc.worker.ring import make_ring
from kvist.proto.record import PAGE_BYTES

# On a tmpfs of 256 KiB, in a mount namespace of its own.
FULL = """
import sys
from pathlib import Path
from kvist.cachesvc.catalog.index import IndexWriter
from kvist.cachesvc.worker.ring import RingWriter, make_ring
from kvist.proto.errors import ConfigInvalid
from kvist.proto.shm import TOUCH

folder = Path(sys.argv[1])
index = IndexWriter(folder / "index", 200, 0, 8192, bytes(16))
make_ring(folder / "ring")
with open(folder / "filler", "wb", buffering=0) as filler:
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError:
        pass
for number in range(200):
    index.insert(number.to_bytes(4, "little") * 4, number, None)
ring = RingWriter(folder / "ring")
for number in range(1000):
    ring.push(TOUCH, 1, bytes(16))
try:
    make_ring(folder / "other")
except OSError:
    assert not (folder / "other").exists()
try:
    IndexWriter(folder / "second", 10000, 0, 8192, bytes(16))
except ConfigInvalid:
    assert not (folder / "second").exists()
    print("survived")
"""


def backed(path: Path) -> bool:
    """Whether the file has all its memory."""
    found = path.stat()
    return found.st_blocks * 512 >= found.st_size > PAGE_BYTES


def test_the_memory_of_index_and_ring_is_claimed_before_anybody_touches_it(tmp_path: Path) -> None:
    index = IndexWriter(tmp_path / "index", 1000, 0, 8192, bytes(16))
    index.close()
    make_ring(tmp_path / "ring")
    assert backed(tmp_path / "index")
    assert backed(tmp_path / "ring")


def test_a_full_dev_shm_kills_neither_the_sidecar_nor_a_worker(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=256k kvist {tmp_path} && "
    private = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*private, mount + "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespaces here")
    run = f'{mount} exec "$0" -P -c "$1" {tmp_path}'
    done = subprocess.run(
        [*private, run, sys.executable, FULL], capture_output=True, text=True, cwd="/"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "survived"), done.stderr


def test_a_session_that_finds_no_descriptor_leaves_no_file_and_no_descriptor(
    tmp_path: Path,
) -> None:
    sessions = Sessions(tmp_path, "life")
    before = os.listdir("/proc/self/fd")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/", os.O_RDONLY)  # the lowest number that is free
    os.close(free)
    try:
        for spare in range(3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
            if spare < 2:  # a map takes a descriptor of its own
                with pytest.raises(OSError, match="Too many open files"):
                    sessions.open("test", 1, bytes(32))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)
    sessions.open("test", 1, bytes(32))
    sessions.close()
