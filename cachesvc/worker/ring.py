"""The ring: what a worker saw and did goes back to the sidecar through it, without a call.

The bytes are those of proto/shm.py. A full ring drops entries, which the worker counts;
counters are running totals in words of their own and are never lost.

The sidecar makes the file; the worker maps it and holds flock(LOCK_EX) on it for as long as it
may write reserved slots. The kernel drops that lock when the process dies, and never before.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvist.cachesvc.worker.tenants import TenantRows
from kvist.proto.errors import FormatRefused
from kvist.proto.hints import NO_HINT, Hint
from kvist.proto.keys import BlockKey
from kvist.proto.shm import (
    COUNTERS,
    COUNTERS_OFFSET,
    ENTRIES_OFFSET,
    ENTRY,
    ENTRY_BYTES,
    HEAD_OFFSET,
    HEADER_BYTES,
    RATES,
    RATES_OFFSET,
    RING_HEADER,
    RING_MAGIC,
    SHM_VERSION,
    TAIL_OFFSET,
    TENANT_COUNTERS,
    TENANT_COUNTERS_OFFSET,
    TENANT_NAME_BYTES,
    TENANT_NAME_OFFSET,
    TENANT_ROW_BYTES,
    TENANT_ROWS,
    TENANTS_OFFSET,
)

# A request pushes two or three entries and the sidecar drains every few milliseconds: 1024
# entries are hundreds of requests between two drains, in 64 KiB.
RING_ENTRIES = 1024

_HEAD, _TAIL, _COUNTERS = HEAD_OFFSET // 8, TAIL_OFFSET // 8, COUNTERS_OFFSET // 8
_POSITION: Mapping[str, int] = {name: _COUNTERS + at for at, name in enumerate(COUNTERS)}
_TENANT_POSITION: Mapping[str, int] = {
    name: TENANT_COUNTERS_OFFSET // 8 + at for at, name in enumerate(TENANT_COUNTERS)
}
_RATE_POSITION: Mapping[str, int] = {name: RATES_OFFSET // 8 + at for at, name in enumerate(RATES)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that a worker reports.

    Attributes:
        kind: TOUCH and the others of proto/shm.py; another program's mistake may be any.
        blocks: blocks of the prefix that ends with key.
        key: block key.
        at_ns: CLOCK_MONOTONIC.
        hint: of the request; NO_HINT when there is none, or one that cannot be.
    """

    kind: int
    blocks: int
    key: BlockKey
    at_ns: int
    hint: Hint = NO_HINT


def make_ring(path: Path, entries: int = RING_ENTRIES) -> None:
    """Make an empty ring file, readable and writable by its owner only.

    Args:
        path: must not exist.
        entries: a power of two.

    Raises: OSError: no room or no descriptor; there is no file then.
    """
    assert entries.bit_count() == 1
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Its memory now: to touch a page that a full /dev/shm cannot give ends the toucher.
        os.posix_fallocate(handle, 0, ENTRIES_OFFSET + entries * ENTRY_BYTES)
        os.pwrite(handle, RING_HEADER.pack(RING_MAGIC, SHM_VERSION, entries), 0)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(handle)


