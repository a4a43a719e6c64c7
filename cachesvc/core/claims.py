"""Claims: which blocks some worker is computing now, so that another one may wait for them.

Before commit a block does not exist, but that somebody is computing it may be seen. A worker
claims a key through its ring, the sidecar grants it to the first who asks and writes that into
the index file, and every worker reads it there without a call. A claim ends when the block is
stored or refused, when its worker gives it up or is gone, and in any case after CLAIM_S: a claim
is a hint, and whoever waits for one bounds its wait by itself.

At most 2048 claims at once, in 64 KiB, of which one session has at most a quarter.
"""

from __future__ import annotations

from collections import Counter
from struct import Struct

from kvist.proto.keys import KEY_BYTES, BlockKey
from kvist.proto.shm import CLAIM_BUCKET, CLAIM_BUCKETS, CLAIM_ENTRY_BYTES

# A worker claims what it computes in a step or two. A slow one, 300 tokens a second, needs 2 s
# for a step of 512; a claim that is forgotten holds up nobody for longer than his own patience.
CLAIM_S = 10.0
SESSION_CLAIMS_MAX = CLAIM_BUCKETS * 4 // 4

_WORD = Struct("<Q")
_FREE_KEY = bytes(KEY_BYTES)


class ClaimTable:
    """The entries in the index file; a worker's half.

    Args:
        view: bytes of the table; a reader's may be read-only.
    """

    def __init__(self, view: memoryview) -> None:
        self.view = view

    @staticmethod
    def bucket_at(key: BlockKey) -> int:
        """Offset of a key's bucket."""
        return _WORD.unpack_from(key)[0] % CLAIM_BUCKETS * CLAIM_BUCKET.size  # type: ignore[no-any-return]

    def owner(self, key: BlockKey) -> int:
        """Number of the session that is computing a block; 0 if nobody says so. 1 us."""
        fields = CLAIM_BUCKET.unpack_from(self.view, self.bucket_at(key))
        for at in range(0, len(fields), 2):
            if fields[at] == key:
                return int(fields[at + 1])
        return 0


class Claims:
    """The sidecar's half: grants, and sees to it that every claim ends. One thread.

    Args:
        table: writable.
    """

    def __init__(self, table: ClaimTable) -> None:
        self._table = table
        # Key -> offset of its entry, session, when it ends; the first to end comes first.
        self._held: dict[BlockKey, tuple[int, int, float]] = {}
        self._by_session: Counter[int] = Counter()

    def __len__(self) -> int:
        """Claims that stand."""
        return len(self._held)

    def claim(self, key: BlockKey, session: int, now_s: float) -> bool:
        """Grant a key to the first who asks; False when it is another's or there is no room.

        Args:
            session: its number, > 0.
        """
        held = self._held.get(key)
        if held is not None:
            return held[1] == session
        at = self._free_entry(key)
        if at is None or self._by_session[session] >= SESSION_CLAIMS_MAX:
            return False
        view = self._table.view
        view[at : at + KEY_BYTES] = key
        _WORD.pack_into(view, at + KEY_BYTES, session)
        self._held[key] = at, session, now_s + CLAIM_S
        self._by_session[session] += 1
        return True

    def _free_entry(self, key: BlockKey) -> int | None:
        bucket = self._table.bucket_at(key)
        fields = CLAIM_BUCKET.unpack_from(self._table.view, bucket)
        for entry, session in enumerate(fields[1::2]):
            if not session:
                return bucket + entry * CLAIM_ENTRY_BYTES
        return None

    def release(self, key: BlockKey, session: int) -> None:
        """A session gives a key up; one that is not its own is fine."""
        held = self._held.get(key)
        if held is not None and held[1] == session:
            self.settle(key)

    def settle(self, key: BlockKey) -> None:
        """The block is stored, or will not be: there is nothing to wait for. No claim is fine."""
        held = self._held.pop(key, None)
        if held is None:
            return
        at, session, _ = held
        view = self._table.view
        _WORD.pack_into(view, at + KEY_BYTES, 0)
        view[at : at + KEY_BYTES] = _FREE_KEY
        self._by_session[session] -= 1
        if not self._by_session[session]:
            del self._by_session[session]

    def end(self, session: int) -> None:
        """A session is over."""
        if session in self._by_session:
            for key in [key for key, held in self._held.items() if held[1] == session]:
                self.settle(key)

    def expire(self, now_s: float) -> None:
        """End the claims whose time is over."""
        while self._held:
            key, (_, _, until_s) = next(iter(self._held.items()))
            if until_s > now_s:
                return
            self.settle(key)
