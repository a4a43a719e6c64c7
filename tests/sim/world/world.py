"""A store, its disk, its workers and their fates; every choice is drawn from the seed."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

from kvist.cachesvc.api.answers import Answers
from kvist.cachesvc.api.service import STATUS
from kvist.cachesvc.core.host import Host
from kvist.cachesvc.core.parts import Parts
from kvist.cachesvc.core.store import Store, StoreConfig
from kvist.cachesvc.policy.eviction import POLICIES
from kvist.cachesvc.worker.control import _ERRORS
from kvist.proto import cache_pb2
from kvist.proto.errors import Detached, KvistError
from kvist.proto.keys import BlockKey
from kvist.proto.shm import FLASH_UNREAD
from sim.world.forest import LINES, NO_RULES, RULES, SLOT_BYTES, name_of
from sim.world.invariants import Model, check_closures, shown_keys, table_of
from sim.world.journal import Journal
from sim.world.medium import Medium, SimDisk
from sim.world.scheduler import Killed, Scheduler, SimThreads
from sim.world.worker import Call, SimClient, lost, stepped_copies

SETTLE_ROUNDS = 400


class World:
    """One history. run.py says what happens in it, this is what can happen.

    Args:
        random: of the seed.
        tell: gets a line per step; None is quiet.

    Attributes:
        clock_s: what the store takes for the time.
        store: the present life.
        model: what must be there.
        counted: boot epoch -> tokens that workers counted in that life.
        expected, unwanted: keys that the present life is to find on flash, and is not to.
        reads: keys that remote readers wait for, with the future of each.
    """

    def __init__(self, random: Random, tell: Callable[[str], None] | None = None) -> None:
        self.random = random
        self.journal = Journal(tell)
        self.scheduler = Scheduler(random)
        self.clock_s = 1000.0
        self.undo = ExitStack()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="kvist-sim-", dir=memory))
        self.undo.callback(shutil.rmtree, self.folder)
        self.undo.enter_context(stepped_copies(self.scheduler))
        dram_slots, flash_slots = random.randint(2, 7), random.choice((0, 3, 6, 10, 16, 20))
        self.medium = Medium(flash_slots, SLOT_BYTES, random)
        self.config = StoreConfig(
            run_dir=self.folder,
            shm_dir=self.folder,
            dram_bytes=dram_slots * SLOT_BYTES,
            flash_path=self.folder / "flash" if flash_slots else None,
            flash_bytes=flash_slots * SLOT_BYTES,
            slot_bytes=SLOT_BYTES,
            io_threads=random.choice((1, 2, 3)),
            flash_queue_blocks=random.choice((2, 8)),
            tenants=random.choice((NO_RULES, *RULES)),
            eviction=random.choice(POLICIES),
            flash_admission=random.choice(("always", "always", "second_use")),
            flash_write_bytes_per_day=random.choice((None,) * 5 + (20 * SLOT_BYTES,)),
            reservation_share=random.choice((0.3, 1.0)),
            prefault=False,
        )
        self.model = Model(self.medium)
        self.calls: list[Call] = []
        self.answered: list[Call] = []
        self.ended: list[str] = []
        self.reads: list[tuple[BlockKey, Any]] = []
        self.posted: deque[Callable[[], None]] = deque()
        self.expected, self.unwanted = set[BlockKey](), set[BlockKey]()
        self.clients = [
            SimClient(self, f"w{number}", int(random.random() < 0.3), self.journal)
            for number in range(random.randint(1, 3))
        ]
        self.born = len(self.clients)
        self.counted: Counter[bytes] = Counter()
        self.open()

    # Lives of the sidecar.

    def open(self) -> None:
        """Begin a life; may take several, when it dies amid its start."""
        self.disk = SimDisk(self.medium, self.scheduler)
        threads = SimThreads(self.scheduler, self.disk.life)
        self.posted = deque()
        self.store = Store(
            self.config, self.posted.append, lambda: self.clock_s, self.journal,
            self.random.randbytes, Host(threads, self.disk),
        )  # fmt: skip
        opened = False
        with suppress(Killed):
            self.store.open()
            opened = True
        self.medium.die_in = None
        if not opened:
            self.journal.note("killed amid its start")
            self.scheduler.kill(self.disk.life)
            self.open()
            return
        self.answers = Answers(self.store)
        self.parts.moves.clearing.step_blocks = (1, 3, 256)[self.store.boot_epoch[0] % 3]
        self.model.new_life(self.parts)
        self._rebuilds = 0
        self.forget_damaged()
        self.check()
        self.unwanted = set()  # a rebuild may find the records of what was cleared

    def forget_damaged(self) -> None:
        """A rebuild has only the records themselves; what is damaged cannot come back by it."""
        if self.state == "rebuilding":
            whole = self.medium.whole_records()
            self.expected = {key for key in self.expected if whole.issuperset(LINES[key])}

    @property
    def parts(self) -> Parts:
        """Of the present life."""
        return self.store._made

    @property
    def state(self) -> str:
        """Of flash."""
        return self.parts.moves.state

    def on_flash(self) -> dict[BlockKey, int]:
        """What the index shows there, and in which slot."""
        hidden, rows = self.parts.index.hidden.of, table_of(self.parts)
        return {key: slot for row, key, _, slot in rows if slot is not None and not hidden[row]}

    def crash(self, power: bool) -> None:
        """The sidecar dies where it stands; with the power its host does."""
        if power:
            self.expected = set()
        elif self.parts.flash is not None:
            self.expected = self.survivors()
        self.disk.life.dead = True
        self.scheduler.kill(self.disk.life)
        with suppress(Exception):  # it is dead; this only gives back what the kernel would
            self.store.close()
        self.posted.clear()
        self._lose_connections()
        if power:
            for client in self.clients:
                client.die()
            self.medium.lose_power()
            self.ended.clear()

    def survivors(self) -> set[BlockKey]:
        """Keys that a restart must find again: all that the index shows on flash."""
        return set(self.on_flash()) | (self.expected if self._flash_is_unknown() else set())

    def _flash_is_unknown(self) -> bool:
        """Whether the store has yet to find out what is on flash."""
        unread = self.parts.index.flash_state == FLASH_UNREAD
        return unread or self.state == "rebuilding"

    def close(self) -> None:
        """The sidecar ends as an operator ends it: what waits to sink gets there."""
        medium, parts = self.medium, self.parts
        faulty = medium.broken or medium.lose or medium.tear
        if parts.flash is not None:
            self.expected = self.survivors()
            if self.state == "ready" and not parts.flash.failure and not faulty:
                rows = table_of(parts)
                self.unwanted = {key for _, key, _, _ in rows} - shown_keys(parts, rows)
                self.expected |= {
                    job.key
                    for job in parts.moves._sinking
                    if not job.cancelled and not self.model.spoiled.intersection(LINES[job.key])
                }
        self.scheduler.frozen = None
        self.store.close()
        while self.posted:
            self.posted.popleft()()
        self._lose_connections()

    def _lose_connections(self) -> None:
        for call in self.calls + self.answered:
            lost(call)
        self.calls, self.answered = [], []
        for client in self.clients:
            client.session = ""
            client.held.clear()
        self.ended.clear()
        self.reads = [(key, future) for key, future in self.reads if future.done()]
        self.check_reads()
        self.scheduler.frozen = None

    def arm(self, changes: int) -> None:
        """Let the sidecar die at one of its next changes of the shared memory."""
        left = changes

        def armed(change: Callable[..., object]) -> Callable[..., object]:
            def changed(*arguments: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return change(*arguments)

            return changed

        for owner, names in self._changes():
            for name in names:
                setattr(owner, name, armed(getattr(owner, name)))

    def disarm(self) -> None:
        """Let it live."""
        for owner, names in self._changes():
            for name in names:
                vars(owner).pop(name, None)

    def _changes(self) -> tuple[tuple[object, tuple[str, ...]], ...]:
        parts = self.parts
        return (
            (parts.index, ("insert", "set_location", "remove")),
            (parts.dram, ("publish", "free")),
        )

    # The network.

    def send(self, sender: SimClient, method: str, request: Any) -> Any:
        """See worker.Network."""
        task = self.scheduler.current
        assert task is not None
        call = Call(sender, task, method, request)
        self.calls.append(call)
        self.scheduler.park()
        if call.error is not None:
            raise call.error
        return call.reply

    def connection_ended(self, session: str) -> None:
        """See worker.Network."""
        self.ended.append(session)

    def serve(self) -> str:
        """Answer a call; the answer is on its way then."""
        call = self.calls.pop(self.random.randrange(len(self.calls)))
        keys = dict(call.sender.held)
        try:
            call.reply = getattr(self.answers, call.method)(call.request)
        except KvistError as error:
            call.error = _ERRORS.get(STATUS[type(error)], Detached)(str(error))
        else:
            self._note_answer(call, keys)
        self.answered.append(call)
        return f"serve {call.method} of {call.sender.name}: {call.error or 'ok'}"

    def _note_answer(self, call: Call, keys: dict[int, bytes]) -> None:
        held = call.sender.held
        if call.method == "reserve":
            for name, answer in zip(call.request.blocks, call.reply.reservations, strict=True):
                if answer.outcome == cache_pb2.Reservation.RESERVED:
                    assert answer.slot not in held
                    held[answer.slot] = name.key
        elif call.method == "attach":
            call.sender.session = call.reply.session
        elif call.method == "commit":
            for slot, committed in zip(call.request.slots, call.reply.committed, strict=True):
                held.pop(slot, None)
                if committed:
                    self.model.committed.add(BlockKey(keys[slot]))

    def deliver_answer(self) -> str:
        """An answer reaches its worker."""
        call = self.answered.pop(self.random.randrange(len(self.answered)))
        call.task.ready = True
        return f"answer to {call.sender.name}"

    # The sidecar's thread.

    def tick(self, seconds: float) -> str:
        """Time goes on."""
        self.clock_s += seconds
        failed = self.state == "failed" and not self._flash_is_unknown()
        known = self.on_flash() if failed else {}
        self.store.tick()
        if failed and self._flash_is_unknown():  # it was let go, and is to be found again
            self.expected = set(known)
        return f"tick {seconds}"

    def deliver_post(self) -> str:
        """A flash thread's result reaches the sidecar's thread."""
        self.posted.popleft()()
        return "post"

    def end_session(self) -> str:
        """The sidecar sees that a connection has ended."""
        session = self.ended.pop(0)
        self.store.session_closed(session)
        return f"session {session[-2:]} closed"

    def waiting(self) -> Callable[[], str] | None:
        """Something that waits for the sidecar or comes from it; None when nothing does."""
        choices = [
            (self.posted, self.deliver_post),
            (self.calls, self.serve),
            (self.answered, self.deliver_answer),
            (self.ended, self.end_session),
        ]
        ready = [act for waits, act in choices if waits]
        return self.random.choice(ready) if ready else None

    def rush(self) -> str:
        """Everybody goes on for a while, in any order."""
        steps = self.random.choice((8, 30, 100))
        for step in range(steps):
            act = self.waiting() if self.random.random() < 0.4 else None
            if act is not None:
                act()
                self.check()
            elif self.scheduler.step() is None and self.waiting() is None:
                return f"rest after {step} steps"
        return f"{steps} steps"

    def check(self, cleared: bool = False) -> None:
        """Everything that must hold now."""
        self.model.check(self.store, self.clients, cleared)
        self.check_reads()
        self._look_for_rebuild()
        if self.state == "ready":
            self.check_survivors()

    def _look_for_rebuild(self) -> None:
        """Of a folder that was opened late the index may turn out to be lost."""
        rebuilds = self.parts.placement.counts.flash_rebuilds
        if rebuilds != self._rebuilds and self.expected:
            self.forget_damaged()
        self._rebuilds = rebuilds

    def check_survivors(self) -> None:
        """What had reached flash in an earlier life is there in this one."""
        missing = self.expected and self.expected - self.on_flash().keys()
        back = self.unwanted and self.unwanted & self.on_flash().keys()
        self.expected, self.unwanted = set(), set()
        assert not back, f"{sorted(map(name_of, back))} were cleared and are found again"
        assert not missing, f"{sorted(map(name_of, missing))} were on flash and are lost"

    def check_reads(self) -> None:
        """Records that remote readers have got are what was committed."""
        waiting = []
        for key, future in self.reads:
            if not future.done():
                waiting.append((key, future))
            elif future.exception() is None:
                self.model.check_record(key, future.result())
            else:
                assert isinstance(future.exception(), KvistError)
        self.reads = waiting

    def settle(self) -> None:
        """All faults end; the world comes to rest, and the store with it."""
        self.scheduler.frozen = None
        self.disarm()
        medium = self.medium
        medium.broken.clear()
        medium.lose = medium.tear = False
        for _ in range(SETTLE_ROUNDS):
            self.tick(1.1)
            while self.posted or self.calls or self.answered or self.ended:
                self._settle_once()
            self.check()
            if self.scheduler.step() is None and not self.posted and self._at_rest():
                break
        else:
            raise AssertionError(f"it does not come to rest: {self.parts.placement.jobs}")
        assert not self.reads, "a reader waits for ever"
        check_closures(self.parts, table_of(self.parts))
        if self.parts.flash is not None:
            assert medium.rows.keys() == self.on_flash().keys(), "the flash index has leaked"

    def _settle_once(self) -> None:
        if self.posted:
            self.deliver_post()
        if self.calls:
            self.serve()
        if self.answered:
            self.deliver_answer()
        if self.ended:
            self.end_session()

    def _at_rest(self) -> bool:
        moves, placement = self.parts.moves, self.parts.placement
        busy = moves._wishes or moves._sinking or moves._rising or moves.busy or placement.unlisted
        return not busy and (self.parts.flash is None or self.state == "ready")
