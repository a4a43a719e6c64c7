"""Storing blocks: reserve, fill, commit, and say what became of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvist.cachesvc.control import SLOTS_MAX, Control
from kvist.cachesvc.life import Life
from kvist.cachesvc.log import Log
from kvist.proto import cache_pb2
from kvist.proto.errors import Detached, KvistError
from kvist.proto.keys import BlockKey
from kvist.proto.record import BlockHeader, Bytes, checksum


@dataclass(frozen=True, slots=True)
class StoreItem:
    """A block to store.

    Attributes:
        key: block key.
        parent: key of the block before, NO_KEY for a first block.
        namespace: digest, 32 bytes.
        depth: blocks before this one.
        tokens: the block's own token ids as little-endian uint32 bytes.
        payload: shape (payload_bytes,), uint8; must not change until store returns.
        origin: of a first block, see proto.keys.origin_of; b"" tells nothing.
        tenant: of a first block, see proto.keys.tenant_of.
    """

    key: BlockKey
    parent: BlockKey
    namespace: bytes
    depth: int
    tokens: bytes
    payload: Bytes
    origin: bytes = b""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class StoreResult:
    """What became of the blocks of one store; the numbers add up to the items.

    Attributes:
        stored: now visible.
        present: were there already, or are being stored by somebody else.
        dropped: reason -> blocks; "detached" the sidecar went, "full" nothing may be evicted,
            "share" the worker holds too many slots, "no_parent" the block before is not cached,
            "torn" the sidecar did not find in the slot what was reserved.
    """

    stored: int
    present: int
    dropped: Mapping[str, int]


class Storer:
    """Copies blocks into a session's slots; used by one thread.

    Args:
        control: for Reserve and Commit.
        log: where lost batches are told.
        wall: seconds since 1970, for the time of creation of a record.
    """

    def __init__(self, control: Control, log: Log, wall: Callable[[], float]) -> None:
        self._control = control
        self._log = log
        self._wall = wall

    def store(self, life: Life | None, items: Sequence[StoreItem]) -> StoreResult:
        """Store what the index does not show yet.

        Args:
            life: the session, entered by the caller; None when detached.
            items: parents before their children.
        """
        if life is None:
            return StoreResult(0, 0, {"detached": len(items)} if items else {})
        new = [item for item in items if not life.index.offered(item.key)]
        batches = _Batches(present=len(items) - len(new))
        step = min(SLOTS_MAX, life.reservation_limit)
        for start in range(0, len(new), step):
            rest = batches.without_orphans(new[start : start + step])
            while rest:
                left = self._store_batch(life, rest, batches)
                if len(left) == len(rest):  # none went in, so none will
                    batches.note_all(left, "share")
                    break
                rest = batches.without_orphans(left)
        return batches.result()

    def _store_batch(
        self, life: Life, batch: Sequence[StoreItem], seen: _Batches
    ) -> Sequence[StoreItem]:
        """Store a batch; those of it that went over the session's share, from the first on."""
        try:
            return self._reserve_fill_commit(life, batch, seen)
        except KvistError as error:
            # What the sidecar holds reserved for this session is unknown now: end it, so that
            # all its slots come back, and begin a new one.
            self._control.hang_up()
            self._log.debug("store dropped", reason=str(error))
            seen.lose_the_rest(batch)
            return ()
        except Exception:  # a mistake of ours must not leave slots reserved either
            self._control.hang_up()
            raise

    def _reserve_fill_commit(
        self, life: Life, batch: Sequence[StoreItem], seen: _Batches
    ) -> Sequence[StoreItem]:
        """See _store_batch. Raises: Detached, SessionUnknown; blocks not in seen are lost."""
        if life.ended:
            raise Detached("the session has ended")
        names = [_name(item) for item in batch]
        reply = self._control.reserve(cache_pb2.ReserveRequest(session=life.session, blocks=names))
        if len(reply.reservations) != len(batch):
            raise Detached("the sidecar answered for another number of blocks")
        filled: list[tuple[int, StoreItem]] = []
        # What is over the share now is not when this batch is committed.
        over = next(
            (at for at, one in enumerate(reply.reservations) if one.reason == "share"), None
        )
        for item, reservation in zip(batch[:over], reply.reservations[:over], strict=True):
            if reservation.outcome == cache_pb2.Reservation.RESERVED:
                self._fill(life, reservation.slot, item)
                filled.append((reservation.slot, item))
            elif reservation.outcome == cache_pb2.Reservation.PRESENT:
                seen.note(item, "present")
            else:
                seen.note(item, reservation.reason or "full")
        if filled:
            self._commit(life, filled, seen)
        return () if over is None else batch[over:]

    def _fill(self, life: Life, slot: int, item: StoreItem) -> None:
        if life.ended:
            raise Detached("the session ended before the block was copied")
        if slot >= life.arena.slots:
            raise Detached(f"the sidecar gave slot {slot} of {life.arena.slots}")
        header = BlockHeader(
            key=item.key,
            parent=item.parent,
            namespace=item.namespace,
            depth=item.depth,
            tokens=item.tokens,
            payload_bytes=item.payload.nbytes,
            checksum=checksum(item.payload),
            created_s=int(self._wall()),
        )
        life.arena.fill(slot, header, item.payload)

    def _commit(self, life: Life, filled: Sequence[tuple[int, StoreItem]], seen: _Batches) -> None:
        slots = [slot for slot, _ in filled]
        reply = self._control.commit(cache_pb2.CommitRequest(session=life.session, slots=slots))
        if len(reply.committed) != len(filled):
            raise Detached("the sidecar answered for another number of slots")
        stored_bytes = 0
        for (_, item), committed in zip(filled, reply.committed, strict=True):
            seen.note(item, "stored" if committed else "torn")
            stored_bytes += item.payload.nbytes * committed
        life.add({"stored_bytes": stored_bytes})


def _name(item: StoreItem) -> cache_pb2.BlockName:
    if item.depth:
        return cache_pb2.BlockName(key=item.key, parent=item.parent)
    first = cache_pb2.FirstBlock(origin=item.origin, namespace=item.namespace, tenant=item.tenant)
    return cache_pb2.BlockName(key=item.key, parent=item.parent, first=first)


class _Batches:
    """What became of the blocks so far, and which are not cached, so that no child is tried."""

    def __init__(self, present: int) -> None:
        self._fates: dict[BlockKey, str] = {}
        self._tally = Counter({"present": present})

    def note(self, item: StoreItem, fate: str) -> None:
        self._fates[item.key] = fate
        self._tally[fate] += 1

    def without_orphans(self, items: Sequence[StoreItem]) -> list[StoreItem]:
        """Those whose parent may be cached; the others are noted."""
        kept = []
        for item in items:
            if self._fates.get(item.parent, "stored") in ("stored", "present"):
                kept.append(item)
            else:
                self.note(item, "no_parent")
        return kept

    def note_all(self, items: Sequence[StoreItem], fate: str) -> None:
        for item in items:
            self.note(item, fate)

    def lose_the_rest(self, items: Sequence[StoreItem]) -> None:
        for item in items:
            if item.key not in self._fates:
                self.note(item, "detached")

    def result(self) -> StoreResult:
        dropped = {
            fate: blocks
            for fate, blocks in self._tally.items()
            if blocks and fate not in ("stored", "present")
        }
        return StoreResult(self._tally["stored"], self._tally["present"], dropped)
