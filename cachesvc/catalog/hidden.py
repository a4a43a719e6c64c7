"""Hidden rows: blocks that were given up and not yet taken apart, which no lookup finds.

A hidden row keeps its place, its copies and its key; but in the file the key is written masked, so
whoever searches for it finds nothing, and a block of the same key may be stored anew in another
row. To hide a million rows takes 47 ms, to drop them 12 to 15 s. Who asks why a block is not there
looks for the masked key: each reason has a mask of its own.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvist.proto.keys import KEY_BYTES, BlockKey
from kvist.proto.shm import BUCKET_BYTES, BUCKET_KEYS_BYTES, BUCKET_ROWS, HEADER_BYTES

REASONS = ("", "cleared", "expired", "corrupt")
"""Why a row may be hidden, some of proto.shm.DEPARTURES; the place is its number, 0: not hidden."""

# Of each half of a key. Keys are hashes, so no key is another one masked.
_HALF_MASKS = (0, (1 << 64) - 1, 0x5555555555555555, 0xAAAAAAAAAAAAAAAA)
_MASKS = tuple(half << 64 | half for half in _HALF_MASKS)
_KEY_WORDS = KEY_BYTES // 8

Rows = NDArray[np.int64]


def masked(key: bytes, number: int) -> BlockKey:
    """A key as it stands in a row hidden for a reason, and back.

    Args:
        number: place in REASONS.
    """
    return BlockKey((int.from_bytes(key, "little") ^ _MASKS[number]).to_bytes(KEY_BYTES, "little"))


class Hidden:
    """Which rows are hidden, one byte a row. The sidecar's half of the index has one.

    Args:
        words: of the index file, 8 bytes each. rows: that it has.

    Attributes:
        of: by row, the number of the reason why it is hidden, 0 when it is not. A row that is
            freed is not.
    """

    def __init__(self, words: memoryview, rows: int) -> None:
        self._words = words
        self.of: Final = bytearray(rows)

    def add(self, rows: Rows, why: str) -> None:
        """Hide rows that are in use and not hidden yet.

        Args:
            why: one of REASONS, not "".
        """
        number, at = REASONS.index(why), self._places(rows)
        words = np.frombuffer(self._words, np.uint64)
        words[at] ^= np.uint64(_HALF_MASKS[number])
        np.frombuffer(self.of, np.uint8)[rows] = number

    def are(self, rows: Rows | slice) -> NDArray[np.bool_]:
        """Which of some rows are hidden."""
        hidden: NDArray[np.bool_] = np.frombuffer(self.of, np.uint8)[rows] != 0
        return hidden

    def why(self, row: int) -> str:
        """Why a row is hidden; "" when it is not."""
        return REASONS[self.of[row]]

    def keys_on_flash(self, rows: Rows) -> bytes:
        """Keys of those hidden rows that have a copy on flash, one after the other."""
        words = np.frombuffer(self._words, np.uint64)
        buckets, ways = np.divmod(rows, BUCKET_ROWS)
        located = (HEADER_BYTES + buckets * BUCKET_BYTES + BUCKET_KEYS_BYTES) // 8 + ways
        on_flash = rows[words[located] >> np.uint64(32) != 0]
        masks = np.array(_HALF_MASKS, np.uint64)[np.frombuffer(self.of, np.uint8)[on_flash]]
        keys: NDArray[np.uint64] = words[self._places(on_flash)] ^ masks[:, None]
        return keys.tobytes()

    @staticmethod
    def _places(rows: Rows) -> NDArray[np.int64]:
        """Of the words of keys, shape (rows, words of a key)."""
        buckets, ways = np.divmod(rows, BUCKET_ROWS)
        first = (HEADER_BYTES + buckets * BUCKET_BYTES) // 8 + ways * _KEY_WORDS
        places: NDArray[np.int64] = first[:, None] + np.arange(_KEY_WORDS)
        return places
