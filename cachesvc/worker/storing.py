"""Storing blocks: reserve, fill, commit, and say what became of each."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np

from kvist.cachesvc.api.calls import Pending
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.control import SLOTS_MAX, Control
from kvist.cachesvc.worker.life import Life
from kvist.proto import cache_pb2
from kvist.proto.errors import Detached, KvistError
from kvist.proto.keys import TRIAL_PREFIX, BlockKey
from kvist.proto.record import NOT_SUMMED, BlockHeader, Bytes, checksum
from kvist.transfer.device import Source
from kvist.transfer.pace import Pace

# Bytes of a step: 5 ms of copying, beside which its two calls (0.2 ms) are little.
STEP_BYTES = 48 << 20
# Of the first step and of the last, beside whose Reserve and whose Commit nothing is copied: of 20
# blocks the sidecar answers them in 1 ms each, of 5 in 0.3.
END_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class StoreItem:
    """A block to store.

    Attributes:
        key: block key.
        parent: key of the block before, NO_KEY for a first block.
        namespace: digest, 32 bytes.
        depth: blocks before this one.
        tokens: the block's own token ids as little-endian uint32 bytes.
        payload: shape (payload_bytes,), uint8, or as proto.slot.fill_slot takes it, or a page of a
            device; must not change until store returns.
        origin: of a first block, see proto.keys.origin_of; b"" tells nothing.
        tenant: of a first block, see proto.keys.tenant_of.
        request: id of the request that it is of, for the sidecar's log; "" tells nothing.
        trace: traceparent of the sidecar's part in it; "" is not traced.
    """

    key: BlockKey
    parent: BlockKey
    namespace: bytes
    depth: int
    tokens: bytes
    payload: Bytes | Source
    origin: bytes = b""
    tenant: str = ""
    request: str = ""
    trace: str = ""


@dataclass(frozen=True, slots=True)
class StoreResult:
    """What became of the blocks of one store; the numbers add up to the items.

    Attributes:
        stored: now visible.
        present: were there already, or are being stored by somebody else.
        dropped: reason -> blocks; "detached" the sidecar went, "full" nothing may be evicted,
            "share" the worker holds too many slots, "no_parent" the block before is not cached,
            "index_full" the index has no room where the key belongs, "torn" the sidecar did not
            find in the slot what was reserved.
    """

    stored: int
    present: int
    dropped: Mapping[str, int]


REQUEST_CHARS_MAX = 256


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
        self._pace: Pace | None = None

    def store(
        self, life: Life | None, items: Sequence[StoreItem], pace: Pace | None = None
    ) -> StoreResult:
        """Store what the index does not show yet.

        The sidecar is never waited for but at both ends: the next step's slots are asked for
        before this step's are filled, and commits are answered behind it.

        Args:
            life: the session, entered by the caller; None when detached.
            items: parents before their children.
            pace: asked before each copy; None never waits.
        """
        self._pace = pace
        if life is None:
            return StoreResult(0, 0, {"detached": len(items)} if items else {})
        new = [item for item in items if not life.index.offered(item.key)]
        fates = _Fates(present=len(items) - len(new))
        try:
            if new:
                self._reserve_fill_commit(life, new, fates)
        except KvistError as error:
            # What the sidecar holds reserved for this session is unknown now: end it, so that
            # all its slots come back, and begin a new one.
            self._control.hang_up()
            self._log.debug("store dropped", reason=str(error))
            fates.lose_the_rest(new)
        except Exception:  # a mistake of ours must not leave slots reserved either
            self._control.hang_up()
            raise
        return fates.result()

    def clear(self, life: Life | None, namespace: bytes) -> int:
        """Drop every block of a namespace, whoever stored it; how many. Raises: Detached."""
        if life is None:
            raise Detached("no sidecar is attached; what it has on flash will be found again")
        request = cache_pb2.ClearRequest(namespace=namespace)
        return self._control.clear(request).result().dropped_blocks

    def _reserve_fill_commit(self, life: Life, new: Sequence[StoreItem], fates: _Fates) -> None:
        """Raises: Detached, SessionUnknown; blocks without a fate by then are lost."""
        rest = list(new)
        step, end = _step_blocks(new, life.reservation_limit)
        # Calls are answered in order: when the next step's slots are given out, the last step's
        # are committed, so that two steps at most are reserved at once.
        ahead = life.reservation_limit >= 2 * step
        committing: deque[_Committing] = deque()
        asked: _Asked | None = self._ask(life, _cut(rest, end), fates)
        while asked is not None:
            filled, over = self._take(life, asked, fates)
            if over and not ahead and not filled:  # none went in, so none will
                fates.note_all(over, "share")
            elif over:  # the share is smaller than it was: from now on commit before the next
                rest[:0] = over
                step, ahead = max(1, len(filled)), False
            blocks = _blocks_of_next(len(rest), step, end)
            asked = self._ask(life, _cut(rest, blocks), fates) if rest and ahead else None
            self._fill_all(life, filled)
            if filled:
                committing.append(self._commit(life, filled))
            while len(committing) > ahead:
                self._settle(life, committing.popleft(), fates)
            if rest and not ahead:
                asked = self._ask(life, _cut(rest, step), fates)
        while committing:
            self._settle(life, committing.popleft(), fates)

    def _ask(self, life: Life, step: Sequence[StoreItem], fates: _Fates) -> _Asked:
        if life.ended:
            raise Detached("the session has ended")
        step = fates.without_orphans(step)
        names = [_name(item) for item in step]
        told = ",".join(dict.fromkeys(item.request for item in step if item.request))
        request = cache_pb2.ReserveRequest(
            session=life.session,
            blocks=names,
            request=told[:REQUEST_CHARS_MAX],
            traceparent=_trace_of(step),
        )
        return _Asked(step, self._control.reserve(request) if step else None)

    def _take(
        self, life: Life, asked: _Asked, fates: _Fates
    ) -> tuple[list[tuple[int, StoreItem]], Sequence[StoreItem]]:
        """The slots that were given, each with its block; and the blocks over the share."""
        if asked.pending is None:
            return [], ()
        reply = asked.pending.result()
        if len(reply.reservations) != len(asked.step):
            raise Detached("the sidecar answered for another number of blocks")
        given: list[tuple[int, StoreItem]] = []
        # What is over the share now is not when the steps before it are committed.
        over = next(
            (at for at, one in enumerate(reply.reservations) if one.reason == "share"), None
        )
        for item, reservation in zip(asked.step[:over], reply.reservations[:over], strict=True):
            if reservation.outcome == cache_pb2.Reservation.RESERVED:
                if reservation.slot >= life.arena.slots:
                    raise Detached(f"the sidecar gave slot {reservation.slot}, which is none")
                given.append((reservation.slot, item))
            elif reservation.outcome == cache_pb2.Reservation.PRESENT:
                fates.note(item, "present")
            else:
                fates.note(item, reservation.reason or "full")
        return given, () if over is None else asked.step[over:]

    def _fill_all(self, life: Life, filled: Sequence[tuple[int, StoreItem]]) -> None:
        """A device copies all of the step at once, beside the sums of those that have come."""
        begun: list[Bytes | None] = []
        try:
            for slot, item in filled:
                begun.append(self._begin(life, slot, item))
            for (slot, item), payload in zip(filled, begun, strict=True):
                self._fill(life, slot, item, payload)
        finally:
            for _, item in filled[: len(begun)]:
                if not isinstance(item.payload, np.ndarray):
                    item.payload.settle()

    def _begin(self, life: Life, slot: int, item: StoreItem) -> Bytes | None:
        """Begin to copy a device's page into its slot; where it will be. None: it is no such."""
        if isinstance(item.payload, np.ndarray):
            return None
        self._before(life, item)
        return life.arena.begin_fill(slot, len(item.tokens), item.payload)

    def _before(self, life: Life, item: StoreItem) -> None:
        if life.ended:
            raise Detached("the session ended before the block was copied")
        if self._pace is not None:
            self._pace.before_store(item.payload.nbytes)

    def _fill(self, life: Life, slot: int, item: StoreItem, begun: Bytes | None) -> None:
        payload = item.payload
        if isinstance(payload, np.ndarray):
            self._before(life, item)
            source = payload
        else:
            assert begun is not None, "a device's page was not begun to be copied"
            payload.settle()
            source = begun
        header = BlockHeader(
            key=item.key,
            parent=item.parent,
            namespace=item.namespace,
            depth=item.depth,
            tokens=item.tokens,
            payload_bytes=source.nbytes,
            checksum=checksum(source) if life.verify.sums else NOT_SUMMED,
            created_s=int(self._wall()),
        )
        if begun is None:
            life.arena.fill(slot, header, source)
        else:
            life.arena.end_fill(slot, header)

    def _commit(self, life: Life, filled: Sequence[tuple[int, StoreItem]]) -> _Committing:
        slots, items = [slot for slot, _ in filled], [item for _, item in filled]
        request = cache_pb2.CommitRequest(
            session=life.session, slots=slots, traceparent=_trace_of(items)
        )
        return _Committing(items, self._control.commit(request))

    def _settle(self, life: Life, committing: _Committing, fates: _Fates) -> None:
        reply = committing.pending.result()
        if len(reply.committed) != len(committing.items):
            raise Detached("the sidecar answered for another number of slots")
        stored_bytes = 0
        reasons = chain(reply.reasons, repeat(""))  # a sidecar of an older version gives none
        for item, committed, reason in zip(
            committing.items, reply.committed, reasons, strict=False
        ):
            fates.note(item, "stored" if committed else reason or "torn")
            if not item.key.startswith(TRIAL_PREFIX):
                stored_bytes += item.payload.nbytes * committed
        life.add({"stored_bytes": stored_bytes})


