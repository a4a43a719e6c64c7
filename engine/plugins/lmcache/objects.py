"""LMCache's objects in the cache: named, looked up, stored and loaded, on threads of their own.

An object is one chunk of tokens of one rank's share of a model. LMCache names it by a hash over the
prompt up to the chunk's end, the model's name, the rank, the group of layers and the salt. All of
it is in the key here; the dtypes and shapes, which LMCache's name leaves out, are in what a load
compares, so that an object of another layout is a miss and never wrong numbers.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.plugins.common import IDENTITY_BYTES, HashNames, opaque_format
from kvist.proto.keys import NO_KEY, Namespace, tenant_of
from kvist.proto.record import Bytes

End = TypeVar("End")

# One thread copies and verifies at half a memory's speed or less.
LOADERS = max(2, min(4, (os.cpu_count() or 2) // 4))
# How long a load may wait for objects that are still on flash.
LOAD_PATIENCE_S = 2.0
# Models, ranks and tenants whose digests are kept, 1 KB each.
NAMES_MAX = 16384


class Key(Protocol):
    """The fields of LMCache's ObjectKey."""

    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int
    cache_salt: str


@dataclass(frozen=True, slots=True)
class Piece:
    """An object with its bytes.

    Attributes:
        key: of LMCache.
        layout: dtypes and shapes in words.
        data: shape (bytes,), uint8, in LMCache's memory.
    """

    key: Key
    layout: str
    data: Bytes


