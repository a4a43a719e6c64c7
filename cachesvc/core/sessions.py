"""Sessions: which worker holds which reserved slots, and for how long.

A slot that a worker has reserved is its own until it commits, aborts, or cannot write any more.
The last is never guessed from time: the worker holds a lock on its ring file, which the kernel
drops when the process ends. So a worker that is slow, or stopped for an hour, never finds its
slot in other hands.

    open        calls are answered
    orphaned    the connection has ended; no call is answered, the slots are still its own
    gone        the lock is free: the slots come back, the counters are added up, the file goes
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import add
from pathlib import Path

from kvist.cachesvc.core.accounts import Accounts, Owner, namespace_label
from kvist.cachesvc.placing.tenancy import Group
from kvist.cachesvc.worker.ring import RingReader, make_ring
from kvist.proto.errors import SessionUnknown
from kvist.proto.keys import NO_KEY, BlockKey
from kvist.proto.shm import COUNTERS


@dataclass(frozen=True, slots=True)
class First:
    """What a worker knows of the prompt that begins with a block; see cache.proto.

    Attributes:
        origin: b"" when it was not told.
        namespace: digest.
        tenant: "" for the common pool.
    """

    origin: bytes
    namespace: bytes
    tenant: str


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What a worker needs to know of its session; the fields of AttachReply in cache.proto."""

    session: str
    boot_epoch: bytes
    index_path: Path
    arena_path: Path
    ring_path: Path
    bell_path: Path
    calls_path: Path
    slot_bytes: int
    dram_slots: int
    reservation_limit: int
    number: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slot that a worker may write.

    Attributes:
        key: block that it is for.
        parent: block before it, or NO_KEY.
        slot: of the arena.
        origin: of a first block, see proto.keys.origin_of; b"" when it was not told.
        group: whose quota it counts against; None: nobody's.
    """

    key: BlockKey
    parent: BlockKey
    slot: int
    origin: bytes = b""
    group: Group | None = None


@dataclass(slots=True, eq=False)
class Session:
    """One attached worker.

    Attributes:
        id: names it in calls; of no other session in any life of the sidecar.
        number: the same for this life only, >= 1.
        client: its name for people.
        pid: the process that holds the ring's lock.
        namespace: digest of what it stores; label: the same for people, see core/accounts.
        ring: the sidecar's end.
        opened_s: when. text: its namespace in words.
        reserved: its reservations by slot.
        is_open: whether its connection still stands.
    """

    id: str
    number: int
    client: str
    pid: int
    namespace: bytes
    ring: RingReader
    opened_s: float
    label: str = ""
    text: str = ""
    reserved: dict[int, Reservation] = field(default_factory=dict)
    is_open: bool = True


class Sessions:
    """All sessions of this life. One thread.

    Args:
        folder: where ring files are made.
        life: a few characters that no other life has.
        now: seconds, of a clock that does not jump.

    Attributes:
        accounts: what their workers counted, by tenant.
        opened: sessions so far.
    """

    def __init__(self, folder: Path, life: str, now: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._now = now
        self._life = life
        self.accounts = Accounts()
        self.opened = 0
        self._sessions: dict[str, Session] = {}
        self._holders: dict[BlockKey, str] = {}
        self._awaited: Counter[BlockKey] = Counter()
        self._ended_counters: Counter[str] = Counter()

    def __len__(self) -> int:
        """Sessions that are not gone."""
        return len(self._sessions)

    @property
    def reserved_slots(self) -> int:
        """Slots held by all of them."""
        return len(self._holders)

    def open(
        self, client: str, pid: int, namespace: bytes, model: str = "", text: str = ""
    ) -> Session:
        """Begin a session and make its ring. Raises: OSError.

        Args:
            model: a name for people. text: the namespace in words.
        """
        self.opened += 1
        name = f"{self._life}-{self.opened}"
        path = self._folder / f"{RING_PREFIX}{name}"
        make_ring(path)
        try:
            ring = RingReader(path)
        except OSError:
            path.unlink()
            raise
        label = namespace_label(model, namespace)
        self.accounts.introduce(namespace, label, "")
        session = Session(name, self.opened, client, pid, namespace, ring, self._now(), label, text)
        self._sessions[name] = session
        return session

    def get(self, name: str) -> Session:
        """An open session. Raises: SessionUnknown."""
        session = self._sessions.get(name)
        if session is None or not session.is_open:
            raise SessionUnknown(f"session {name} is not open; attach again")
        return session

    def orphan(self, name: str) -> None:
        """The session's connection has ended; a name that is unknown or orphaned is fine."""
        session = self._sessions.get(name)
        if session is not None:
            session.is_open = False

    def each(self) -> Iterator[Session]:
        """All that are not gone."""
        return iter(self._sessions.values())

    def holder(self, key: BlockKey) -> str | None:
        """Id of the session that has reserved a block, or None."""
        return self._holders.get(key)

    def is_awaited(self, key: BlockKey) -> bool:
        """Whether somebody has reserved a child of the block."""
        return key in self._awaited

    def await_child(self, parent: BlockKey) -> None:
        """A child of the block is about to be reserved."""
        if parent != NO_KEY:
            self._awaited[parent] += 1

    def forget_child(self, parent: BlockKey) -> None:
        """It is reserved no more."""
        if parent != NO_KEY:
            self._awaited[parent] -= 1
            if not self._awaited[parent]:
                del self._awaited[parent]

    def reserve(self, session: Session, reservation: Reservation) -> None:
        """Hand a slot to a session; await_child was called. The block is reserved by nobody."""
        assert reservation.key not in self._holders
        session.reserved[reservation.slot] = reservation
        self._holders[reservation.key] = session.id
        if reservation.group is not None:
            reservation.group.reserved += 1

    def release(self, session: Session, slot: int) -> Reservation | None:
        """Take a slot back, whose worker writes it no more; None when it does not hold it."""
        reservation = session.reserved.pop(slot, None)
        if reservation is not None:
            del self._holders[reservation.key]
            self.forget_child(reservation.parent)
            if reservation.group is not None:
                reservation.group.reserved -= 1
        return reservation

    def take_gone(self) -> list[Session]:
        """Orphans whose worker cannot write any more; what they reserved is theirs until release.

        Their counters are added to the totals and their files go.
        """
        gone = [
            session
            for session in self._sessions.values()
            if not session.is_open and session.ring.worker_is_gone()
        ]
        for session in gone:
            self._end(session)
        return gone

    def _end(self, session: Session) -> None:
        del self._sessions[session.id]
        self._ended_counters.update(session.ring.counters())
        self.accounts.end(session.label, session.ring.tenants())
        session.ring.path.unlink(missing_ok=True)
        session.ring.close()

    def counters(self) -> dict[str, int]:
        """Totals of all workers of this life, by name of proto.shm.COUNTERS."""
        totals = [self._ended_counters[name] for name in COUNTERS]
        for session in self._sessions.values():  # lists: 16 dicts to add up took 3 ms
            totals = list(map(add, totals, session.ring.counter_words()))
        return dict(zip(COUNTERS, totals, strict=True))

    def accounted(self) -> dict[Owner, list[int]]:
        """What all workers of this life counted, by tenant, see Accounts.totals."""
        opened = [(session.label, session.ring.tenants()) for session in self._sessions.values()]
        return self.accounts.totals(opened)

    def rates(self) -> list[tuple[str, dict[str, int]]]:
        """What each open session's worker measured, by its name; see proto.shm.RATES."""
        opened = [session for session in self._sessions.values() if session.is_open]
        return [(session.client, session.ring.rates()) for session in opened]

    def age_s(self, session: Session) -> float:
        """Seconds since it was opened."""
        return self._now() - session.opened_s

    def close(self) -> None:
        """End every session; their workers see it and attach to the next life."""
        for session in list(self._sessions.values()):
            self._end(session)


RING_PREFIX = "ring-"
