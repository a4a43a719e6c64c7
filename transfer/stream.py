"""Records as a stream of chunks, for clients that share no memory with the sidecar.

A record (proto/record.py) travels whole, generation 0, in chunks of at most CHUNK_BYTES in order
of their offset; records follow one another. The first chunk holds the whole header region, so
that a receiver knows what comes before it keeps anything.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvist.proto.cache_pb2 import Chunk
from kvist.proto.errors import BlockCorrupt
from kvist.proto.keys import KEY_BYTES, BlockKey
from kvist.proto.record import PAGE_BYTES, checksum, unpack_header
from kvist.proto.slot import payload_of

CHUNK_BYTES = 1024 * 1024
_NO_GENERATION = bytes(8)


def split(key: BlockKey, record: memoryview) -> Iterator[Chunk]:
    """Cut a record into chunks.

    Args:
        key: of its block.
        record: the record and no more, a multiple of PAGE_BYTES.
    """
    for offset in range(0, len(record), CHUNK_BYTES):
        data = bytes(record[offset : offset + CHUNK_BYTES])
        if not offset:
            data = _NO_GENERATION + data[len(_NO_GENERATION) :]
        yield Chunk(key=key, offset=offset, data=data, record_bytes=len(record))


class Joiner:
    """Puts the records of one stream together; memory for one record at a time.

    Attributes:
        pending_bytes: bytes kept of a record that is not complete yet; not 0 at the end of a
            stream means that it was cut.
    """

    def __init__(self, limit_bytes: int) -> None:
        """limit_bytes: the longest record to take, a multiple of PAGE_BYTES."""
        self._limit_bytes = limit_bytes
        self._parts: list[bytes] = []
        self._first = Chunk()
        self.pending_bytes = 0

    def feed(self, chunk: Chunk) -> bytes | None:
        """Take the next chunk.

        Returns:
            The record, checked as a whole, when the chunk completes it; None before.

        Raises:
            BlockCorrupt: the chunk does not continue the record, is too long, or the record is
                not what its chunks say; the message names the field. What was kept is dropped.
            FormatRefused: a record of another version.
        """
        try:
            return self._feed(chunk)
        except Exception:
            self._drop()
            raise

    def _drop(self) -> None:
        self._parts = []
        self.pending_bytes = 0

    def _feed(self, chunk: Chunk) -> bytes | None:
        if chunk.offset != self.pending_bytes:
            raise BlockCorrupt(f"offset {chunk.offset}, expected {self.pending_bytes}")
        if not 0 < len(chunk.data) <= CHUNK_BYTES:
            raise BlockCorrupt(f"data of {len(chunk.data)} bytes, allowed are 1 to {CHUNK_BYTES}")
        if not self.pending_bytes:
            self._check_first(chunk)
            self._first = Chunk(key=chunk.key, record_bytes=chunk.record_bytes)
        elif (chunk.key, chunk.record_bytes) != (self._first.key, self._first.record_bytes):
            raise BlockCorrupt("key and record_bytes must not change inside a record")
        if chunk.offset + len(chunk.data) > chunk.record_bytes:
            raise BlockCorrupt("data goes past record_bytes")
        self._parts.append(chunk.data)
        self.pending_bytes += len(chunk.data)
        return self._finish() if self.pending_bytes == chunk.record_bytes else None

    def _check_first(self, chunk: Chunk) -> None:
        """Before anything is kept: the record is one, is the announced one, and is not too long."""
        if len(chunk.key) != KEY_BYTES:
            raise BlockCorrupt(f"key must be {KEY_BYTES} bytes, got {len(chunk.key)}")
        if chunk.record_bytes > self._limit_bytes:
            raise BlockCorrupt(f"record_bytes {chunk.record_bytes}, allowed: {self._limit_bytes}")
        if len(chunk.data) < PAGE_BYTES:
            raise BlockCorrupt("the first chunk must hold the record's header")
        header = unpack_header(memoryview(chunk.data))
        if header.key != chunk.key:
            raise BlockCorrupt("the record's key is not the chunk's")
        if header.shape.record_bytes != chunk.record_bytes:
            raise BlockCorrupt(
                f"record_bytes {chunk.record_bytes}, the record has {header.shape.record_bytes}"
            )

    def _finish(self) -> bytes:
        record = b"".join(self._parts)
        self._drop()
        view = memoryview(record)
        header = unpack_header(view)
        if checksum(payload_of(view, header)) != header.checksum:
            raise BlockCorrupt("payload checksum differs")
        return record
