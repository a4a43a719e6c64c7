"""Intake: how blocks come in, in two phases. Reserve a slot, fill it, commit it.

Before commit a block does not exist for anybody: it is not in the index, and its slot cannot be
read. A block may be reserved only on top of one that is stored, or reserved by the same session,
and committed only on top of one that is stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.catalog.index import Location
from kvist.cachesvc.core.claims import Claims
from kvist.cachesvc.core.sessions import First, Reservation, Session, Sessions
from kvist.cachesvc.placing.admission import Admission
from kvist.cachesvc.placing.expiry import Expiry
from kvist.cachesvc.placing.placement import Placement
from kvist.cachesvc.placing.tenancy import Group
from kvist.proto.errors import BlockCorrupt, BlockMissing, KvistError, TierFull
from kvist.proto.keys import NO_KEY, TRIAL_PREFIX, BlockKey
from kvist.proto.record import BlockHeader, Bytes, checksum, unpack_header
from kvist.proto.slot import fill_slot, payload_of

Outcome = Literal["reserved", "present", "refused"]
Refusal = Literal["", "full", "share", "no_parent"]
Loss = Literal["", "no_parent", "index_full", "torn"]
"""Why a filled slot was not committed; "" it was. no_parent: the block before has gone meanwhile.
index_full: no row is free where its key belongs. torn: the slot does not hold what was reserved, or
is not the session's."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """The answer for one block of a reserve.

    Attributes:
        outcome: reserved: fill the slot, then commit. present: stored, or being stored.
        slot: of the arena; None unless reserved.
        reason: why refused; "" otherwise.
    """

    outcome: Outcome
    slot: int | None = None
    reason: Refusal = ""


class Intake:
    """Takes blocks in. One thread.

    Args:
        share: slots that one session may hold reserved at once, while it is among few.
    """

    def __init__(
        self,
        placement: Placement,
        admission: Admission,
        expiry: Expiry,
        sessions: Sessions,
        claims: Claims,
        share: int,
    ) -> None:
        self._admission = admission
        self._expiry = expiry
        self._claims = claims
        self._placement = placement
        self._tenancy = placement.tenancy
        self._sessions = sessions
        self._share = share

    def reserve(
        self,
        session: Session,
        blocks: Sequence[tuple[BlockKey, BlockKey]],
        firsts: Mapping[BlockKey, First],
    ) -> list[Reserved]:
        """Slots for blocks that are about to be stored.

        Args:
            blocks: (key, parent's key or NO_KEY), parents before their children.
            firsts: of first blocks, by key, where they were told.

        Returns: one answer per block, same order.
        """
        for told in firsts.values():
            self._tenancy.introduce(told.namespace, told.tenant)
            self._sessions.accounts.introduce(told.namespace, session.label, told.tenant)
        groups: dict[BlockKey, Group | None] = {}
        answers = []
        for key, parent in blocks:
            first = firsts.get(key)
            namespace = session.namespace if first is None else first.namespace
            groups[key] = self._group(groups, parent, namespace)
            origin = b"" if first is None else first.origin
            wanted = Reservation(key, parent, -1, origin, groups[key])
            answers.append(self._reserve_one(session, wanted))
        if not any(key.startswith(TRIAL_PREFIX) for key, _ in blocks[:1]):  # which comes alone
            self._count(answers)
        return answers

    def _count(self, answers: Sequence[Reserved]) -> None:
        counts = self._placement.counts
        fates = Counter(one.reason or one.outcome for one in answers)
        counts.offers_reserved += fates["reserved"]
        counts.offers_present += fates["present"]
        counts.offers_full += fates["full"]
        counts.offers_share += fates["share"]
        counts.offers_no_parent += fates["no_parent"]

    def _group(
        self, groups: Mapping[BlockKey, Group | None], parent: BlockKey, namespace: bytes
    ) -> Group | None:
        """Whose a block is: as its parent, which is stored or was named before it in this call.

        Args:
            namespace: of a first block.
        """
        if parent in groups:
            return groups[parent]
        row = self._placement.index.locate(parent)
        if row is not None:
            return self._tenancy.group(self._placement.blocks.namespace(row))
        return self._tenancy.group(namespace)

    def _reserve_one(self, session: Session, wanted: Reservation) -> Reserved:
        key, parent = wanted.key, wanted.parent
        if self._is_here(key) or self._sessions.holder(key) is not None:
            return Reserved("present")
        if not self._stands(session, parent):
            return Reserved("refused", reason="no_parent")
        if len(session.reserved) >= self._limit():
            return self._refused(key, "share")
        self._sessions.await_child(parent)  # first, so that its parent is not what is evicted
        try:
            slot = self._placement.allocate_dram(wanted.group)
        except TierFull:
            self._sessions.forget_child(parent)
            self._offer_parent(parent)
            return self._refused(key, "full")
        self._sessions.reserve(session, replace(wanted, slot=slot))
        return Reserved("reserved", slot)

    def _limit(self) -> int:
        """Slots that a session may hold now. All shares together are no more than the arena, so
        nobody, however slow, holds what another one's share is."""
        return max(1, min(self._share, self._placement.dram.slots // max(1, len(self._sessions))))

    def _refused(self, key: BlockKey, reason: Refusal) -> Reserved:
        if reason == "full":  # one over a share comes back when a part of the share is committed
            self._placement.index.departed.note(key, "not_admitted")
        self._claims.settle(key)
        return Reserved("refused", reason=reason)

    def _is_here(self, key: BlockKey) -> bool:
        """Whether storing the block again would bring nothing.

        One that is only on flash, while flash is away, is worth having in DRAM.
        """
        index = self._placement.index
        row = index.locate(key)
        if row is None:
            return False
        return index.dram(row) is not None or self._admission.moves.state == "ready"

    def _stands(self, session: Session, parent: BlockKey) -> bool:
        if parent == NO_KEY or self._sessions.holder(parent) == session.id:
            return True
        return self._placement.index.locate(parent) is not None

    def _offer_parent(self, parent: BlockKey) -> None:
        row = None if parent == NO_KEY else self._placement.index.locate(parent)
        if row is not None:
            self._placement.offer(row)

    def commit(self, session: Session, slots: Sequence[int]) -> list[Loss]:
        """Make filled slots visible, parents before their children.

        Returns: one answer per slot, "" when its block is stored. If it is not, the slot is given
            back.
        """
        rows: list[int] = []
        answers = [self._commit_one(session, slot, rows) for slot in slots]
        self._placement.uses.tell_stored()
        for row in rows:
            if not self._placement.index.key(row).startswith(TRIAL_PREFIX):
                self._admission.stored(row)
        for row in rows:
            self._placement.offer(row)
        return answers

    def _commit_one(self, session: Session, slot: int, rows: list[int]) -> Loss:
        reservation = self._sessions.release(session, slot)
        if reservation is None:
            return "torn"
        try:
            header = self._placement.dram.header(slot)
            if (header.key, header.parent) != (reservation.key, reservation.parent):
                raise BlockCorrupt("the slot holds another block than was reserved")
            rows.append(self._enter(header, slot))
            if reservation.origin and reservation.parent == NO_KEY:
                self._placement.index.origins.note(reservation.origin, header.namespace)
            return ""
        except KvistError as error:
            loss = _loss(error)
            self._placement.counts.commits_refused += loss != "index_full"  # that is counted
            self._claims.settle(reservation.key)
            self._placement.free_dram(slot, reservation.group)
            self._offer_parent(reservation.parent)
            return loss

    def _enter(self, header: BlockHeader, slot: int) -> int:
        """Store what a slot holds; its row. The caller lets uses tell, when its batch is over.

        Raises: KvistError; the slot is the caller's.
        """
        placement, blocks = self._placement, self._placement.blocks
        if header.shape.record_bytes > placement.dram.slot_bytes:
            raise BlockCorrupt("the record is longer than its slot")
        parent = self._parent(header)
        row = placement.index.locate(header.key)
        placement.dram.publish(slot)
        if row is None:
            location = Location(slot, None)
            row = placement.insert(header.key, parent, header.namespace, location)
            placement.uses.stored(row)
            blocks.note_tokens(row, header.shape.block_tokens)
            self._expiry.stored(row)
        elif placement.index.dram(row) is None:
            blocks.gain_dram(row, slot)
            placement.uses.used(row)
        else:  # it rose meanwhile
            placement.dram.free(slot)
        placement.counts.dram_written += not header.key.startswith(TRIAL_PREFIX)
        self._claims.settle(header.key)
        return row

    def _parent(self, header: BlockHeader) -> int:
        """Row of the block before. Raises: BlockMissing. BlockCorrupt when it does not fit."""
        if header.parent == NO_KEY:
            if header.depth:
                raise BlockCorrupt("a block without a parent is not the first")
            return NO_ROW
        blocks, row = self._placement.blocks, self._placement.index.locate(header.parent)
        if row is None:
            raise BlockMissing("the block before is not stored")
        if blocks.depth[row] + 1 != header.depth or blocks.namespace(row) != header.namespace:
            raise BlockCorrupt("the block does not follow the one before")
        return row

    def abort(self, session: Session, slots: Sequence[int]) -> None:
        """Take back slots that their worker will not write; those it does not hold are fine."""
        for slot in slots:
            reservation = self._sessions.release(session, slot)
            if reservation is not None:
                self._claims.settle(reservation.key)
                self._placement.free_dram(slot, reservation.group)
                self._offer_parent(reservation.parent)

    def put_record(self, record: memoryview) -> Literal["stored", "present", "refused"]:
        """Store a whole record of a client that shares no memory.

        Raises:
            BlockCorrupt: it is not whole. FormatRefused: of another version.
        """
        header = unpack_header(record)
        payload = payload_of(record, header)
        if header.shape.record_bytes > self._placement.dram.slot_bytes:
            raise BlockCorrupt("the record is longer than a slot")
        if checksum(payload) != header.checksum:
            raise BlockCorrupt("payload checksum differs")
        if self._is_here(header.key) or self._sessions.holder(header.key) is not None:
            return "present"
        try:
            row = self._put(header, payload)
            self._placement.uses.tell_stored()
        except KvistError:
            self._offer_parent(header.parent)
            self._placement.index.departed.note(header.key, "not_admitted")
            return "refused"
        self._admission.stored(row)
        self._placement.offer(row)
        return "stored"

    def _put(self, header: BlockHeader, payload: Bytes) -> int:
        """Raises: TierFull, BlockMissing, BlockCorrupt when it does not fit what is stored."""
        placement = self._placement
        self._parent(header)
        self._sessions.await_child(header.parent)
        try:
            slot = placement.allocate_dram(self._tenancy.group(header.namespace))
        finally:
            self._sessions.forget_child(header.parent)
        try:
            fill_slot(placement.dram.slot_view(slot), header, payload)
            return self._enter(header, slot)
        except KvistError:
            placement.dram.free(slot)
            raise


def _loss(error: KvistError) -> Loss:
    if isinstance(error, TierFull):
        return "index_full"
    return "no_parent" if isinstance(error, BlockMissing) else "torn"
