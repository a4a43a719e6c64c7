"""Hidden rows: blocks that were cleared and not yet taken apart, which no lookup finds.

A hidden row keeps its place, its copies and its key; but in the file the key is written inverted,
so whoever searches for it finds nothing, and a block of the same key may be stored anew in another
row. To hide a million rows takes 47 ms, to drop them 12 to 15 s. Who asks why a block is not there
looks for the inverted key.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvist.proto.keys import KEY_BYTES, BlockKey
from kvist.proto.shm import BUCKET_BYTES, BUCKET_KEYS_BYTES, BUCKET_ROWS, HEADER_BYTES

_ONES = (1 << 8 * KEY_BYTES) - 1
_KEY_WORDS = KEY_BYTES // 8

Rows = NDArray[np.int64]


def inverse(key: bytes) -> BlockKey:
    """A key as it stands in a hidden row, and back."""
    return BlockKey((int.from_bytes(key, "little") ^ _ONES).to_bytes(KEY_BYTES, "little"))


class Hidden:
    """Which rows are hidden, one byte a row. The sidecar's half of the index has one.

    Args:
        words: of the index file, 8 bytes each. rows: that it has.

    Attributes:
        of: by row, 1 when it is hidden. A row that is freed is not.
    """

    def __init__(self, words: memoryview, rows: int) -> None:
        self._words = words
        self.of: Final = bytearray(rows)

    def add(self, rows: Rows) -> None:
        """Hide rows that are in use and not hidden yet."""
        at = self._places(rows)
        words = np.frombuffer(self._words, np.uint64)
        words[at] = ~words[at]
        np.frombuffer(self.of, np.uint8)[rows] = 1

    def are(self, rows: Rows | slice) -> NDArray[np.bool_]:
        """Which of some rows are hidden."""
        return np.frombuffer(self.of, np.bool_)[rows]

    def keys_on_flash(self, rows: Rows) -> bytes:
        """Keys of those hidden rows that have a copy on flash, one after the other."""
        words = np.frombuffer(self._words, np.uint64)
        buckets, ways = np.divmod(rows, BUCKET_ROWS)
        located = (HEADER_BYTES + buckets * BUCKET_BYTES + BUCKET_KEYS_BYTES) // 8 + ways
        on_flash = rows[words[located] >> np.uint64(32) != 0]
        return (~words[self._places(on_flash)]).tobytes()

    @staticmethod
    def _places(rows: Rows) -> NDArray[np.int64]:
        """Of the words of keys, shape (rows, words of a key)."""
        buckets, ways = np.divmod(rows, BUCKET_ROWS)
        first = (HEADER_BYTES + buckets * BUCKET_BYTES) // 8 + ways * _KEY_WORDS
        places: NDArray[np.int64] = first[:, None] + np.arange(_KEY_WORDS)
        return places