def _trace_of(items: Sequence[StoreItem]) -> str:
    """A call is part of one trace: that of the first block which has one."""
    return next((item.trace for item in items if item.trace), "")


def _name(item: StoreItem) -> cache_pb2.BlockName:
    if item.depth:
        return cache_pb2.BlockName(key=item.key, parent=item.parent)
    first = cache_pb2.FirstBlock(origin=item.origin, namespace=item.namespace, tenant=item.tenant)
    return cache_pb2.BlockName(key=item.key, parent=item.parent, first=first)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A step whose slots were asked for; pending is None when there is nothing to ask."""

    step: Sequence[StoreItem]
    pending: Pending[cache_pb2.ReserveReply] | None


@dataclass(frozen=True, slots=True)
class _Committing:
    """Blocks that are copied and whose commit was sent."""

    items: Sequence[StoreItem]
    pending: Pending[cache_pb2.CommitReply]


def _step_blocks(items: Sequence[StoreItem], reservation_limit: int) -> tuple[int, int]:
    """Blocks of a step, and of the first and the last one; two steps may be reserved at once."""
    block_bytes = items[0].payload.nbytes
    step = max(1, min(SLOTS_MAX, reservation_limit, STEP_BYTES // block_bytes))
    end = max(1, min(step, END_BYTES // block_bytes))
    if len(items) > end:
        step = max(1, min(step, reservation_limit // 2))
    return step, min(step, end)


def _blocks_of_next(left: int, step: int, end: int) -> int:
    """Blocks of the next step but the first, so that the last one is short."""
    return left - end if 2 * end < left <= step + end else step


def _cut(rest: list[StoreItem], blocks: int) -> list[StoreItem]:
    """Take the first blocks away."""
    taken = rest[:blocks]
    del rest[:blocks]
    return taken


class _Fates:
    """What became of the blocks so far, and which are not cached, so that no child is tried."""

    def __init__(self, present: int) -> None:
        self._fates: dict[BlockKey, str] = {}
        self._tally = Counter({"present": present})

    def note(self, item: StoreItem, fate: str) -> None:
        self._fates[item.key] = fate
        self._tally[fate] += 1

    def note_all(self, items: Sequence[StoreItem], fate: str) -> None:
        for item in items:
            self.note(item, fate)

    def without_orphans(self, items: Sequence[StoreItem]) -> list[StoreItem]:
        """Those whose parent may be cached; the others are noted."""
        kept = []
        for item in items:
            if self._fates.get(item.parent, "stored") in ("stored", "present"):
                kept.append(item)
            else:
                self.note(item, "no_parent")
        return kept

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
