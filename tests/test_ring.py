"""The ring between a worker and the sidecar: order, fullness, counters, the lock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist.cachesvc.worker.ring import Entry, RingReader, RingWriter, make_ring
from kvist.proto.errors import FormatRefused
from kvist.proto.keys import BlockKey
from kvist.proto.shm import COUNTERS, HEAD_OFFSET, PREFETCH, TOUCH

KEY = BlockKey(bytes(range(16)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_ring(tmp_path / "ring", entries=8)
    return tmp_path / "ring"


@pytest.fixture
def reader(path: Path) -> Iterator[RingReader]:
    opened = RingReader(path)
    yield opened
    opened.close()


@pytest.fixture
def writer(path: Path) -> Iterator[RingWriter]:
    opened = RingWriter(path, lambda: 77)
    yield opened
    opened.close()


def test_entries_come_out_in_order_and_once(writer: RingWriter, reader: RingReader) -> None:
    for round_ in range(5):  # more than once around
        for blocks in range(6):
            assert writer.push(TOUCH if blocks % 2 else PREFETCH, 10 * round_ + blocks, KEY)
        first, rest = reader.drain(2), reader.drain(100)
        assert [entry.blocks for entry in first + rest] == [10 * round_ + n for n in range(6)]
        assert first[1] == Entry(TOUCH, 10 * round_ + 1, KEY, 77)
        assert reader.drain(100) == []


def test_full_ring_takes_nothing_and_loses_nothing(writer: RingWriter, reader: RingReader) -> None:
    taken = [writer.push(TOUCH, blocks, KEY) for blocks in range(10)]
    assert taken == [True] * 8 + [False] * 2
    assert [entry.blocks for entry in reader.drain(100)] == list(range(8))
    assert writer.push(TOUCH, 99, KEY)


def test_counters_add_up_and_do_not_mix(writer: RingWriter, reader: RingReader) -> None:
    for amount, name in enumerate(COUNTERS):
        writer.add(name, amount)
        writer.add(name, 1000)
    assert reader.counters() == {name: 1000 + amount for amount, name in enumerate(COUNTERS)}


def test_head_that_makes_no_sense_is_skipped(
    path: Path, writer: RingWriter, reader: RingReader
) -> None:
    for head in (1000, 2**64 - 1):
        with path.open("r+b") as file:
            file.seek(HEAD_OFFSET)
            file.write(head.to_bytes(8, "little"))
        assert reader.drain(100) == []
        assert reader.drain(100) == []
    del writer


def test_lock_is_held_from_making_to_close(path: Path, reader: RingReader) -> None:
    writer = RingWriter(path)
    assert not reader.worker_is_gone()
    with pytest.raises(BlockingIOError):
        RingWriter(path)
    writer.close()
    assert reader.worker_is_gone()
    with pytest.raises(BlockingIOError):
        RingWriter(path)


def test_lock_goes_with_a_killed_process_and_its_counters_stay(
    path: Path, reader: RingReader
) -> None:
    program = (
        "import sys, pathlib, time\n"
        "from kvist.cachesvc.worker.ring import RingWriter\n"
        "ring = RingWriter(pathlib.Path(sys.argv[1]))\n"
        "ring.add('stored_bytes', 3)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert not reader.worker_is_gone()
        child.kill()
    assert reader.worker_is_gone()
    assert reader.counters()["stored_bytes"] == 3


def test_file_that_is_no_ring_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for damaged in (b"", b"KVIST", b"X" + whole[1:], whole[:-64]):
        path.write_bytes(damaged)
        with pytest.raises(FormatRefused):
            RingWriter(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        RingWriter(path)
