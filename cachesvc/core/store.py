"""The store: the sidecar's inner half as one object. Thin; the work is done where it points to.

    index, blocks      what is where, and what stands on what
    placement, moves   what stays, goes, sinks and rises      (eviction, flashio, restore)
    sessions, intake   who may write which slot, and how it becomes a block

All of it runs on one thread, so nothing has a lock; flash threads hand their results to that
thread through post.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import takewhile
from types import MappingProxyType
from typing import Literal

from kvist.cachesvc.catalog.blocks import name_of
from kvist.cachesvc.core.host import Host
from kvist.cachesvc.core.intake import Loss, Reserved
from kvist.cachesvc.core.parts import Maker, Parts, StoreConfig, sweep
from kvist.cachesvc.core.report import StoreStats, store_stats, unopened_flash
from kvist.cachesvc.core.sessions import First, Session, SessionInfo, Sessions
from kvist.cachesvc.flash.flashio import Post
from kvist.cachesvc.flash.watch import backoff_s
from kvist.cachesvc.folders import locked
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.ring import Entry
from kvist.proto.errors import BlockCorrupt, BlockMissing, ConfigInvalid, FormatRefused
from kvist.proto.hints import NO_HINT, Hint
from kvist.proto.keys import BlockKey, trial_key
from kvist.proto.record import PAGE_BYTES, RecordShape, unpack_header
from kvist.proto.shm import CLAIM, CORRUPT, EXPECT, FOLLOW, PREFETCH, RELEASE, TOUCH

__all__ = ["Reserved", "SessionInfo", "Store", "StoreConfig", "StoreStats"]

EPOCH_BYTES = 16
BELL_NAME = "bell"
CALLS_NAME = "calls"
NO_FIRSTS: Mapping[BlockKey, First] = MappingProxyType({})

# Stands for the session of a client that has none.
_ELSEWHERE = 0
# Of one ring in one tick: a touch of a prompt of 100k tokens walks 1563 blocks, 0.2 ms.
_DRAIN_ENTRIES = 64


class Store:
    """The cache of one node. Every method is called on one thread, the one that post posts to.

    Args:
        config: see StoreConfig.
        post: runs a callable on the store's thread, soon; called from any thread.
        now: seconds of CLOCK_MONOTONIC.
        log: where changes of state are told.
        random: bytes for the boot epoch.
        host: threads and disk.
    """

    def __init__(
        self,
        config: StoreConfig,
        post: Post,
        now: Callable[[], float],
        log: Log,
        random: Callable[[int], bytes] = os.urandom,
        host: Host = Host(),  # noqa: B008 - it has no state
    ) -> None:
        self.boot_epoch = random(EPOCH_BYTES)
        self.bell_path = config.run_dir / BELL_NAME
        self.calls_path = config.run_dir / CALLS_NAME
        self._config = config
        self._post: Post = lambda call: post(partial(self._run_posted, call))
        self.on_made: Callable[[], None] = lambda: None
        self._broken: Exception | None = None
        self._now = now
        self._log = log
        self._host = host
        self._opened_s = now()
        self._sessions = Sessions(config.shm_dir, self.boot_epoch.hex()[:12], now)
        self._parts: Parts | None = None
        self._undo = ExitStack()
        self._flash_failure = ""
        self._attempts, self._attempt_at_s = 0, 0.0

    def open(self) -> None:
        """Take the folders, and make arena, index and flash as far as their sizes are known.

        Raises:
            ConfigInvalid: another sidecar has the folders, or a size or folder cannot be used.
            FormatRefused: the flash folder was formatted otherwise; the message says what to do.
        """
        with ExitStack() as undo:
            for folder in dict.fromkeys((self._config.run_dir, self._config.shm_dir)):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                undo.enter_context(locked(folder))
            sweep(self._config.shm_dir)
            undo.callback(self._sessions.close)
            self._undo = undo.pop_all()
        try:
            self._parts = self._make(self._config.slot_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Write what waits to sink, end all sessions, let everything go."""
        self._parts = None
        self._undo.close()

    def _make(self, slot_bytes: int | None) -> Parts | None:
        with ExitStack() as undo:
            maker = Maker(self._config, self._post, self._now, self._log, undo, self._host)
            parts = maker.make(slot_bytes, self.boot_epoch, self._sessions)
            self._undo.callback(undo.pop_all().close)
        self._note_flash("" if parts else maker.failure)
        if parts is not None:
            self.on_made()
            parts.index.beat(int(self._now() * 1e9))
        return parts

    def _note_flash(self, failure: str) -> None:
        if failure and failure != self._flash_failure:
            self._log.error("flash tier failed", reason=failure)
        self._flash_failure = failure

    def _try_again(self, now_s: float) -> None:
        """A flash folder that could not be read at the start may be readable now."""
        if self._flash_failure and now_s >= self._attempt_at_s:
            try:
                self._parts = self._make(None)
            except (ConfigInvalid, FormatRefused) as error:  # for a person, while others are served
                self._note_flash(str(error))
            self._attempts += 1
            self._attempt_at_s = now_s + backoff_s(self._attempts)

    def _parts_for(self, record_bytes: int) -> Parts:
        """The parts, made now if this is the first record that comes.

        Raises:
            ConfigInvalid: the record is larger than the slots.
        """
        parts = self._parts = self._parts or self._make(record_bytes)
        assert parts is not None
        if record_bytes > parts.dram.slot_bytes:
            raise ConfigInvalid(
                f"slot_bytes: a record of this model needs {record_bytes} bytes, the slots have"
                f" {parts.dram.slot_bytes}; set slot_bytes to {record_bytes} or more, clear"
                " flash_path if there is one, and restart the sidecar"
            )
        return parts

    # Sessions.

    def attach(
        self,
        client: str,
        pid: int,
        namespace: bytes,
        namespace_text: str,
        shape: RecordShape,
        model: str = "",
    ) -> SessionInfo:
        """Open a session.

        Args:
            client: a name for people. pid: the process that will hold the ring's lock.
            namespace: digest. namespace_text: the same in words, for the log.
            shape: of the records that it stores.
            model: a name for people, in metrics.

        Raises:
            ConfigInvalid: its records are larger than the slots, or the tiers cannot be made.
            FormatRefused: as open.
        """
        parts = self._parts_for(shape.record_bytes)
        session = self._sessions.open(client, pid, namespace, model, namespace_text)
        parts.placement.policy.block_tokens = shape.block_tokens
        parts.index.set_sessions(len(self._sessions))
        self._log.info(
            "session opened", session=session.id, client=client, pid=pid,
            namespace=namespace.hex()[:12], namespace_text=namespace_text,
        )  # fmt: skip
        return SessionInfo(
            session=session.id, boot_epoch=self.boot_epoch, index_path=parts.index.path,
            arena_path=parts.dram.path, ring_path=session.ring.path, bell_path=self.bell_path,
            calls_path=self.calls_path, slot_bytes=parts.dram.slot_bytes,
            dram_slots=parts.dram.slots, reservation_limit=parts.reservation_limit,
            number=session.number,
        )  # fmt: skip

    def session_closed(self, session: str) -> None:
        """Its connection has ended. What it reserved comes back in the tick that finds its
        worker's lock free, never before. An unknown session is fine.
        """
        self._sessions.orphan(session)

    def reserve(
        self,
        session: str,
        blocks: Sequence[tuple[BlockKey, BlockKey]],
        firsts: Mapping[BlockKey, First] = NO_FIRSTS,
    ) -> list[Reserved]:
        """See Intake.reserve. Raises: SessionUnknown."""
        holder = self._sessions.get(session)
        return self._made.intake.reserve(holder, blocks, firsts)

    def commit(self, session: str, slots: Sequence[int]) -> list[Loss]:
        """See Intake.commit. Raises: SessionUnknown."""
        holder = self._sessions.get(session)
        self._drain(holder, self._now())  # the touch of what the blocks go on from comes first
        return self._made.intake.commit(holder, slots)

    def abort(self, session: str, slots: Sequence[int]) -> None:
        """See Intake.abort. Raises: SessionUnknown."""
        holder = self._sessions.get(session)
        self._made.intake.abort(holder, slots)

    @property
    def _made(self) -> Parts:
        assert self._parts is not None, "a session exists, so its parts do"
        return self._parts

    @property
    def parts(self) -> Parts | None:
        """What it is made of; None as long as the size of slots is open."""
        return self._parts

    # Blocks.

    def lookup(self, keys: Sequence[BlockKey]) -> tuple[list[str], str]:
        """Longest cached prefix of a prompt.

        Returns: the fastest tier of each block of it, and why it ends where it does, one of
            proto.shm.MISS_REASONS; "" if all are cached.
        """
        if self._parts is None:
            return [], "never_stored" if keys else ""
        index = self._parts.index
        tiers = []
        for key in keys[: index.longest_prefix(keys)]:
            location = index.find(key)
            assert location is not None
            tiers.append("dram" if location.dram is not None else "flash")
        return tiers, "" if len(tiers) == len(keys) else index.miss_reason(keys[len(tiers)])

    def prefetch(self, keys: Sequence[BlockKey], hint: Hint = NO_HINT) -> int:
        """Have the cached prefix of a prompt rise to DRAM; how many blocks are on the way."""
        blocks = self._parts.index.longest_prefix(keys) if self._parts else 0
        return self._rise(_ELSEWHERE, keys[blocks - 1], hint) if blocks else 0

    def _rise(self, session: int, last: BlockKey, hint: Hint, followed: bool = False) -> int:
        placement = self._made.placement
        row = placement.index.locate(last)
        if row is None:
            return 0
        placement.uses.wished(session, row, hint)
        return self._made.moves.rise_chain(row, followed)

    async def read_record(self, key: BlockKey, hint: Hint = NO_HINT) -> memoryview:
        """A copy of a block's record, from flash by way of DRAM if need be.

        Raises: BlockMissing when no tier holds it. TierFull, TierOffline, BlockCorrupt when it
            cannot be had from flash now.
        """
        if self._parts is None:
            raise BlockMissing("nothing is stored yet")
        return await asyncio.wrap_future(self._parts.moves.read(key, hint))

    def put_record(self, record: bytes | memoryview) -> Literal["stored", "present", "refused"]:
        """Store a whole record, its parent before it.

        Raises:
            BlockCorrupt: it is not whole. FormatRefused: of another version.
            ConfigInvalid: larger than the slots.
        """
        view = memoryview(record)
        if len(view) < PAGE_BYTES:
            raise BlockCorrupt(f"{len(view)} bytes are no record")
        shape = unpack_header(view).shape
        return self._parts_for(shape.record_bytes).intake.put_record(view)

    @property
    def record_bytes_max(self) -> int:
        """Longest record that may fit a slot."""
        return self._parts.dram.slot_bytes if self._parts else self._config.dram_bytes

    def pin(self, keys: Sequence[BlockKey], ttl_s: int, strength: int) -> int:
        """Pin the cached prefix of a prompt; how many blocks are pinned. See placing/pins."""
        rows = self._rows(keys)
        return self._made.placement.pins.pin(rows, ttl_s, strength) if rows else 0

    def unpin(self, keys: Sequence[BlockKey]) -> int:
        """End the pins of a prompt's blocks; how many there were."""
        rows = self._rows(keys)
        return self._made.placement.pins.unpin(rows) if rows else 0

    def _rows(self, keys: Sequence[BlockKey]) -> list[int]:
        """Rows of a prompt's blocks, up to the first that is not stored."""
        locate = self._parts.index.locate if self._parts else (lambda _key: None)
        return list(takewhile(lambda row: row is not None, map(locate, keys)))  # type: ignore[arg-type]

    def clear(self, namespace: bytes | None) -> int:
        """Drop every block, or every block of one namespace; how many. See placing/clearing."""
        if self._parts is None:
            return 0
        is_trial = namespace and self._parts.index.locate(trial_key(namespace)) is not None
        say, what = (self._log.debug, "self test over") if is_trial else (self._log.info, "cleared")
        dropped = self._parts.moves.clear(namespace)
        say(what, blocks=dropped, namespace=namespace.hex() if namespace else "all")
        return dropped

    def stats(self) -> StoreStats:
        """What the store holds and has done."""
        parts, uptime_s = self._parts, self._now() - self._opened_s
        placement, moves = (parts.placement, parts.moves) if parts else (None, None)
        stats = store_stats(self.boot_epoch, uptime_s, self._sessions, placement, moves)
        if parts is None and self._flash_failure:
            return replace(stats, tiers=(unopened_flash(self._flash_failure),))
        return replace(stats, wear=parts.admission.wear) if parts and parts.flash else stats

    # Time.

    def tick(self) -> bool:
        """Read the rings, give back what the dead had reserved, look after flash, beat.

        Called every few milliseconds and when the bell rings. A few us when nothing is new.

        Returns: whether anything was.

        Raises: what a posted call raised, which is a broken invariant: a loop only logs it.
        """
        if self._broken is not None:
            raise self._broken
        now_s = self._now()
        if self._parts is None:
            self._try_again(now_s)
            return False
        self._parts.index.beat(int(now_s * 1e9))
        busy = False
        for session in self._sessions.each():
            busy |= self._drain(session, now_s)
        for session in self._sessions.take_gone():
            slots = list(session.reserved)
            self._parts.intake.abort(session, slots)
            self._parts.claims.end(session.number)
            self._parts.index.set_sessions(len(self._sessions))
            self._log.info("session ended", session=session.id, reserved_slots=len(slots))
        self._parts.claims.expire(now_s)
        self._parts.expiry.tick(now_s)
        self._parts.moves.poll(now_s)
        self._parts.admission.tick(now_s, self._host.threads)
        return busy or self._parts.moves.busy

    def _run_posted(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._broken = self._broken or error
            raise

    def _drain(self, session: Session, now_s: float) -> bool:
        """Read a session's ring; whether something was in it."""
        entries = session.ring.drain(_DRAIN_ENTRIES)
        for entry in entries:
            self._heed(session.number, entry, now_s)
        return bool(entries)

    def _heed(self, session: int, entry: Entry, now_s: float) -> None:
        placement = self._made.placement
        row = placement.index.locate(entry.key)
        if entry.kind == RELEASE:
            self._made.claims.release(entry.key, session)
        elif row is None:
            if entry.kind == CLAIM:
                self._made.claims.claim(entry.key, session, now_s)
            elif entry.kind == EXPECT:
                placement.uses.expected(name_of(entry.key), entry.hint)
        elif entry.kind in (TOUCH, EXPECT):
            placement.uses.touched(session, row, entry.hint)
            self._made.admission.used(row)
        elif entry.kind in (PREFETCH, FOLLOW):
            self._rise(session, entry.key, entry.hint, entry.kind == FOLLOW)
        elif entry.kind == CORRUPT:
            self._check(row, entry.key)

    def _check(self, row: int, key: BlockKey) -> None:
        placement = self._made.placement
        slot, blocks = placement.index.dram(row), len(placement.blocks)
        if not placement.check_dram(row):
            self._log.warning(
                "block corrupt", tier="dram", key=key.hex(), slot=slot,
                dropped_blocks=blocks - len(placement.blocks),
                quarantined_slots=placement.dram.quarantined,
            )  # fmt: skip
