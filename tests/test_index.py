"""The shared index: both halves, alone and against each other in two processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from kvist.cachesvc.catalog.index import IndexReader, IndexWriter, Location
from kvist.cachesvc.catalog.index_file import SPARE_BUCKETS, bucket_count
from kvist.proto.errors import FormatRefused, TierFull
from kvist.proto.keys import BlockKey, origin_of
from kvist.proto.shm import BUCKET_ROWS, DEPARTURES, FLASH_FAILED, FLASH_READY, FLASH_REBUILDING

EPOCH = bytes(range(16))

# Of the writer below.
BUCKETS = bucket_count(4000)


def key(first: int, second: int = 0, tail: int = 0) -> BlockKey:
    """A key whose buckets are first and second, in an index of up to 2**16 of them."""
    halves = (first + tail * BUCKETS, second + tail * BUCKETS)
    return BlockKey(b"".join(half.to_bytes(8, "little") for half in halves))


def random_keys(count: int) -> list[BlockKey]:
    return [BlockKey(os.urandom(16)) for _ in range(count)]


def drawn_keys(first: int, count: int) -> list[BlockKey]:
    numbers = range(first, first + count)
    return [BlockKey(hashlib.sha256(n.to_bytes(8, "little")).digest()[:16]) for n in numbers]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def writer(path: Path) -> Iterator[IndexWriter]:
    made = IndexWriter(path, dram_slots=1000, flash_slots=3000, slot_bytes=8192, boot_epoch=EPOCH)
    yield made
    made.close()


@pytest.fixture
def reader(writer: IndexWriter) -> Iterator[IndexReader]:
    opened = IndexReader(writer.path)
    yield opened
    opened.close()


def test_reader_finds_what_the_writer_put_where_it_put_it(
    writer: IndexWriter, reader: IndexReader
) -> None:
    keys = random_keys(4000)
    rows = [writer.insert(key, slot, None) for slot, key in enumerate(keys)]
    assert len(set(rows)) == len(rows) == writer.used_rows
    for slot, (row, each) in enumerate(zip(rows, keys, strict=True)):
        assert reader.find(each) == Location(slot, None)
        assert writer.locate(each) == row
        assert writer.key(row) == each
    assert not any(reader.find(each) for each in random_keys(1000))


def test_header_tells_what_a_worker_must_know(writer: IndexWriter, reader: IndexReader) -> None:
    assert reader.boot_epoch == EPOCH
    assert (reader.slot_bytes, reader.dram_slots) == (8192, 1000)
    writer.set_flash_state(FLASH_REBUILDING)
    writer.beat(123)
    assert reader.flash_state == FLASH_REBUILDING
    assert reader.heartbeat_ns == 123


def test_location_changes_in_place_and_slot_zero_is_a_slot(
    writer: IndexWriter, reader: IndexReader
) -> None:
    row = writer.insert(key(1), 0, None)
    writer.set_location(row, 0, 0)
    assert reader.find(key(1)) == Location(0, 0)
    writer.set_location(row, None, 2**32 - 2)
    assert reader.find(key(1)) == Location(None, 2**32 - 2)
    assert (writer.dram(row), writer.flash(row)) == (None, 2**32 - 2)


def test_removed_key_is_gone_and_comes_back_in_any_row(
    writer: IndexWriter, reader: IndexReader
) -> None:
    rows = [writer.insert(key(3, 4, tail), tail, None) for tail in range(1, 9)]
    writer.remove(rows[0])
    assert reader.find(key(3, 4, 1)) is None
    assert writer.is_free(rows[0])
    writer.insert(key(3, 4, 99), 7, None)
    writer.insert(key(3, 4, 1), 5, None)
    assert reader.find(key(3, 4, 1)) == Location(5, None)
    assert writer.used_rows == 9


def test_key_whose_buckets_are_full_is_refused_and_nothing_moves(
    writer: IndexWriter, reader: IndexReader
) -> None:
    keys = [key(7, 9, tail) for tail in range(2 * BUCKET_ROWS)]
    rows = [writer.insert(each, tail, None) for tail, each in enumerate(keys)]
    with pytest.raises(TierFull):
        writer.insert(key(7, 9, 99), 0, None)
    assert [writer.locate(each) for each in keys] == rows
    assert reader.find(key(7, 9, 99)) is None


def test_key_that_begins_amid_another_is_not_found(
    writer: IndexWriter, reader: IndexReader
) -> None:
    halves = [(5 + mark * BUCKETS).to_bytes(8, "little") for mark in range(4)]
    writer.insert(BlockKey(halves[0] + halves[1]), 1, None)
    writer.insert(BlockKey(halves[2] + halves[3]), 2, None)
    amid = BlockKey(halves[1] + halves[2])
    assert reader.find(amid) is None
    writer.insert(amid, 3, None)
    assert reader.find(amid) == Location(3, None)


def test_key_of_zeros_is_no_free_row(reader: IndexReader) -> None:
    assert reader.find(BlockKey(bytes(16))) is None


def test_index_has_seven_quarters_of_a_row_a_slot_and_some_spare_buckets() -> None:
    for slots in (1, 4, 5, 1000, 4096, 4097):
        rows = (bucket_count(slots) - SPARE_BUCKETS) * BUCKET_ROWS
        assert 1.75 * slots <= rows < 1.75 * slots + BUCKET_ROWS


@pytest.mark.parametrize("slots", [9, 40])
def test_a_small_cache_that_is_always_full_has_room_for_every_key(path: Path, slots: int) -> None:
    random, index, stored = Random(3), IndexWriter(path, slots, 0, 8192, EPOCH), list[int]()
    for _ in range(60_000):
        if len(stored) == slots:
            index.remove(stored.pop(random.randrange(slots)))
        stored.append(index.insert(BlockKey(random.randbytes(16)), len(stored), None))
    index.close()


def test_an_index_as_full_as_its_tiers_can_make_it_refuses_next_to_nothing(path: Path) -> None:
    slots = 100_000
    full = IndexWriter(path, slots, 0, 8192, EPOCH)
    refused = 0
    for number, each in enumerate(drawn_keys(0, slots)):
        try:
            full.insert(each, number, None)
        except TierFull:
            refused += 1
    full.close()
    assert refused <= 2, "of 100,000"


def test_longest_prefix_is_right_for_every_length(writer: IndexWriter, reader: IndexReader) -> None:
    keys = random_keys(70)
    for stored in range(len(keys) + 1):
        assert reader.longest_prefix(keys) == stored
        assert reader.longest_prefix(keys[: stored // 2]) == stored // 2
        if stored < len(keys):
            writer.insert(keys[stored], stored, None)


class CountedKeys(list[BlockKey]):
    reads = 0

    def __getitem__(self, at: object) -> BlockKey:  # type: ignore[override]
        self.reads += 1
        return super().__getitem__(at)  # type: ignore[index, return-value]


def test_longest_prefix_of_a_long_prompt_takes_a_dozen_probes(
    writer: IndexWriter, reader: IndexReader
) -> None:
    keys = random_keys(1563)
    for slot, each in enumerate(keys[:1000]):
        writer.insert(each, slot, None)
    counted = CountedKeys(keys)
    assert reader.longest_prefix(counted) == 1000
    assert counted.reads <= 12


def test_copies_on_flash_are_offered_only_while_flash_is_ready(
    writer: IndexWriter, reader: IndexReader
) -> None:
    keys = random_keys(4)
    writer.insert(keys[0], 1, 1)
    writer.insert(keys[1], None, 2)
    writer.insert(keys[2], None, 3)
    assert reader.longest_prefix(keys) == 1
    writer.set_flash_state(FLASH_READY)
    assert reader.longest_prefix(keys) == 3
    assert reader.miss_reason(keys[3]) == "never_stored"
    writer.set_flash_state(FLASH_FAILED)
    assert reader.longest_prefix(keys) == 1
    assert reader.miss_reason(keys[1]) == "flash_off"
    assert reader.miss_reason(keys[3]) == "never_stored"
    writer.set_flash_state(FLASH_REBUILDING)
    assert reader.miss_reason(keys[3]) == "flash_rebuilding"


@pytest.mark.parametrize("state", [FLASH_FAILED, FLASH_REBUILDING])
def test_prefix_ends_at_a_block_that_flash_cannot_give_now(
    writer: IndexWriter, reader: IndexReader, state: int
) -> None:
    prompt = [key(number) for number in range(4)]
    writer.insert(prompt[0], 0, None)
    writer.insert(prompt[1], None, 1)
    writer.insert(prompt[2], 2, None)
    writer.set_flash_state(FLASH_READY)
    assert reader.longest_prefix(prompt) == 3
    writer.set_flash_state(state)
    assert reader.longest_prefix(prompt) == 1
    assert reader.longest_prefix(prompt[:1]) == 1
    assert reader.longest_prefix(prompt[1:]) == 0
    assert reader.longest_prefix([]) == 0


def test_file_that_is_no_index_is_refused(writer: IndexWriter) -> None:
    path = writer.path
    whole = path.read_bytes()
    for damaged in (b"", b"KVIST", b"X" + whole[1:], whole[:-1], whole[:8] + b"\x09" + whole[9:]):
        other = path.with_name("other")
        other.write_bytes(damaged)
        with pytest.raises(FormatRefused, match="other"):
            IndexReader(other)
    with pytest.raises(FileNotFoundError):
        IndexReader(path.with_name("absent"))


def test_reader_of_an_earlier_life_keeps_its_own_file(
    path: Path, writer: IndexWriter, reader: IndexReader
) -> None:
    writer.insert(key(1), 1, None)
    IndexWriter(path, 10, 0, 8192, bytes(16)).close()
    assert reader.find(key(1)) == Location(1, None)


BUSY_WRITER = """
import sys, time, hashlib, pathlib
from kvist.cachesvc.catalog.index import IndexWriter
def key(n): return hashlib.sha256(n.to_bytes(8, "little")).digest()[:16]
index = IndexWriter(pathlib.Path(sys.argv[1]), 400, 0, 8192, bytes(16))
for n in range(50):
    index.insert(key(n), n, None)
