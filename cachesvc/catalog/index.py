"""The shared index: which block is where. One writer, the sidecar; readers map it, nobody locks.

The bytes are those of proto/shm.py. A row that was given to a key keeps its number until the key
is removed, so row numbers serve as block ids in the sidecar's own tables.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.departed import Departed, Origins, departed_buckets
from kvist.cachesvc.catalog.hidden import REASONS, Hidden, masked
from kvist.cachesvc.catalog.index_file import bucket_count, file_bytes, map_index
from kvist.cachesvc.catalog.location import (
    Location,
    dram_copies,
    dram_half,
    pack_location,
    unpack_location,
)
from kvist.cachesvc.core.claims import ClaimTable
from kvist.proto.errors import ConfigInvalid, FormatRefused, TierFull
from kvist.proto.keys import KEY_BYTES, BlockKey
from kvist.proto.shm import (
    BUCKET_BYTES,
    BUCKET_KEYS_BYTES,
    BUCKET_ROWS,
    DEPARTED_BUCKET,
    FLASH_FAILED,
    FLASH_OFF,
    FLASH_READY,
    FLASH_REBUILDING,
    FLASH_STATE_OFFSET,
    FLASH_UNREAD,
    HEADER_BYTES,
    HEARTBEAT_OFFSET,
    INDEX_HEADER,
    INDEX_MAGIC,
    LOW_HALF,
    ORIGIN_BUCKET,
    ORIGIN_BUCKETS,
    RISING,
    SESSIONS_OFFSET,
    SHM_VERSION,
    VERIFY_OFFSET,
)
from kvist.proto.verify import VERIFY, Verify

__all__ = ["Location", "pack_location", "unpack_location"]

_HALVES = Struct("<QQ")
_FREE_KEY = bytes(KEY_BYTES)
_BUCKET_WORDS = BUCKET_BYTES // 8
_KEYS_WORDS = BUCKET_KEYS_BYTES // 8
_HEADER_WORDS = HEADER_BYTES // 8


class _Table:
    """The mapped file and how to find a key in it; what both halves share."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._map = mapped
        self._words = memoryview(mapped).cast("Q")
        fields = INDEX_HEADER.unpack_from(mapped)
        self.boot_epoch: Final[bytes] = fields[3]
        self.buckets: Final[int] = fields[4]
        self.slot_bytes: Final[int] = fields[5]
        self.dram_slots: Final[int] = fields[6]
        whole = memoryview(mapped)
        start = HEADER_BYTES + self.buckets * BUCKET_BYTES
        stop = start + fields[8] * DEPARTED_BUCKET.size
        end = stop + ORIGIN_BUCKETS * ORIGIN_BUCKET.size
        views = whole[start:stop], whole[stop:end], whole[end:]
        self.departed: Final = Departed(views[0])
        self.origins: Final = Origins(views[1])
        self.claims: Final = ClaimTable(views[2])
        self._views = (*views, whole, self._words)

    @property
    def flash_state(self) -> int:
        """One of the FLASH_ states of proto/shm.py."""
        return int.from_bytes(self._map[FLASH_STATE_OFFSET : FLASH_STATE_OFFSET + 4], "little")

    @property
    def sessions(self) -> int:
        """Workers attached, the reader's own included."""
        return int(self._words[SESSIONS_OFFSET // 8])

    @property
    def dram_verify(self) -> Verify:
        """What of a block in DRAM its reader checks. Raises: FormatRefused: none that we know."""
        number = int.from_bytes(self._map[VERIFY_OFFSET : VERIFY_OFFSET + 4], "little")
        if number >= len(VERIFY):
            raise FormatRefused(f"dram_verify {number} is unknown; run one version of Kvist")
        return VERIFY[number]

    @property
    def heartbeat_ns(self) -> int:
        """CLOCK_MONOTONIC of the sidecar's last sign of life."""
        return int(self._words[HEARTBEAT_OFFSET // 8])

    def _word_at(self, key: bytes, written: bytes = b"") -> int:
        """Position of the key's location word in _words; 0, which is no such position, if none.

        Args:
            written: what is to stand there, if not the key itself.

        mmap.find over the 128 key bytes of a bucket is the fastest probe in pure Python: 0.4 us.
        A stale copy of the key in a freed row, or one that begins amid a row, is stepped over.
        """
        find, words, written = self._map.find, self._words, written or key
        for half in _HALVES.unpack(key):
            bucket = half % self.buckets
            start = HEADER_BYTES + bucket * BUCKET_BYTES
            at = find(written, start, start + BUCKET_KEYS_BYTES)
            while at >= 0:
                way, rest = divmod(at - start, KEY_BYTES)
                if not rest:
                    word_at: int = _HEADER_WORDS + bucket * _BUCKET_WORDS + _KEYS_WORDS + way
                    if words[word_at]:
                        return word_at
                at = find(written, at + 1, start + BUCKET_KEYS_BYTES)
        return 0

    def find(self, key: BlockKey) -> Location | None:
        """Where a block is, or None when no tier holds it. About 2 us."""
        word_at = self._word_at(key)
        return unpack_location(self._words[word_at]) if word_at else None

    def dram_slot(self, key: BlockKey) -> int | None:
        """DRAM slot of a block, or None when it has no copy there: find for those in a hurry."""
        word_at = self._word_at(key)
        low = dram_half(self._words[word_at]) if word_at else 0
        return low - 1 if low else None

    def offered(self, key: BlockKey) -> bool:
        """Whether a copy can be read now: in DRAM, or on flash while flash is ready."""
        word_at = self._word_at(key)
        if not word_at:
            return False
        word = self._words[word_at]
        return bool(dram_half(word)) or (word != 0 and self.flash_state == FLASH_READY)

    def longest_prefix(self, keys: Sequence[BlockKey]) -> int:
        """How many keys of a prompt are offered, counted from its first.

        Binary search, because the stored keys of a prompt are a prefix of its list: 11 probes
        for 1563 keys. The writer may evict meanwhile: the last block found is looked at once
        more, and if it went the search goes on below it. A prefix that is still too long or too
        short by then is a miss or a recompute, never a wrong block.

        While flash is away what is offered may have gaps, because the beginning of a prompt may
        be on flash only; then every key is looked at, up to the first gap.

        Args:
            keys: of one prompt, first block first.
        """
        if self.flash_state in (FLASH_FAILED, FLASH_REBUILDING):
            return next((at for at, key in enumerate(keys) if not self.offered(key)), len(keys))
        high = len(keys)
        while high:
            low = 0
            while low < high:
                middle = (low + high) // 2
                if self.offered(keys[middle]):
                    low = middle + 1
                else:
                    high = middle
            if not low or self.offered(keys[low - 1]):
                return low
            high = low - 1
        return 0

    def miss_reason(self, key: BlockKey) -> str:
        """Why a block is not offered, one of proto.shm.MISS_REASONS."""
        state = self.flash_state
        if self._word_at(key) and state != FLASH_READY:
            return "flash_rebuilding" if state == FLASH_REBUILDING else "flash_off"
        departure = self._hidden_for(key) or self.departed.reason(key)
        if state == FLASH_REBUILDING and departure != "corrupt":
            return "flash_rebuilding"
        return departure or ("flash_off" if state == FLASH_UNREAD else "never_stored")

    def _hidden_for(self, key: BlockKey) -> str:
        """Why a block was given up that is not dropped yet; "" when none was."""
        numbers = range(1, len(REASONS))
        return next((REASONS[at] for at in numbers if self._word_at(key, masked(key, at))), "")

    def close(self) -> None:
        """Unmap; nothing is looked up after it."""
        for view in self._views:
            view.release()
        self._map.close()


class IndexReader(_Table):
    """A worker's view of the index. Threads may share one.

    Raises:
        OSError: it cannot be opened; most likely the sidecar is not up.
        FormatRefused: the file is not an index of this version.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(map_index(path))


def _key_at(row: int) -> int:
    bucket, way = divmod(row, BUCKET_ROWS)
    return HEADER_BYTES + bucket * BUCKET_BYTES + way * KEY_BYTES


class IndexWriter(_Table):
    """The sidecar's half. One thread.

    Attributes:
        rows: row numbers are below this.
        used_rows: rows that hold a block.
        hidden: those of them that no key leads to any more.

    Args:
        path: made anew; a file that is there is unlinked, so old readers keep the old one.
        dram_slots: slots of the arena.
        flash_slots: slots of the flash tier, 0 without one.
        slot_bytes: bytes of a DRAM slot.
        boot_epoch: 16 random bytes.

    Raises: ConfigInvalid: the file system has no room for it.
    """

    def __init__(
        self, path: Path, dram_slots: int, flash_slots: int, slot_bytes: int, boot_epoch: bytes
    ) -> None:
        buckets = bucket_count(dram_slots + flash_slots)
        departed = departed_buckets(dram_slots + flash_slots)
        size = file_bytes(buckets, departed)
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Its memory now: to touch a page that a full /dev/shm cannot give ends the toucher,
            # and a worker that only reads touches it too.
            os.posix_fallocate(handle, 0, size)
            mapped = mmap.mmap(handle, 0)
        except OSError as error:
            path.unlink()
            raise ConfigInvalid(
                f"dram_bytes, flash_bytes: {path.parent} has no room for an index of"
                f" {size} bytes ({error.strerror}); give it more room (docker"
                " run --shm-size) or lower them"
            ) from error
        finally:
            os.close(handle)
        INDEX_HEADER.pack_into(
            mapped, 0, INDEX_MAGIC, SHM_VERSION, FLASH_OFF, boot_epoch, buckets, slot_bytes,
            dram_slots, 0, departed, 0,
        )  # fmt: skip
        super().__init__(mapped)
        self.path = path
        self.rows = buckets * BUCKET_ROWS
        self.used_rows = 0
        self.hidden: Final = Hidden(self._words, self.rows)

    def locate(self, key: BlockKey) -> int | None:
        """Row of a key, or None when the block is not stored."""
        word_at = self._word_at(key)
        if not word_at:
            return None
        bucket, rest = divmod(word_at - _HEADER_WORDS, _BUCKET_WORDS)
        return bucket * BUCKET_ROWS + rest - _KEYS_WORDS

    def insert(self, key: BlockKey, dram: int | None, flash: int | None) -> int:
        """Give a key a row and make it visible.

        Args:
            key: not in the index.
            dram, flash: slots; at least one is not None.

        Returns: its row.

        Raises: TierFull when both buckets are full; the index is as before.
        """
        assert dram is not None or flash is not None
        row = self._free_row(key)
        start = _key_at(row)
        self._map[start : start + KEY_BYTES] = key
        self._words[self._position(row)] = pack_location(dram, flash)
        self.used_rows += 1
        return row

    def key(self, row: int) -> BlockKey:
        """Key of a used row."""
        start = _key_at(row)
        key = self._map[start : start + KEY_BYTES]
        number = self.hidden.of[row]
        return masked(key, number) if number else BlockKey(key)

    def is_free(self, row: int) -> bool:
        """Whether a row holds no block."""
        return not self._words[self._position(row)]

    def dram(self, row: int) -> int | None:
        """DRAM slot of a row's block, or None."""
        low = dram_half(self._words[self._position(row)])
        return low - 1 if low else None

    def show_rise(self, row: int, slot: int | None) -> None:
        """Say into which DRAM slot a row's block rises now; None: into none any more. Nothing is
        changed of a block that is in DRAM."""
        at = self._position(row)
        if not dram_half(self._words[at]):
            low = 0 if slot is None else slot + 1 | RISING
            self._words[at] = self._words[at] & ~LOW_HALF | low

    def count_dram(self, rows: NDArray[np.int64]) -> int:
        """How many of some rows' blocks have a copy in DRAM."""
        return int(np.count_nonzero(dram_copies(self._locations(rows))))

    def copies(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which of some rows' blocks have a copy in DRAM, and which on flash."""
        words = self._locations(rows)
        return dram_copies(words), words >> np.uint64(32) != 0

    def _locations(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        positions = rows // BUCKET_ROWS * (_BUCKET_WORDS - BUCKET_ROWS) + rows
        positions += _HEADER_WORDS + _KEYS_WORDS
        words: NDArray[np.uint64] = np.frombuffer(self._words, np.uint64)[positions]
        return words

    def flash(self, row: int) -> int | None:
        """Flash slot of a row's block, or None."""
        high = self._words[self._position(row)] >> 32
        return high - 1 if high else None

    def set_location(self, row: int, dram: int | None, flash: int | None) -> None:
        """Change where a block's copies are; at least one is left (else: remove)."""
        assert dram is not None or flash is not None
        self._words[self._position(row)] = pack_location(dram, flash)

    def remove(self, row: int) -> None:
        """Free a row: location first, then the key, so that no reader finds a stale one."""
        self._words[self._position(row)] = 0
        start = _key_at(row)
        self._map[start : start + KEY_BYTES] = _FREE_KEY
        self.hidden.of[row] = 0
        self.used_rows -= 1

    def set_flash_state(self, state: int) -> None:
        """Tell readers whether copies on flash can be read."""
        self._map[FLASH_STATE_OFFSET : FLASH_STATE_OFFSET + 4] = state.to_bytes(4, "little")

    def set_sessions(self, count: int) -> None:
        """Tell workers how many there are."""
        self._words[SESSIONS_OFFSET // 8] = count

    def set_dram_verify(self, mode: Verify) -> None:
        """Tell readers what to check; before anybody attaches."""
        number = VERIFY.index(mode)
        self._map[VERIFY_OFFSET : VERIFY_OFFSET + 4] = number.to_bytes(4, "little")

    def beat(self, now_ns: int) -> None:
        """Leave a sign of life."""
        self._words[HEARTBEAT_OFFSET // 8] = now_ns

    def _position(self, row: int) -> int:
        bucket, way = divmod(row, BUCKET_ROWS)
        return _HEADER_WORDS + bucket * _BUCKET_WORDS + _KEYS_WORDS + way

    def _free_row(self, key: BlockKey) -> int:
        """A free row in the emptier of the key's two buckets."""
        best_row, best_free = 0, 0
        for half in _HALVES.unpack(key):
            bucket = half % self.buckets
            first = self._position(bucket * BUCKET_ROWS)
            ways = self._words[first : first + BUCKET_ROWS].tolist()
            free = ways.count(0)
            if free > best_free:
                best_row, best_free = bucket * BUCKET_ROWS + ways.index(0), free
        if not best_free:
            raise TierFull("both buckets of the index are full")
        return best_row
