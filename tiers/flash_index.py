"""The flash tier's index: which key is in which slot, in LMDB, read once in a life.

    key          16 bytes, block key
    value        76 bytes, little-endian
        offset  bytes  field
             0      4  slot
             4      4  depth
             8      8  payload_bytes
            16      4  block_tokens
            20     16  parent
            36     32  namespace
            68      8  check          xxh3-64 of the key and bytes [0, 68)

    index.mdb    the index of the last life, complete
    index.new    the index that is being made; becomes index.mdb as soon as it is complete
    index.bad    an index that was damaged, for whoever wants to look

LMDB follows page numbers without checks, so a damaged file can kill the process that opens it
(SIGSEGV, SIGBUS, an assertion in C). Therefore a forked child reads the old file and sends what
it finds; the parent checks it and writes it into a new file, and so maps no file that it did not
write itself. That also compacts. It costs 7 us an entry, 0.5 s for 100 GB of 1.4 MiB blocks.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import select
import signal
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import lmdb
import xxhash

from kvist.proto.keys import KEY_BYTES, BlockKey
from kvist.proto.record import RecordShape
from kvist.tiers.durable import sync_directory

_VALUE = struct.Struct("<IIQI16s32s")
_CHECK = struct.Struct("<Q")
_ROW_BYTES = KEY_BYTES + _VALUE.size + _CHECK.size
_TRAILER = struct.Struct("<8sQ")
_TRAILER_MAGIC = b"KVISTEND"

# An entry takes 100 to 210 bytes of the file; it is sparse, only what is used is there.
_MAP_BYTES_LEAST = 64 * 1024 * 1024
_MAP_BYTES_PER_SLOT = 1024
# What a power loss may forget. A sync takes 12 to 20 ms, so not after each batch.
_SYNC_ENTRIES = 256
# The child has hung when it sends nothing for so long.
_CHILD_TIMEOUT_S = 30.0
_CHILD_WRITE_BYTES = 256 * _ROW_BYTES
_PROBE_KEY = bytes(KEY_BYTES)


@dataclass(frozen=True, slots=True)
class FlashEntry:
    """What the index says about one block.

    Attributes:
        slot: where its record is.
        key: block key.
        parent: key of the block before, NO_KEY for a first block.
        namespace: digest, 32 bytes.
        depth: blocks before this one.
        payload_bytes: bytes of KV.
        block_tokens: tokens in the block.
    """

    slot: int
    key: BlockKey
    parent: BlockKey
    namespace: bytes
    depth: int
    payload_bytes: int
    block_tokens: int

    @property
    def record_bytes(self) -> int:
        """Bytes of its record, a multiple of PAGE_BYTES."""
        return RecordShape(self.payload_bytes, self.block_tokens).record_bytes


def pack_value(entry: FlashEntry) -> bytes:
    """The value that the index holds under entry.key."""
    fields = _VALUE.pack(
        entry.slot,
        entry.depth,
        entry.payload_bytes,
        entry.block_tokens,
        entry.parent,
        entry.namespace,
    )
    return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(entry.key + fields))


def unpack_value(key: bytes, value: bytes) -> FlashEntry | None:
    """What a key and a value say; None when the check differs."""
    fields, check = value[: _VALUE.size], value[_VALUE.size :]
    if check != _CHECK.pack(xxhash.xxh3_64_intdigest(key + fields)):
        return None
    slot, depth, payload_bytes, block_tokens, parent, namespace = _VALUE.unpack(fields)
    return FlashEntry(
        slot, BlockKey(key), BlockKey(parent), namespace, depth, payload_bytes, block_tokens
    )


def _send_all(path: Path, pipe: int) -> None:
    """In the child: every row of the file in order of its key, then a trailer with their number."""
    sent, last, rows = 0, b"", bytearray()
    with (
        lmdb.open(str(path), subdir=False, readonly=True, create=False, lock=False) as env,
        env.begin() as txn,
    ):
        for key, value in txn.cursor():
            # Keys that do not grow are a loop in the tree; it would never end.
            if key <= last or len(key) + len(value) != _ROW_BYTES or len(key) != KEY_BYTES:
                return
            last, sent = key, sent + 1
            rows += key
            rows += value
            if len(rows) >= _CHILD_WRITE_BYTES:
                _write_all(pipe, rows)
                rows.clear()
        if sent == env.stat()["entries"]:
            _write_all(pipe, bytes(rows) + _TRAILER.pack(_TRAILER_MAGIC, sent))


def _write_all(pipe: int, data: bytes | bytearray) -> None:
    written = 0
    while written < len(data):
        written += os.write(pipe, data[written:])


def _be_child(path: Path, pipe: int) -> None:
    """Read the file and end. Whatever happens in here, the parent sees only a pipe that ends."""
    with suppress(BaseException):
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        quiet = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(quiet, fd)
        # Among the rest is the directory's lock, which must not outlive the parent.
        os.dup2(pipe, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        _send_all(path, 3)
    os._exit(0)


def _read_in_child(path: Path) -> bytes | None:
    """All rows of an LMDB file; None when the file is damaged, or the child died or hung."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        _be_child(path, send)
    os.close(send)
    data = bytearray()
    poll = select.poll()
    poll.register(receive, select.POLLIN)
    try:
        while poll.poll(_CHILD_TIMEOUT_S * 1000):
            piece = os.read(receive, 1 << 20)
            if not piece:
                break
            data += piece
    finally:
        os.close(receive)
        os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # somebody ignores SIGCHLD, and the kernel reaps
            os.waitpid(pid, 0)
    rows = bytes(data[: -_TRAILER.size])
    whole = data[-_TRAILER.size :] == _TRAILER.pack(_TRAILER_MAGIC, len(rows) // _ROW_BYTES)
    return rows if whole else None


def read_index(path: Path, fits: Callable[[FlashEntry], bool]) -> list[FlashEntry] | None:
    """What an index file holds, in order of its keys.

    Args:
        path: the file.
        fits: whether an entry can be of use in the tier as it is now; others are left out.

    Returns:
        None when anything is wrong with it; one bad value or one slot with two keys is enough.
    """
    rows = _read_in_child(path)
    if rows is None:
        return None
    entries = []
    for start in range(0, len(rows), _ROW_BYTES):
        middle, stop = start + KEY_BYTES, start + _ROW_BYTES
        entry = unpack_value(rows[start:middle], rows[middle:stop])
        if entry is None:
            return None
        if fits(entry):
            entries.append(entry)
    return entries if len({entry.slot for entry in entries}) == len(entries) else None


class FlashIndex:
    """The index of one life. put and delete may be called from several threads.

    Attributes:
        found: what the last life left, checked; empty when there was nothing or it was damaged.
        complete: False from a damaged or lost index to finish; until then index.mdb is absent,
            so that the next life knows too.
    """

    def __init__(self, path: Path, slots: int, fits: Callable[[FlashEntry], bool]) -> None:
        """Read the last life's index and begin this one's.

        Args:
            path: the flash directory. Without an index.mdb it counts as incomplete.
            slots: how many entries there may be.
            fits: see read_index.

        Raises:
            OSError, lmdb.Error: the device failed.
        """
        self._path = path
        self._map_bytes = _MAP_BYTES_LEAST + slots * _MAP_BYTES_PER_SLOT
        self._lock = threading.Lock()
        self._unsynced = 0
        file = path / "index.mdb"
        found = read_index(file, fits) if file.exists() else None
        if found is None:
            with suppress(FileNotFoundError):
                file.rename(path / "index.bad")
        self.found = found or []
        self.complete = found is not None
        self._begin()

    def _begin(self) -> None:
        draft = self._path / "index.new"
        draft.unlink(missing_ok=True)
        self._env = self._open(draft)
        try:
            with self._env.begin(write=True) as txn:
                for entry in self.found:
                    txn.put(entry.key, pack_value(entry), append=True)
            if self.complete:
                self.finish()
        except BaseException:
            self._env.close()
            raise

    def _open(self, file: Path) -> lmdb.Environment:
        # The directory's lock keeps others out, so LMDB needs no lock file of its own.
        return lmdb.open(
            str(file), subdir=False, map_size=self._map_bytes, lock=False, sync=False,
            metasync=False, mode=0o600,
        )  # fmt: skip

    def finish(self) -> None:
        """The index is complete now: give it its name, on the device when this returns."""
        with self._lock:
            self._env.sync(True)
            with suppress(FileNotFoundError):
                (self._path / "index.new").rename(self._path / "index.mdb")
            sync_directory(self._path)
            self.complete = True

    def put(self, entries: Sequence[FlashEntry]) -> None:
        """Add or replace, in one transaction; survives this process's death at once.

        Raises:
            OSError, lmdb.Error: the device failed; nothing was put.
        """
        with self._lock:
            with self._env.begin(write=True) as txn:
                for entry in entries:
                    txn.put(entry.key, pack_value(entry))
            self._count(len(entries))

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Remove, in one transaction; a key that is not there is no error.

        Raises:
            OSError, lmdb.Error: the device failed; nothing was deleted.
        """
        with self._lock:
            with self._env.begin(write=True) as txn:
                for key in keys:
                    txn.delete(key)
            self._count(len(keys))

    def _count(self, entries: int) -> None:
        self._unsynced += entries
        if self._unsynced >= _SYNC_ENTRIES:
            self._unsynced = 0
            self._env.sync(True)

    def probe(self) -> None:
        """Write and remove an entry.

        Raises:
            OSError, lmdb.Error: the device still fails.
        """
        with self._lock:
            try:
                self._touch()
            except lmdb.Error:  # after a failed write of a meta page only opening anew helps
                self._env.close()
                self._env = self._open(self._file())
                self._touch()

    def _file(self) -> Path:
        return self._path / ("index.mdb" if self.complete else "index.new")

    def _touch(self) -> None:
        with self._env.begin(write=True) as txn:
            txn.put(_PROBE_KEY, b"")
            txn.delete(_PROBE_KEY)

    def reset(self) -> None:
        """Forget everything; complete afterwards.

        Raises:
            OSError, lmdb.Error: the device failed.
        """
        with self._lock:
            self._env.close()
            (self._path / "index.mdb").unlink(missing_ok=True)
            self.found = []
            self.complete = False
            self._begin()
        self.finish()

    def close(self) -> None:
        """Bring everything to the device, if that still works, and close the file."""
        with suppress(OSError, lmdb.Error):
            self._env.sync(True)
        self._env.close()
