"""One session as its worker sees it: what it mapped, what it sees there, and its end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvist.cachesvc.catalog.index import IndexReader
from kvist.cachesvc.worker.ring import RingWriter
from kvist.proto import cache_pb2
from kvist.proto.errors import FormatRefused
from kvist.proto.hints import NO_HINT, Hint
from kvist.proto.keys import BlockKey
from kvist.proto.shm import CORRUPT
from kvist.proto.verify import Verifier
from kvist.transfer.shm import ArenaMap

Claimant = Literal["alone", "none", "self", "other"]


@dataclass(frozen=True, slots=True)
class Found:
    """What a lookup saw.

    Attributes:
        blocks: length of the longest cached prefix.
        reason: why the prefix ends there, one of MISS_REASONS; "" when all blocks are cached.
        epoch: boot epoch of the sidecar asked; b"" when detached.
    """

    blocks: int
    reason: str
    epoch: bytes


class Life:
    """The maps of one session. Users enter and leave; end waits for them.

    Args:
        reply: what the sidecar said about the session.

    Attributes:
        session: its id.
        number: its number in the claims of the index.
        boot_epoch: of the sidecar that gave it.
        reservation_limit: slots that may be held reserved at once, >= 1.
        index: the shared index.
        arena: the shared slots.
        verify: says what of a block is checked.
        ended: True once nobody new gets in.

    Raises:
        OSError: a file is not there or cannot be mapped, most likely because the sidecar has
            gone again. FormatRefused when a file is of another version or another life.
    """

    def __init__(self, reply: cache_pb2.AttachReply) -> None:
        self.session = reply.session
        self.number = reply.number
        self.boot_epoch = reply.boot_epoch
        self.reservation_limit = max(1, reply.reservation_limit)
        self.ended = False
        self._bell_path = reply.bell_path
        self._users = 0
        self._idle = threading.Condition()
        self._ring_lock = threading.Lock()
        self._bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        closers = [self._bell.close]
        try:
            self.index = IndexReader(Path(reply.index_path))
            closers.append(self.index.close)
            self.arena = ArenaMap(Path(reply.arena_path), reply.slot_bytes, reply.dram_slots)
            closers.append(self.arena.close)
            # The last to open and the last to close: its lock says that slots may be written.
            self._ring = RingWriter(Path(reply.ring_path))
            closers.append(self._ring.close)
            self.verify = Verifier(self.index.dram_verify)
            if self.index.boot_epoch != self.boot_epoch:
                raise FormatRefused("the index is of another life of the sidecar")
            self._stop_prefault, self._prefault = _start_prefault(self.arena)
        except BaseException:
            for close in closers:
                close()
            raise
        self._closers = closers

    def enter(self) -> bool:
        """Keep the maps open until leave; False when the session has ended."""
        with self._idle:
            self._users += not self.ended
            return not self.ended

    def leave(self) -> None:
        """Undo one enter."""
        with self._idle:
            self._users -= 1
            if self.ended and not self._users:
                self._idle.notify_all()

    def end(self) -> None:
        """Let nobody in, wait for those inside, close the maps and release the ring's lock."""
        with self._idle:
            self.ended = True
            self._idle.wait_for(lambda: not self._users)
        self._stop_prefault.set()
        self._prefault.join()
        for close in self._closers:
            close()

    def push(self, kind: int, blocks: int, key: BlockKey, hint: Hint = NO_HINT) -> None:
        """Put an entry into the ring; a full ring drops it."""
        with self._ring_lock:
            if not self._ring.push(kind, blocks, key, hint):
                self._ring.add("ring_drops", 1)

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to the ring's counters, which never drop."""
        with self._ring_lock:
            for counter, count in counts.items():
                self._ring.add(counter, count)

    def add_for(self, tenant: str | None, tokens: int, counts: Mapping[str, int]) -> None:
        """The same for a tenant's own, see RingWriter.add_for."""
        with self._ring_lock:
            self._ring.add_for(tenant, tokens, counts)

    def add_one(self, counter: str, count: int) -> None:
        """The same for one counter."""
        with self._ring_lock:
            self._ring.add(counter, count)

    def failed(self, reason: str, key: BlockKey) -> None:
        """A block's bytes were not what they should be: count it; the sidecar looks at damage."""
        if reason in ("corrupt", "torn"):
            self.add_one(f"failed_reads.{reason}", 1)
        if reason == "corrupt":
            self.push(CORRUPT, 1, key)
            self.ring_bell()

    def show(self, rates: Mapping[str, int]) -> None:
        """Say what was measured."""
        with self._ring_lock:
            self._ring.show(rates)

    def ring_bell(self) -> bool:
        """Wake the sidecar; False when it did not take the call, it looks by itself soon."""
        try:
            self._bell.sendto(b"", self._bell_path)
        except OSError:
            return False
        return True


def _start_prefault(arena: ArenaMap) -> tuple[threading.Event, threading.Thread]:
    """A load that meets unmapped pages pays a fault for each 4 KiB. Raises: RuntimeError."""
    stop = threading.Event()
    thread = threading.Thread(target=arena.prefault, args=(stop,), name="kvist-map", daemon=True)
    thread.start()
    return stop, thread
