"""What the index remembers of blocks that are gone: why they went, and where their like is kept.

Both tables lie in the index file behind its rows (proto/shm.py), so that a worker can say why a
lookup ended without a call. They are bounded and forget the oldest of a bucket first; a reader
that races with the writer can at worst give a reason that was true a moment ago.

    departed   one entry of 4 bytes per slot of the tiers, rounded up to a power of two: about as
               many gone blocks are remembered as fit into the tiers. One key in 8 million is
               taken for another. An entry costs the writer 2 us, the reader 1.6 us.
    origins    4096 entries of 16 bytes: first blocks that were stored, by tokens and tenant.
"""

from __future__ import annotations

from struct import Struct

from kvist.proto.keys import BlockKey
from kvist.proto.shm import (
    DEPARTED_BUCKET,
    DEPARTED_REASON_BITS,
    DEPARTED_TAG_BITS,
    DEPARTURES,
    ORIGIN_BUCKET,
    ORIGIN_BUCKETS,
)

_HALVES = Struct("<QQ")
_WAYS = DEPARTED_BUCKET.size // 4
_TAG_MASK = (1 << DEPARTED_TAG_BITS) - 1
_REASON_MASK = (1 << DEPARTED_REASON_BITS) - 1
_CODES = {reason: code for code, reason in enumerate(DEPARTURES) if reason}
_BUCKETS_MIN = 64
SPACE_BYTES = 8


def departed_buckets(slots: int) -> int:
    """Buckets for that many slots, a power of two."""
    return max(_BUCKETS_MIN, 1 << (-(-slots // _WAYS) - 1).bit_length())


class Departed:
    """Why blocks went that are in no tier any more.

    Args:
        view: bytes of the table; a reader's may be read-only.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._mask = len(view) // DEPARTED_BUCKET.size - 1

    def _place(self, key: BlockKey) -> tuple[int, int]:
        """Offset of a key's bucket, and its word without a reason."""
        first, second = _HALVES.unpack(key)
        return (first & self._mask) * DEPARTED_BUCKET.size, (
            second & _TAG_MASK
        ) << DEPARTED_REASON_BITS

    def reason(self, key: BlockKey) -> str:
        """One of DEPARTURES; "" when the block is not known to have been there."""
        start, tag = self._place(key)
        for word in DEPARTED_BUCKET.unpack_from(self._view, start):
            if word and word & ~_REASON_MASK == tag:
                return DEPARTURES[word & _REASON_MASK]
        return ""

    def note(self, key: BlockKey, reason: str) -> None:
        """Remember why a block went; the sidecar only.

        Args:
            reason: one of DEPARTURES, not "".
        """
        start, tag = self._place(key)
        words = DEPARTED_BUCKET.unpack_from(self._view, start)
        kept = [word for word in words if word and word & ~_REASON_MASK != tag]
        fresh = [tag | _CODES[reason], *kept][:_WAYS]
        DEPARTED_BUCKET.pack_into(self._view, start, *fresh, *[0] * (_WAYS - len(fresh)))


class Origins:
    """Under which namespaces the first blocks of prompts were stored.

    Args:
        view: bytes of the table; a reader's may be read-only.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def _pairs(self, origin: bytes) -> tuple[int, list[tuple[int, int]]]:
        start = int.from_bytes(origin, "little") % ORIGIN_BUCKETS * ORIGIN_BUCKET.size
        words = ORIGIN_BUCKET.unpack_from(self._view, start)
        return start, list(zip(words[::2], words[1::2], strict=True))

    def elsewhere(self, origin: bytes, namespace: bytes) -> bool:
        """Whether a first block was stored under another namespace and not, lately, under this.

        Args:
            origin: see proto.keys.origin_of.
            namespace: digest.
        """
        name, space = int.from_bytes(origin, "little"), _space(namespace)
        spaces = {other for each, other in self._pairs(origin)[1] if each == name}
        return bool(spaces) and space not in spaces

    def note(self, origin: bytes, namespace: bytes) -> None:
        """A first block was stored; the sidecar only."""
        pair = int.from_bytes(origin, "little"), _space(namespace)
        start, pairs = self._pairs(origin)
        fresh = [pair, *(each for each in pairs if each != pair)][: len(pairs)]
        ORIGIN_BUCKET.pack_into(self._view, start, *[word for each in fresh for word in each])


def _space(namespace: bytes) -> int:
    return int.from_bytes(namespace[:SPACE_BYTES], "little")