print("ready", flush=True)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    rows = [index.insert(key(n), n, None) for n in range(50, 300)]
    for row in reversed(rows):
        index.remove(row)
"""


def test_reader_beside_a_busy_writer_sees_no_wrong_slot_and_no_lost_prefix(tmp_path: Path) -> None:
    keys = [BlockKey(hashlib.sha256(n.to_bytes(8, "little")).digest()[:16]) for n in range(300)]
    path = tmp_path / "index"
    child = subprocess.Popen(
        [sys.executable, "-c", BUSY_WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    reader = IndexReader(path)
    seen, wrong = set(), 0
    while child.poll() is None:
        length = reader.longest_prefix(keys)
        assert 50 <= length <= 300
        seen.add(length)
        for number in range(0, 300, 7):
            location = reader.find(keys[number])
            assert location is not None or number >= 50
            # A row that was given to another key between two looks; a record's header tells.
            wrong += location is not None and location.dram != number
        time.sleep(0)
    assert len(seen) > 3, "nothing raced"
    assert wrong <= 5
    reader.close()
    child.stdout.close()
    assert child.wait() == 0


def test_why_a_block_went_is_told_until_as_many_others_went_as_fit_into_the_tiers(
    tmp_path: Path,
) -> None:
    writer = IndexWriter(tmp_path / "index", 4096, 0, 4096, bytes(16))
    reader = IndexReader(tmp_path / "index")
    keys = drawn_keys(0, 16384)
    reasons = DEPARTURES[1:]
    for number, key in enumerate(keys):
        writer.departed.note(key, reasons[number % len(reasons)])
    told = [reader.miss_reason(key) for key in keys]
    assert told[-1000:] == [reasons[number % len(reasons)] for number in range(15384, 16384)]
    assert set(told[:1000]) == {"never_stored"}, "the oldest are forgotten"
    # 20,000 keys, each mistaken with a probability of 1.2e-7: 0.002 of them.
    assert {reader.miss_reason(key) for key in drawn_keys(1 << 20, 20_000)} == {"never_stored"}


def test_the_latest_reason_holds_and_a_block_that_is_back_goes_anew(
    writer: IndexWriter, reader: IndexReader
) -> None:
    writer.departed.note(key(1), "corrupt")
    row = writer.insert(key(1), 3, None)
    assert reader.offered(key(1))
    writer.remove(row)
    writer.departed.note(key(1), "evicted")
    assert reader.miss_reason(key(1)) == "evicted"
    writer.set_flash_state(FLASH_REBUILDING)
    assert reader.miss_reason(key(1)) == "flash_rebuilding"
    writer.departed.note(key(1), "corrupt")
    assert reader.miss_reason(key(1)) == "corrupt"


def test_a_first_block_is_known_elsewhere_only_while_it_is_not_here(
    writer: IndexWriter, reader: IndexReader
) -> None:
    here, there = bytes([1]) * 32, bytes([2]) * 32
    origin = origin_of("tenant", bytes(64))
    assert not reader.origins.elsewhere(origin, here)
    writer.origins.note(origin, there)
    assert reader.origins.elsewhere(origin, here)
    assert not reader.origins.elsewhere(origin, there)
    assert not reader.origins.elsewhere(origin_of("other tenant", bytes(64)), here)
    writer.origins.note(origin, here)
    assert not reader.origins.elsewhere(origin, here)
