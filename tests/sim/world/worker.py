"""Simulated workers: the real client, whose calls travel when the seed says so."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from threading import Event
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvist.cachesvc.api.calls import Pending
from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.log import Log
from kvist.cachesvc.placing import moves
from kvist.cachesvc.worker import life as life_module
from kvist.cachesvc.worker import loading
from kvist.cachesvc.worker.life import Life
from kvist.cachesvc.worker.loading import LayerLoad
from kvist.cachesvc.worker.storing import StoreItem
from kvist.proto import cache_pb2
from kvist.proto import slot as slot_module
from kvist.proto.errors import Detached, KvistError
from kvist.proto.record import PAGE_BYTES, BlockHeader, Bytes
from kvist.proto.verify import Verifier, Verify
from kvist.transfer.device import Target
from sim.blocks import Block, number_of
from sim.direct import Done
from sim.world.forest import FOREST, FORMAT, ITEMS, KEYS, SPACES, name_of
from sim.world.scheduler import Scheduler, Task

if TYPE_CHECKING:
    from sim.world.invariants import Model


class Call:
    """A call on its way to the sidecar, or its answer on the way back.

    Attributes:
        sender: who made it.
        task: who waits for it.
        reply: the answer; None before.
        error: what the sidecar answered instead.
    """

    def __init__(self, sender: SimClient, task: Task, method: str, request: Any) -> None:
        self.sender = sender
        self.task = task
        self.method = method
        self.request = request
        self.reply: Any = None
        self.error: KvistError | None = None


class Network(Protocol):
    """What a worker needs of the world."""

    scheduler: Scheduler
    random: Random
    clock_s: float
    counted: Counter[bytes]
    model: Model

    def send(self, sender: SimClient, method: str, request: Any) -> Any:
        """Make a call; by a task, which waits for the answer. Raises: KvistError."""
        ...

    def connection_ended(self, session: str) -> None:
        """The sidecar will see soon that a session's stream has ended."""
        ...


class SimControl:
    """Control of a worker over the world's network; see control.Control."""

    def __init__(self, world: Network, client: SimClient) -> None:
        self.calls = 0
        self._world = world
        self._client = client

    def attach(self, request: cache_pb2.AttachRequest) -> cache_pb2.AttachReply:
        """See Control."""
        reply: cache_pb2.AttachReply = self._world.send(self._client, "attach", request)
        return reply

    def reserve(self, request: cache_pb2.ReserveRequest) -> Pending[cache_pb2.ReserveReply]:
        """See Control."""
        reply: cache_pb2.ReserveReply = self._world.send(self._client, "reserve", request)
        return Done(reply)

    def commit(self, request: cache_pb2.CommitRequest) -> Pending[cache_pb2.CommitReply]:
        """See Control."""
        reply: cache_pb2.CommitReply = self._world.send(self._client, "commit", request)
        return Done(reply)

    def abort(self, request: cache_pb2.AbortRequest) -> cache_pb2.AbortReply:
        """See Control; the client never calls it."""
        raise AssertionError(request)

    def hang_up(self) -> None:
        """See Control."""
        self._client.lose_connection()

    def wait_ended(self) -> str:
        """See Control; the world says when."""
        raise AssertionError

    def close(self) -> None:
        """See Control."""


