"""Chunks of vLLM's offloading: their names in the cache, and the threads that carry them.

A chunk lies in one row of vLLM's host memory and is pinned there as long as a job is under way. A
store copies it from the row into the sidecar's slot and a load copies it back, verified in place:
a row that fails holds nothing that vLLM would read.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import StoreItem
from kvist.proto.keys import KEY_BYTES, NO_KEY, BlockKey
from kvist.proto.layout import BlockFormat
from kvist.proto.record import Wanted

Rows = npt.NDArray[np.uint8]

# How long a load may wait for a chunk that fell to flash since it was looked up.
LOAD_PATIENCE_S = 2.0
# vLLM's name of a chunk: a SHA-256 and the number of a KV group. Hashes that are shorter are not
# cryptographic and are seeded anew in each process: two prompts may share one.
NAME_BYTES = 32 + 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk's names.

    Attributes:
        namespace: digest. key: in the cache. tokens: what stands in its record for tokens.
        parent: key of the chunk before it in the request that asks, NO_KEY if it is not known.
        depth: chunks before it.
    """

    namespace: bytes
    key: BlockKey
    tokens: bytes
    parent: BlockKey
    depth: int


class ChunkNames:
    """Names of one request's chunks.

    Args:
        digest: of the namespace. format: of a chunk.
    """

    def __init__(self, digest: bytes, format: BlockFormat) -> None:
        self.digest = digest
        self._format = format
        self._keys: dict[tuple[bytes, int], BlockKey] = {}

    def chunk(self, name: bytes, end: int | None) -> Chunk | None:
        """A chunk by vLLM's name; None when the name does not name its content.

        Args:
            name: block hash and KV group, see NAME_BYTES.
            end: tokens of the request up to its end; None when vLLM does not say.
        """
        if len(name) != NAME_BYTES:
            return None
        key = BlockKey(hashlib.sha256(self.digest + name).digest()[:KEY_BYTES])
        size = self._format.block_tokens
        parent = NO_KEY
        if end is not None:
            group = name[-4:]
            self._keys[group, end] = key
            parent = self._keys.get((group, end - size), NO_KEY)
        depth = 0 if parent == NO_KEY or end is None else end // size - 1
        return Chunk(self.digest, key, name.ljust(4 * size, b"\0"), parent, depth)


@dataclass(slots=True)
class Job:
    """A store or a load under way.

    Attributes:
        asked: vLLM's TransferJob.
        chunks: in its order; None for one without a name.
        rows: of vLLM's host memory, where each lies or goes.
        reasons: why each did not come or go, "" when it did; full when it has ended.
        seconds: how long it took.
    """

    asked: Any
    chunks: Sequence[Chunk | None]
    rows: Sequence[int]
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Courier:
    """One thread that stores and one that loads.

    Args:
        cache: not closed here.
        rows: vLLM's host memory, shape (chunks, bytes of one).
        log: where faults of the threads are told.
    """

    def __init__(self, cache: CacheClient, rows: Rows, log: Log) -> None:
        self._cache = cache
        self._rows = rows
        self._log = log
        self._changed = threading.Condition()
        self._under_way = 0
        self._ended: list[Job] = []
        self._stores: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._loads: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        work = (("kvist-store", self._stores, self._store), ("kvist-load", self._loads, self._load))
        self._threads = [
            threading.Thread(target=self._run, args=(jobs, do), name=name, daemon=True)
            for name, jobs, do in work
        ]
        for thread in self._threads:
            thread.start()

    # On vLLM's thread.

    def store(self, job: Job) -> None:
        """Begin to copy chunks into the cache."""
        self._begin(self._stores, job)

    def load(self, job: Job) -> None:
        """Begin to copy chunks out of the cache."""
        self._begin(self._loads, job)

    def _begin(self, jobs: queue.SimpleQueue[Job | None], job: Job) -> None:
        with self._changed:
            self._under_way += 1
        jobs.put(job)

    def take_ended(self) -> list[Job]:
        """Jobs that have ended since the last call."""
        with self._changed:
            ended, self._ended = self._ended, []
        return ended

    def drain(self) -> None:
        """Wait until no job is under way."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way)

    def close(self) -> None:
        """Carry what is under way, then end the threads."""
        for jobs in (self._stores, self._loads):
            jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._rows = np.empty((0, 0), np.uint8)  # vLLM unmaps its memory after this

    # On threads of their own.

    def _run(self, jobs: queue.SimpleQueue[Job | None], do: Callable[[Job], list[str]]) -> None:
        while (job := jobs.get()) is not None:
            started = time.monotonic()
            try:
                job.reasons = do(job)
            except Exception as error:  # a mistake costs one job, not the thread
                self._log.error("job failed", chunks=len(job.chunks), error=repr(error))
                job.reasons = ["detached"] * len(job.chunks)
            job.seconds = time.monotonic() - started
            with self._changed:
                self._under_way -= 1
                self._ended.append(job)
                self._changed.notify_all()

    def _store(self, job: Job) -> list[str]:
        named = [one for one in zip(job.chunks, job.rows, strict=True) if one[0] is not None]
        items: list[StoreItem] = []
        together: set[BlockKey] = set()
        for chunk, row in named:
            assert chunk is not None
            # A chunk whose parent is not there is a first one: better than none.
            stands = chunk.parent in together or self._is_here(chunk.parent)
            parent, depth = (chunk.parent, chunk.depth) if stands else (NO_KEY, 0)
            together.add(chunk.key)
            items.append(
                StoreItem(chunk.key, parent, chunk.namespace, depth, chunk.tokens, self._rows[row])
            )
        dropped = self._cache.store(items).dropped if items else {}
        why = next(iter(dropped), "")
        return ["no_cache" if chunk is None else why for chunk in job.chunks]

    def _is_here(self, key: BlockKey) -> bool:
        return key != NO_KEY and self._cache.lookup([key]).blocks == 1

    def _load(self, job: Job) -> list[str]:
        reasons: list[str] = []
        for chunk, row in zip(job.chunks, job.rows, strict=True):
            # A disk that is stuck is waited for once: other requests' loads wait behind this one.
            patience_s = 0.0 if "flash_late" in reasons else LOAD_PATIENCE_S
            reasons.append("no_cache" if chunk is None else self._bring(chunk, row, patience_s))
        return reasons

    def _bring(self, chunk: Chunk, row: int, patience_s: float) -> str:
        out = self._rows[row]
        wanted = Wanted(chunk.key, chunk.namespace, chunk.tokens, out.nbytes)
        return self._cache.load(wanted, out, time.monotonic() + patience_s) or ""
