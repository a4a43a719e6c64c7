"""The worker's half: threads that bring blocks in and take blocks out beside vLLM's steps.

Saves. A block is complete when its step ends, and may be given away as soon as the scheduler has
been told so. It is copied into a buffer by a thread that starts when the step's forward pass is
over, while vLLM samples, answers and schedules; the next step begins by waiting for that thread
(handle_preemptions, before anything is written), which by then has long ended: 16 blocks of 3 MB
are 6 ms. So no block is held for a store: preemption, abort and reset_prefix_cache need nothing.

vLLM ends a step whose forward pass was broken off (SIGTERM to a worker, Ctrl-C, an error) like any
other, and its blocks hold what was never computed. None of them is stored, and nothing after it
either: vLLM's own blocks may be wrong from then on.

Loads. Two threads take blocks one by one, in order, verify each in a buffer and scatter it, from
the beginning of the step that planned them. A request's load ends once, with the number of leading
blocks that came.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.log import Log
from kvist.engine.plugins.vllm.lookups import Load, Save
from kvist.engine.plugins.vllm.memory import BlockMemory
from kvist.proto.record import Bytes

LOADERS = 2
# How long a load may wait for blocks that fell back to flash since they were looked up.
LOAD_PATIENCE_S = 2.0
# Copies that wait for the sidecar. A processor computes 20 MB of KV a second and the sidecar takes
# 1 GB, so this is full only when the sidecar is stuck.
BUFFERS_BYTES = 256 << 20
# Of these, made before the first step: memory that was never touched is 10 to 40 times as slow.
PREPARED = 32
STORE_BATCH = 64
CLOSE_DRAIN_S = 2.0
CLOSE_JOIN_S = LOAD_PATIENCE_S + 3.0


class LoadJob:
    """A load under way; its methods may be called from any thread.

    Args:
        load: what.
    """

    def __init__(self, load: Load) -> None:
        self.load = load
        self.reason = ""
        self.started_s = time.monotonic()
        self._lock = threading.Lock()
        self._next = 0
        self._under_way = 0
        self._end = len(load.blocks)

    @property
    def came(self) -> int:
        """Leading blocks that came, once it has ended."""
        return self._end

    def take(self) -> int | None:
        """The next block, by its place in the load; None when none is left."""
        with self._lock:
            if self._next >= self._end:
                return None
            self._next += 1
            self._under_way += 1
            return self._next - 1

    def give(self, at: int, reason: str | None) -> bool:
        """Say how a taken block ended; True for exactly one caller, when the load has ended."""
        with self._lock:
            self._under_way -= 1
            if reason is not None and at < self._end:
                self._end, self.reason = at, reason
            return not self._under_way and self._next >= self._end


class Copier:
    """Threads over one worker's KV memory.

    Args:
        cache: closed by close.
        memory: of the worker.
        log: where faults of the threads are told.
    """

    def __init__(self, cache: CacheClient, memory: BlockMemory, log: Log) -> None:
        self._cache = cache
        self._memory = memory
        self._log = log
        self._counts: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._done: list[LoadJob] = []
        self._loading = 0
        self._gathering = 0
        self._jobs: queue.SimpleQueue[LoadJob | None] = queue.SimpleQueue()
        self._gathers: queue.SimpleQueue[list[tuple[Save, Bytes]] | None] = queue.SimpleQueue()
        self._stores: queue.SimpleQueue[tuple[Save, Bytes] | None] = queue.SimpleQueue()
        self._free: list[Bytes] = []
        self._buffers = max(1, BUFFERS_BYTES // memory.payload_bytes)
        self._room = self._buffers
        self._closing = threading.Event()
        self._error: BaseException | None = None  # that was being handled when the step began
        self._in_step = False
        self._is_spoiled = False
        self._staging = [self._new_buffer() for _ in range(LOADERS)]
        targets = [("kvist-load", self._run_loads)] * LOADERS
        targets += [("kvist-populate", self._run_populate)]
        targets += [("kvist-gather", self._run_gathers), ("kvist-store", self._run_stores)]
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True) for name, target in targets
        ]
        for thread in self._threads:
            thread.start()

    # On vLLM's thread.

    def load(self, load: Load) -> None:
        """Begin to bring a request's blocks in; it ends in take_ended."""
        with self._lock:
            self._loading += 1
        job = LoadJob(load)
        for _ in range(min(LOADERS, len(load.blocks))):
            self._jobs.put(job)

    def take_ended(self, wait_s: float) -> list[LoadJob]:
        """Loads that have ended since the last call.

        Args:
            wait_s: how long to wait for one, if any is under way.
        """
        with self._ended:
            if wait_s and self._loading and not self._done:
                self._ended.wait(wait_s)
            ended, self._done = self._done, []
            self._loading -= len(ended)
        return ended

    def begin_step(self) -> None:
        """Wait until every block given to save has been copied out of vLLM's memory."""
        if self._in_step:
            self._spoil()
        self._in_step, self._error = True, sys.exc_info()[1]
        self.wait_gathered()

    def end_step(self, saves: list[Save]) -> None:
        """See save. What a step that is being broken off has left is not stored."""
        self._in_step = False
        if sys.exc_info()[1] is not self._error:
            self._spoil()
        if self._is_spoiled:
            with self._lock:
                self._counts["save_drops.step_failed"] += len(saves)
        elif saves:
            self.save(saves)

    def _spoil(self) -> None:
        if not self._is_spoiled:
            self._is_spoiled = True
            self._log.error("a step of vLLM was broken off: nothing is stored until it restarts")

    def save(self, saves: list[Save]) -> None:
        """Begin to copy blocks out; until wait_gathered they must not change."""
        taken: list[tuple[Save, Bytes]] = []
        with self._lock:
            for save in saves:
                if not self._room:
                    break
                self._room -= 1
                taken.append((save, self._free.pop() if self._free else self._new_buffer()))
            self._counts["save_drops.queue_full"] += len(saves) - len(taken)
            self._gathering += bool(taken)
        if taken:
            self._gathers.put(taken)

    def wait_gathered(self) -> None:
        """Wait until no block is being copied out of vLLM's memory."""
        with self._ended:
            while self._gathering:
                self._ended.wait()

    def take_counts(self) -> dict[str, float]:
        """What was copied and what was not since the last call; see metrics.COUNTERS."""
        with self._lock:
            counts = {name: count for name, count in self._counts.items() if count}
            self._counts.clear()
        return counts

    def close(self) -> None:
        """Let stores drain for CLOSE_DRAIN_S, end the threads, detach."""
        *loaders, _, gatherer, storer = self._threads
        self._gathers.put(None)
        gatherer.join(CLOSE_DRAIN_S)
        self._stores.put(None)
        storer.join(CLOSE_DRAIN_S)
        self._closing.set()
        for _ in loaders:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(CLOSE_JOIN_S)
        self._cache.close()

    # On threads of their own.

    def _new_buffer(self) -> Bytes:
        return np.empty(self._memory.payload_bytes, np.uint8)

    def _run_populate(self) -> None:
        self._memory.populate(self._closing)

    def _run_loads(self) -> None:
        staging = self._staging.pop()
        while (job := self._jobs.get()) is not None:
            while (at := job.take()) is not None:
                if job.give(at, self._bring(job.load, at, staging)):
                    self._end(job)

    def _end(self, job: LoadJob) -> None:
        with self._ended:
            self._counts["load_blocks"] += job.came
            self._counts["load_bytes"] += job.came * self._memory.payload_bytes
            self._counts["load_seconds"] += time.monotonic() - job.started_s
            if job.reason:
                self._counts[f"load_failures.{job.reason}"] += 1
            self._done.append(job)
            self._ended.notify_all()

    def _bring(self, load: Load, at: int, staging: Bytes) -> str | None:
        """Copy one block in; why it did not come, or None."""
        if self._closing.is_set():
            return "detached"
        try:
            deadline = time.monotonic() + LOAD_PATIENCE_S
            reason = self._cache.load(load.wanted[at], staging, deadline)
            if reason is None:
                self._memory.scatter(load.blocks[at], staging)
            return reason
        except Exception as error:  # a mistake costs one load, never the request
            self._log.error("load failed", request=load.request, error=repr(error))
            return "detached"

    def _run_gathers(self) -> None:
        for _ in range(min(self._buffers, PREPARED)):
            buffer = self._new_buffer()
            buffer.fill(0)
            with self._lock:
                self._free.append(buffer)
        while (taken := self._gathers.get()) is not None:
            gathered = self._gather(taken)
            lost = taken[gathered:]
            with self._ended:  # the next step waits for this, whatever happened
                self._counts["save_drops.error"] += len(lost)
                self._free.extend(buffer for _, buffer in lost)
                self._room += len(lost)
                self._gathering -= 1
                self._ended.notify_all()
            for one in taken[:gathered]:
                self._stores.put(one)

    def _gather(self, taken: list[tuple[Save, Bytes]]) -> int:
        """Copy blocks out; how many of them."""
        gathered = 0
        try:
            for save, buffer in taken:
                self._memory.gather(save.block, buffer)
                gathered += 1
        except Exception as error:  # a mistake costs these blocks, not the thread
            self._log.error("save failed", blocks=len(taken) - gathered, error=repr(error))
        return gathered

    def _run_stores(self) -> None:
        more = True
        while more:
            batch: list[tuple[Save, Bytes]] = []
            more = self._take_batch(batch)
            if batch:
                self._store(batch)
                with self._lock:
                    self._free.extend(buffer for _, buffer in batch)
                    self._room += len(batch)

    def _take_batch(self, batch: list[tuple[Save, Bytes]]) -> bool:
        """Wait for a block, take those that are queued behind it; False when no more come."""
        one = self._stores.get()
        while one is not None:
            batch.append(one)
            if len(batch) == STORE_BATCH or self._stores.empty():
                return True
            one = self._stores.get()
        return False

    def _store(self, batch: list[tuple[Save, Bytes]]) -> None:
        started = time.monotonic()
        counts = self._stored(batch)
        with self._lock:
            self._counts["save_seconds"] += time.monotonic() - started
            for name, count in counts.items():
                self._counts[name] += count

    def _stored(self, batch: list[tuple[Save, Bytes]]) -> Mapping[str, int]:
        """Store; what became of the blocks."""
        if self._closing.is_set():
            return {"save_drops.closing": len(batch)}
        try:
            result = self._cache.store([replace(s.item, payload=p) for s, p in batch])
        except Exception as error:  # a mistake costs these blocks, not the thread
            self._log.error("store failed", blocks=len(batch), error=repr(error))
            return {"save_drops.error": len(batch)}
        return {
            "save_blocks": result.stored,
            "save_bytes": result.stored * self._memory.payload_bytes,
            "save_present": result.present,
            **{f"save_drops.{why}": blocks for why, blocks in result.dropped.items()},
        }