class SimClient:
    """One process with an engine in it.

    Attributes:
        held: slots that it was given and may write, by what it knows the sidecar knows; key.
        session: that its stream stands for, as the sidecar knows; "" when there is none.
        cache: the real client.
        verify: what it checks of a payload; "off" relies on generations alone.
    """

    def __init__(self, world: Network, name: str, space: int, log: Log) -> None:
        self.name = name
        self.space = space
        self.held: dict[int, bytes] = {}
        self.session = ""
        self._world = world
        self._scheduler = world.scheduler
        self._control = SimControl(world, self)
        self.cache = CacheClient(
            self._control, SPACES[space], name, log, now=lambda: world.clock_s, wall=lambda: 0.0
        )
        self.life: Life | None = None
        self.verify: Verify = world.random.choice(("always", "always", "off"))
        self._tasks: list[Task] = []

    @property
    def busy(self) -> int:
        """Tasks under way."""
        self._tasks = [task for task in self._tasks if not task.done]
        return len(self._tasks)

    def _begin(self, work: Callable[[], None], name: str) -> None:
        self._tasks.append(self._scheduler.start(work, f"{self.name} {name}", self))

    # Its session.

    def attach(self) -> None:
        """Begin to attach."""
        assert self.life is None
        self._begin(self._attach, "attach")

    def _attach(self) -> None:
        try:
            reply = self._control.attach(self.cache._request)
            life = Life(reply)
        except (KvistError, OSError):
            self.lose_connection()
            return
        life.verify = Verifier(self.verify)
        life.verify.sums = True  # for the others, who read what it stores
        self.life = self.cache._life = life

    def lose_connection(self) -> None:
        """The stream has ended, by whatever cause; the process does not know it yet, perhaps."""
        if self.session:
            self._world.connection_ended(self.session)
            self.session = ""

    @property
    def connected(self) -> bool:
        """Whether it is in the session that its stream stands for."""
        return self.life is not None and self.life.session == self.session

    def leave_session(self) -> None:
        """What the client's own thread does when the stream has ended, and nobody is inside."""
        assert not self.busy
        if self.life is not None:
            self.cache._life = None
            self.life.end()
            self.life = None
        self.held.clear()

    def die(self) -> None:
        """The process is gone; the kernel closes what it had open."""
        self._scheduler.kill(self)
        self.cache._life = None
        if self.life is not None:
            for close in self.life._closers:
                close()
            self.life = None
        self.lose_connection()
        self.held.clear()

    # What it does.

    def store(self, number: int, first: int) -> None:
        """Begin to store a block and those before it from some depth on."""
        items = ITEMS[number][first:]
        self._begin(lambda: self._store(items), f"store {name_of(items[-1].key)}")

    def _store(self, items: list[StoreItem]) -> None:
        result = self.cache.store(items)
        total = result.stored + result.present + sum(result.dropped.values())
        assert total == len(items), f"{result} of {len(items)} blocks"

    def load(self, number: int) -> None:
        """Begin to load a block; what comes must be right."""
        self._begin(lambda: self._load(number), f"load b{number}")

    def _load(self, number: int) -> None:
        block = FOREST[number]
        out = np.full(block.header.payload_bytes, 0xEE, np.uint8)
        reason = self.cache.load(block.wanted, out, 0.0)
        if reason is None:
            self._check(number, out)
        tokens = len(block.header.tokens) // 4
        hits = {"dram": tokens} if reason is None else {}
        if self.life is not None and not self.life.ended:
            self._world.counted[self.life.boot_epoch] += tokens
        tenant = f"t{number % 3}"
        self.cache.count(tokens, hits, {} if reason is None else {reason: tokens}, tenant)

    def _check(self, number: int, out: Bytes) -> None:
        """A block that was served is right, or the world has damaged it and it was not summed."""
        block = FOREST[number]
        is_right = np.array_equal(out, block.payload)
        spoiled = self.verify == "off" and block.header.key in self._world.model.spoiled
        assert is_right or spoiled, f"wrong bytes for b{number}"

    def stream(self, number: int, patience_s: float) -> None:
        """Begin to load a block and those before it layer by layer, risen or not; what comes must
        be right."""
        path = [FOREST[number_of(key)] for key in KEYS[number]]
        self._begin(lambda: self._stream(path, patience_s), f"stream b{number}")

    def _stream(self, path: list[Block], patience_s: float) -> None:
        outs: list[Bytes | Target] = [np.full(FORMAT.payload_bytes, 0xEE, np.uint8) for _ in path]
        layers: list[int] = []
        wanted, until_s = [block.wanted for block in path], self._world.clock_s + patience_s
        load = LayerLoad(wanted, outs, (1, 2), layers.append, until_s)
        blocks, reason = self.cache.stream(load)
        for block, out in zip(path[:blocks], outs, strict=False):
            assert isinstance(out, np.ndarray)
            self._check(number_of(block.header.key), out)
        assert (blocks == len(path)) == (not reason), f"{blocks} of {len(path)}: {reason}"
        assert layers in ([], [1], [1, 2])
        if reason == "corrupt":
            key = path[blocks].header.key
            assert self._world.model.hurt, f"{name_of(key)} is sound and said to be corrupt"
        tokens = len(path[0].header.tokens) // 4
        if self.life is not None and not self.life.ended:
            self._world.counted[self.life.boot_epoch] += tokens * len(path)
        hits, misses = {"dram": tokens * blocks}, {reason: tokens * (len(path) - blocks)}
        self.cache.count(tokens * len(path), hits, misses if reason else {}, "t0")

    def look_up(self, number: int) -> int:
        """Find the longest prefix; must be what looking at each block finds."""
        keys = KEYS[number]
        found = self.cache.lookup(keys)
        if self.life is not None and not self.life.ended:
            offered = [self.life.index.offered(key) for key in keys]
            first_gap = [*offered, False].index(False)
            assert found.blocks == first_gap, f"found {found.blocks} of {offered}"
            assert (found.blocks == len(keys)) == (not found.reason)
        return found.blocks


class _NoPrefault:
    """Stands for the thread that maps pages early, which changes nothing that can be seen."""

    def join(self) -> None:
        """It has ended."""


@contextmanager
def stepped_copies(scheduler: Scheduler) -> Iterator[None]:
    """Let others come between the pieces of a copy into or out of a slot of the arena."""
    checksum, pack_header = slot_module.checksum, slot_module.pack_header
    start_prefault, part_bytes = life_module._start_prefault, moves.PART_BYTES

    def stepped_checksum(payload: Any) -> int:
        scheduler.pause()
        return checksum(payload)

    def stepped_pack(header: BlockHeader, slot: memoryview) -> None:
        pack_header(header, slot)
        scheduler.pause()

    def stepped_sleep(_seconds: float) -> None:
        scheduler.pause()

    slot_module.checksum, slot_module.pack_header = stepped_checksum, stepped_pack
    loading.time = SimpleNamespace(sleep=stepped_sleep)  # type: ignore[assignment]
    moves.PART_BYTES = PAGE_BYTES
    life_module._start_prefault = lambda *_: (Event(), _NoPrefault())  # type: ignore
    try:
        yield
    finally:
        slot_module.checksum, slot_module.pack_header = checksum, pack_header
        loading.time, moves.PART_BYTES = time, part_bytes
        life_module._start_prefault = start_prefault


def lost(call: Call) -> None:
    """The answer will never come."""
    call.error = Detached("the sidecar is gone")
    call.task.ready = True