class _Ring:
    """The mapped file and an open descriptor of it."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(self._handle, 0)
            self.entries: Final[int] = _checked_entries(path, self._map)
        except OSError:  # no descriptor or memory left for the map
            os.close(self._handle)
            raise
        except (ValueError, FormatRefused) as error:
            os.close(self._handle)
            raise FormatRefused(str(error)) from None
        self._words = memoryview(self._map).cast("Q")
        self.path = path

    def close(self) -> None:
        """Unmap and close; a lock that this end holds is gone with it."""
        self._words.release()
        self._map.close()
        os.close(self._handle)


def _checked_entries(path: Path, mapped: mmap.mmap) -> int:
    if len(mapped) < HEADER_BYTES:
        raise FormatRefused(f"{path} is shorter than a ring's header")
    magic, version, entries = RING_HEADER.unpack_from(mapped)
    if magic != RING_MAGIC or version != SHM_VERSION:
        raise FormatRefused(f"{path} is no ring of version {SHM_VERSION}; run one version of Kvist")
    if entries & (entries - 1) or len(mapped) != ENTRIES_OFFSET + entries * ENTRY_BYTES:
        raise FormatRefused(f"{path}: {len(mapped)} bytes do not fit {entries} entries")
    return int(entries)


class RingWriter(_Ring):
    """A worker's end. Holds the session's lock from its making until close.

    One thread at a time: a counter is read and written, and the caller has a lock anyway, so
    that no thread writes into a ring that another one closes.

    Args:
        path: of AttachReply.
        now_ns: CLOCK_MONOTONIC.

    Raises:
        OSError: the file is gone (FileNotFoundError) or its lock is held (BlockingIOError): the
            session has ended.
        FormatRefused: it is not a ring of this version.
    """

    def __init__(self, path: Path, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__(path)
        self._now_ns = now_ns
        self._tenants = TenantRows()
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise

    def push(self, kind: int, blocks: int, key: BlockKey, hint: Hint = NO_HINT) -> bool:
        """Report something; False when the ring was full, for the caller to count."""
        head = self._words[_HEAD]
        if head - self._words[_TAIL] >= self.entries:
            return False
        at = ENTRIES_OFFSET + head % self.entries * ENTRY_BYTES
        pause_ms = round(1000 * hint.tool_pause_s)
        ENTRY.pack_into(
            self._map, at, kind, blocks, key, self._now_ns(),
            pause_ms, hint.priority, hint.session_end,
        )  # fmt: skip
        self._words[_HEAD] = head + 1
        return True

    def add(self, counter: str, amount: int) -> None:
        """Add to a running total.

        Args:
            counter: one of COUNTERS.
            amount: >= 0.
        """
        self._words[_POSITION[counter]] += amount

    def add_for(self, tenant: str | None, tokens: int, counts: Mapping[str, int]) -> None:
        """Add to the running totals of a tenant, or of all that have no row of their own.

        Args:
            tenant: None is one of those, whoever it is.
            tokens: that this request of its asks for; 0 when it is none.
            counts: by name of TENANT_COUNTERS, each >= 0.
        """
        row, is_new = self._tenants.row_of(tenant, tokens)
        start = TENANTS_OFFSET + row * TENANT_ROW_BYTES
        if is_new and tenant is not None:
            name = tenant.encode()[:TENANT_NAME_BYTES]
            self._map[start + TENANT_NAME_OFFSET : start + TENANT_NAME_OFFSET + len(name)] = name
            self._words[start // 8] = len(name) + 1
        for counter, amount in counts.items():
            self._words[start // 8 + _TENANT_POSITION[counter]] += amount

    def show(self, rates: Mapping[str, int]) -> None:
        """Say what was measured; by name of RATES, each in [0, NEVER]."""
        for name, value in rates.items():
            self._words[_RATE_POSITION[name]] = value


def _hint(pause_ms: int, priority: int, session_end: int) -> Hint:
    hint = Hint(bool(session_end), pause_ms / 1000, priority)
    return NO_HINT if hint.problem() else hint


class RingReader(_Ring):
    """The sidecar's end; used by one thread. Whatever a worker wrote there cannot hurt it."""

    def drain(self, limit: int) -> list[Entry]:
        """Take up to limit entries, oldest first."""
        head, tail = self._words[_HEAD], self._words[_TAIL]
        if head == tail:
            return []
        if not 0 < head - tail <= self.entries:  # no worker of ours does this: skip what it says
            self._words[_TAIL] = head
            return []
        taken = []
        for place in range(tail, min(head, tail + limit)):
            at = ENTRIES_OFFSET + place % self.entries * ENTRY_BYTES
            kind, blocks, key, at_ns, *told = ENTRY.unpack_from(self._map, at)
            hint = _hint(*told) if any(told) else NO_HINT
            taken.append(Entry(kind, blocks, BlockKey(key), at_ns, hint))
        self._words[_TAIL] = tail + len(taken)
        return taken

    def counters(self) -> dict[str, int]:
        """The running totals, by name."""
        return dict(zip(COUNTERS, self.counter_words(), strict=True))

    def counter_words(self) -> list[int]:
        """The same in the order of COUNTERS, 3 us."""
        return self._words[_COUNTERS : _COUNTERS + len(COUNTERS)].tolist()

    def tenants(self) -> list[tuple[str | None, list[int]]]:
        """Each tenant's running totals, in the order of TENANT_COUNTERS; those of all that have no
        row of their own first, under None."""
        words, first = self._words, TENANT_COUNTERS_OFFSET // 8
        found: list[tuple[str | None, list[int]]] = []
        for row in range(TENANT_ROWS):
            start = TENANTS_OFFSET + row * TENANT_ROW_BYTES
            size = words[start // 8] - 1
            if row and size < 0:
                break  # rows are given out in order
            at = start // 8 + first
            totals = words[at : at + len(TENANT_COUNTERS)].tolist()
            found.append((self._name(start, size) if row else None, totals))
        return found

    def _name(self, start: int, size: int) -> str:
        at = start + TENANT_NAME_OFFSET
        return self._map[at : at + min(size, TENANT_NAME_BYTES)].decode(errors="replace")

    def rates(self) -> dict[str, int]:
        """What the worker measured last, without what it did not."""
        words = {name: self._words[at] for name, at in _RATE_POSITION.items()}
        return {name: value for name, value in words.items() if value}

    def worker_is_gone(self) -> bool:
        """Whether nobody holds the worker's lock; if so it is ours from now on, until close.

        A process that the worker forked holds the lock too, as the kernel counts open files and
        not processes; the slots then stay until that one ends, which is the safe side.
        """
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
