"""A stretch of the index at once, for people who look at it: where copies are, and keys."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.location import dram_copies
from kvist.proto.keys import KEY_BYTES
from kvist.proto.shm import BUCKET_BYTES, BUCKET_KEYS_BYTES, BUCKET_ROWS, HEADER_BYTES

Rows = NDArray[np.int64]


class Scan:
    """The rows of an index file as arrays, in a read-only map of its own.

    Args:
        path: of the index.
        rows: that it has.
    """

    def __init__(self, path: Path, rows: int) -> None:
        buckets = rows // BUCKET_ROWS
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = mmap.mmap(handle, 0, prot=mmap.PROT_READ)
        finally:
            os.close(handle)
        table = np.frombuffer(mapped, np.uint8, buckets * BUCKET_BYTES, HEADER_BYTES)
        table = table.reshape(buckets, BUCKET_BYTES)
        keys = table[:, :BUCKET_KEYS_BYTES]
        self._keys = keys.reshape(buckets, BUCKET_ROWS, KEY_BYTES)
        self._words = table[:, BUCKET_KEYS_BYTES:].view(np.uint64)

    def copies(self, rows: Rows) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which blocks have a copy in DRAM, and which on flash."""
        words = self._words[rows // BUCKET_ROWS, rows % BUCKET_ROWS]
        return dram_copies(words), (words >> np.uint64(32)) != 0

    def beginning_with(self, digits: str, start: int, stop: int) -> Rows:
        """Used rows from start up to stop, the first of a bucket each, whose key begins so.

        Args:
            digits: hex, at most 2 * KEY_BYTES.
        """
        low, high = start // BUCKET_ROWS, -(-stop // BUCKET_ROWS)
        keys = self._keys[low:high].reshape(-1, KEY_BYTES)
        fits = self._words[low:high].reshape(-1) != 0
        whole = bytes.fromhex(digits[: len(digits) // 2 * 2])
        for at, value in enumerate(whole):
            fits &= keys[:, at] == value
        if len(digits) % 2:
            fits &= keys[:, len(whole)] >> 4 == int(digits[-1], 16)
        return np.flatnonzero(fits) + low * BUCKET_ROWS