class ObjectStore:
    """Objects of any sizes; each size has a session of its own, whose slots must hold it.

    Args:
        connect: opens a client for a namespace; closed by close.
        words: what the operator says that must match besides LMCache's keys.
        chunk_tokens: LMCache's --chunk-size, for the accounts.
        log: where faults are told.
    """

    def __init__(
        self, connect: Callable[[Namespace], CacheClient], words: str, chunk_tokens: int, log: Log
    ) -> None:
        self._connect = connect
        self._words = words
        self._chunk_tokens = chunk_tokens
        self._log = log
        self._lock = threading.Lock()
        self._clients: dict[int, CacheClient] = {}
        self._names: dict[tuple[str, int, int, str], HashNames] = {}
        self._storer = ThreadPoolExecutor(1, "kvist-store")
        self._finder = ThreadPoolExecutor(1, "kvist-find")
        self._loader = ThreadPoolExecutor(LOADERS, "kvist-load")

    @property
    def state(self) -> str:
        """ "attached", "detached", or "idle" before the first object."""
        states = {client.state for client in list(self._clients.values())}
        return "idle" if not states else "attached" if "attached" in states else "detached"

    # Each of these returns at once; what is given is called on another thread when it is done.

    def store(self, pieces: Sequence[Piece], done: Callable[[bool, list[Piece]], None]) -> None:
        """Store objects; done is told whether all of them are cached, and which are new."""
        nothing: tuple[bool, list[Piece]] = (False, [])
        _begin(
            self._storer, lambda: self._store(pieces), nothing, lambda end: done(*end), self._log
        )

    def find(
        self, keys: Sequence[Key], sizes: Sequence[int], done: Callable[[list[bool]], None]
    ) -> None:
        """Look objects up; those on flash begin to rise.

        Args:
            sizes: of objects that may be meant; sessions for them are opened.
        """
        nothing = [False] * len(keys)
        _begin(self._finder, lambda: self._find(keys, sizes), nothing, done, self._log)

    def load(self, pieces: Sequence[Piece], done: Callable[[list[bool]], None]) -> None:
        """Copy objects to where they belong, each verified there."""
        came = [False] * len(pieces)
        parts = min(LOADERS, len(pieces)) or 1
        left = itertools.count(parts - 1, -1)

        def part(first: int) -> None:
            for at in range(first, len(pieces), parts):
                came[at] = self._load(pieces[at])

        def ended(_: None) -> None:
            if next(left) == 0:
                done(came)

        for first in range(parts):
            _begin(self._loader, functools.partial(part, first), None, ended, self._log)

    # On those threads.

    def _client(self, size: int) -> CacheClient | None:
        """The session for objects of a size, opened when there is none."""
        with self._lock:
            if size not in self._clients:
                try:
                    shape = opaque_format(size, self._tokens_of(size))
                except ValueError as error:
                    self._log.error("objects not served", bytes=size, reason=str(error))
                    return None
                attached = Namespace("lmcache", shape, "in the model", self._words)
                self._clients[size] = self._connect(attached)
            return self._clients[size]

    def _tokens_of(self, size: int) -> int:
        return self._chunk_tokens if size % (4 * self._chunk_tokens) == 0 else 1

    def _names_of(self, key: Key) -> HashNames:
        parts = (key.model_name, key.kv_rank, key.object_group_id, key.cache_salt)
        names = self._names.get(parts)
        if names is None:
            # How many bytes there are says the record; the format here stands for any.
            namespace = Namespace(
                model=f"lmcache:{key.model_name}",
                format=opaque_format(4, 1),
                rope="in the model",
                compute=f"rank={key.kv_rank:#x} group={key.object_group_id} {self._words}",
                salt=key.cache_salt,
            )
            if len(self._names) >= NAMES_MAX:
                self._names.clear()
            names = self._names[parts] = HashNames(namespace)
        return names

    def _store(self, pieces: Sequence[Piece]) -> tuple[bool, list[Piece]]:
        by_size: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_size.setdefault(piece.data.nbytes, []).append(piece)
        new: list[Piece] = []
        stored = 0
        for size, some in by_size.items():
            client = self._client(size)
            if client is None:
                continue
            missing = [piece for piece in some if not self._is_there(client, piece.key)]
            result = client.store([self._item(piece) for piece in missing])
            stored += len(some) - len(missing) + result.stored + result.present
            new += [piece for piece in missing if self._is_there(client, piece.key)]
        return stored == len(pieces), new

    def _item(self, piece: Piece) -> StoreItem:
        own = identity(piece.key)
        item = self._names_of(piece.key).item(own, NO_KEY, 0, piece.data)
        tenant = tenant_of(piece.key.cache_salt)
        return replace(item, tokens=own + layout_digest(piece), origin=b"", tenant=tenant)

    def _is_there(self, client: CacheClient, key: Key) -> bool:
        return bool(client.tiers([self._names_of(key).key(identity(key))]))

    def _find(self, keys: Sequence[Key], sizes: Sequence[int]) -> list[bool]:
        for size in sizes:
            self._client(size)
        clients = [client for client in self._clients.values() if client.state == "attached"]
        if not clients:
            return [False] * len(keys)
        client, found = clients[0], []
        for key in keys:
            name = self._names_of(key).key(identity(key))
            tiers = client.tiers([name])
            found.append(bool(tiers))
            if tiers == ("flash",):
                client.prefetch([name], 1)
            elif not tiers:
                reason = client.lookup([name]).reason or "evicted"
                client.count(self._chunk_tokens, {}, {reason: self._chunk_tokens})
        return found

    def _load(self, piece: Piece) -> bool:
        client = self._client(piece.data.nbytes)
        if client is None:
            return False
        names, own = self._names_of(piece.key), identity(piece.key)
        key = names.key(own)
        tier = (client.tiers([key]) or ("dram",))[0]
        if tier == "flash":
            client.prefetch([key], 1)
        wanted = names.wanted(own, layout_digest(piece), piece.data.nbytes)
        reason = client.load(wanted, piece.data, time.monotonic() + LOAD_PATIENCE_S)
        tokens = self._chunk_tokens
        hits, misses = ({}, {reason: tokens}) if reason else ({tier: tokens}, {})
        client.count(tokens, hits, misses)
        if reason is None:
            client.touch([key], 1)
        return reason is None

    def close(self) -> None:
        """End the threads, detach."""
        for pool in (self._storer, self._finder, self._loader):
            pool.shutdown(wait=True)
        for client in self._clients.values():
            client.close()


def _begin(
    pool: ThreadPoolExecutor, work: Callable[[], End], otherwise: End, done: Callable[[End], None],
    log: Log,
) -> None:  # fmt: skip
    """Work on another thread; done is called once, whatever happens."""

    def run() -> None:
        end = otherwise
        try:
            end = work()
        except Exception as error:  # a mistake costs this task, not the thread
            log.error("task failed", error=repr(error))
        done(end)

    try:
        pool.submit(run)
    except RuntimeError:  # closed
        done(otherwise)


def identity(key: Key) -> bytes:
    """The hash that LMCache names a chunk by; IDENTITY_BYTES long, as blake3's are."""
    own = bytes(key.chunk_hash)
    return own if len(own) == IDENTITY_BYTES else hashlib.sha256(b"kvist.lmcache" + own).digest()


def layout_digest(piece: Piece) -> bytes:
    """What a load compares besides the name."""
    return hashlib.sha256(piece.layout.encode()).digest()
