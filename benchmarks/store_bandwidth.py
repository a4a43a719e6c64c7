"""How near the store comes to a memcpy, and the flash tier to the bare disk.

DRAM: kvistd processes hold the arenas, this process is their worker. A put is CacheClient.store in
batches of the engine's size, a get is CacheClient.load; memcpy is numpy's copy of the same blocks
between the same pool and memory of the same kind as the arena. Flash: the tier and its I/O threads
move records between arena slots and segments; disk is a plain O_DIRECT loop of pwritev and preadv
from and to the same slots, on a file beside the segments. All of it takes turns within one run, so
that noise hits each alike; figures are medians of the rounds. "worker_cpu" has the ratios of the
DRAM tier by the CPU clock of the copying thread, which other load on the machine touches little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.core.host import Threads
from kvist.cachesvc.flash.flashio import FlashIo, Rise, Sink
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.copying import STORE_BATCH
from kvist.engine.local import LocalSidecar
from kvist.proto.keys import NO_KEY, BlockKey, Namespace, block_keys
from kvist.proto.layout import BlockFormat
from kvist.proto.record import PAGE_BYTES, BlockHeader, Bytes, RecordShape, Wanted, checksum
from kvist.tiers.dram import DramTier
from kvist.tiers.flash import FlashTier

BLOCK_TOKENS = 64
HEAD_DIM = 128
WORKING_SET_BYTES = 192 << 20
CPU = ".cpu"
MODES = ("always", "off")
Seconds = dict[str, list[float]]


@contextmanager
def timed(seconds: Seconds, name: str) -> Iterator[None]:
    """Add the wall time and this thread's CPU time of a block of code to two series."""
    started, started_cpu = time.perf_counter(), time.thread_time()
    yield
    seconds.setdefault(name, []).append(time.perf_counter() - started)
    seconds.setdefault(name + CPU, []).append(time.thread_time() - started_cpu)


class Blocks:
    """The blocks of one round: a chain of fresh keys over the same payloads.

    Args:
        namespace: of the blocks. payloads: shape (blocks, block_bytes).
    """

    def __init__(self, namespace: Namespace, payloads: Bytes, seed: int) -> None:
        digest, count = namespace.digest(), len(payloads)
        tokens = np.random.default_rng(seed).integers(0, 49152, count * BLOCK_TOKENS).astype("<u4")
        self.keys = block_keys(digest, tokens, BLOCK_TOKENS)
        own = [part.tobytes() for part in tokens.reshape(count, BLOCK_TOKENS)]
        parents = [NO_KEY, *self.keys[:-1]]
        self.items = [
            StoreItem(self.keys[at], parents[at], digest, at, own[at], payloads[at])
            for at in range(count)
        ]
        self.wanted = [Wanted(i.key, digest, i.tokens, i.payload.nbytes) for i in self.items]


class Worker:
    """A client of a kvistd of its own.

    Args:
        verify: the sidecar's dram_verify.
    """

    def __init__(
        self, folder: Path, verify: str, namespace: Namespace, slots: int, undo: ExitStack
    ) -> None:
        record_bytes = RecordShape(namespace.format.payload_bytes, BLOCK_TOKENS).record_bytes
        settings = {
            "dram_bytes": str(slots * record_bytes),
            "flash_path": "",
            "reservation_share": "0.5",
            "dram_verify": verify,
        }
        self.verify = verify
        self.sidecar = LocalSidecar(folder, settings)
        self.sidecar.start()
        undo.callback(self.sidecar.stop)
        self.sidecar.wait_ready()
        log = Log(sys.stderr, "warning")
        self.client: CacheClient = open_cache(str(self.sidecar.socket), namespace, "bench", log)
        undo.callback(self.client.close)
        if not self.client.wait_attached(10.0):
            raise SystemExit(f"not attached:\n{self.sidecar.tail()}")

    def put(self, blocks: Blocks) -> None:
        """Store all blocks; each must get in."""
        for start in range(0, len(blocks.items), STORE_BATCH):
            result = self.client.store(blocks.items[start : start + STORE_BATCH])
            if result.dropped or result.present:
                raise SystemExit(f"blocks were not stored: {result}")

    def get(self, blocks: Blocks, out: Bytes) -> None:
        """Load all blocks; each must come."""
        for wanted, into in zip(blocks.wanted, out, strict=True):
            reason = self.client.load(wanted, into, time.monotonic())
            if reason is not None:
                raise SystemExit(f"a block was not loaded: {reason}")


def measure_dram(block_bytes: int, folder: Path, rounds: int) -> Seconds:
    """Rounds of memcpy, put and get, one after the other."""
    heads = block_bytes // (2 * BLOCK_TOKENS * HEAD_DIM * 2)
    shape = BlockFormat(1, heads, HEAD_DIM, "bfloat16", BLOCK_TOKENS)
    if shape.payload_bytes != block_bytes:
        raise SystemExit(f"a block must be a multiple of {4 * BLOCK_TOKENS * HEAD_DIM} bytes")
    namespace = Namespace("benchmark", shape, "none", "none")
    count = max(16, WORKING_SET_BYTES // block_bytes)
    pool = np.random.default_rng(0).integers(0, 256, (count, block_bytes), dtype=np.uint8)
    out = np.zeros_like(pool)
    record = RecordShape(block_bytes, BLOCK_TOKENS)
    seconds: Seconds = {}
    with ExitStack() as undo:
        plain = DramTier(folder / "memcpy", count, record.record_bytes)
        undo.callback(plain.close)
        plain.prefault(threading.Event())
        views = [plain.slot_view(slot)[record.header_bytes :] for slot in range(count)]
        arena = [np.frombuffer(view, np.uint8, block_bytes) for view in views]
        # Twice the blocks of a round fit, so that puts evict from the third round on, as in use.
        workers = [Worker(folder / mode, mode, namespace, 2 * count, undo) for mode in MODES]
        time.sleep(2.0)  # the arenas are populated in the background
        for number in range(rounds + 1):
            blocks = Blocks(namespace, pool, number)
            with timed(seconds, "memcpy_put"):
                for source, into in zip(pool, arena, strict=True):
                    np.copyto(into, source)
            for worker in workers:
                with timed(seconds, f"put_{worker.verify}"):
                    worker.put(blocks)
            with timed(seconds, "memcpy_get"):
                for source, into in zip(arena, out, strict=True):
                    np.copyto(into, source)
            for worker in workers:
                out[:] = 0
                with timed(seconds, f"get_{worker.verify}"):
                    worker.get(blocks, out)
                if not np.array_equal(out, pool):
                    raise SystemExit("wrong bytes")
        del arena, views
    return {name: series[1:] for name, series in seconds.items()}  # the first one warms up


class Mover:
    """An arena, a flash tier and its I/O threads; told by them when a job has ended.

    Args:
        slots: blocks; the arena has a slot more for each, to rise into.
        io_threads: as the setting of that name.
    """

    def __init__(
        self, folder: Path, slots: int, shape: RecordShape, io_threads: int, undo: ExitStack
    ) -> None:
        self.dram = DramTier(
            Path("/dev/shm") / f"{folder.name}-flash", 2 * slots, shape.record_bytes
        )
        undo.callback(self.dram.close)
        self.dram.prefault(threading.Event())
        opened = FlashTier.open(folder / "flash", slots * shape.record_bytes, shape.record_bytes)
        self.flash: FlashTier = opened
        undo.callback(self.flash.close)
        self._posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ended = 0
        self.io = FlashIo(self.dram, self.flash, Threads(), io_threads, self._posted.put, self)
        undo.callback(self.io.close)

    def clock(self) -> float:
        """See flashio.Owner."""
        return time.monotonic()

    def risen(self, job: Rise) -> None:
        """See flashio.Owner."""
        if job.problem is not None:
            raise SystemExit(f"a block did not rise: {job.problem}")
        self._ended += 1

    def sunk(self, jobs: list[Sink], offline: str) -> None:
        """See flashio.Owner."""
        problems = [job.problem for job in jobs if job.problem]
        if offline or problems:
            raise SystemExit(f"blocks did not sink: {offline} {problems}")
        self._ended += len(jobs)

    def wait(self, jobs: int) -> None:
        """Until so many jobs have ended."""
        self._ended = 0
        while self._ended < jobs:
            self._posted.get()()


def measure_flash(block_bytes: int, folder: Path, rounds: int, io_threads: int) -> Seconds:
    """Rounds of plain writes, sinks, plain reads and rises, one after the other."""
    shape = RecordShape(block_bytes, BLOCK_TOKENS)
    count = max(12, WORKING_SET_BYTES // 2 // block_bytes)
    draw = np.random.default_rng(1)
    seconds: Seconds = {}
    with ExitStack() as undo:
        mover = Mover(folder, count, shape, io_threads, undo)
        headers = []
        for number in range(2 * count):
            payload = draw.integers(0, 256, block_bytes, dtype=np.uint8)
            header = BlockHeader(
                BlockKey(number.to_bytes(16, "little")), NO_KEY, bytes(32), 0,
                bytes(4 * BLOCK_TOKENS), block_bytes, checksum(payload), 0,
            )  # fmt: skip
            mover.dram.write(mover.dram.allocate(), header, payload)
            headers.append(header)
        views = [mover.dram.slot_view(slot) for slot in range(2 * count)]
        plain = os.open(folder / "plain", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        undo.callback(os.close, plain)
        os.posix_fallocate(plain, 0, count * shape.record_bytes)
        slots = [mover.flash.allocate() for _ in range(count)]
        for _ in range(rounds + 1):
            with timed(seconds, "disk_put"):
                for at in range(count):
                    os.pwritev(plain, [views[at]], at * shape.record_bytes)
            for slot in slots:
                mover.flash.free(slot)
            slots = [mover.flash.allocate() for _ in range(count)]
            with timed(seconds, "flash_put"):
                for at, slot in enumerate(slots):
                    mover.io.sink(Sink(at, headers[at].key, at, slot))
                mover.wait(count)
            with timed(seconds, "disk_get"):
                for at in range(count):
                    os.preadv(plain, [views[count + at]], at * shape.record_bytes)
            with timed(seconds, "flash_get"):
                for at, slot in enumerate(slots):
                    mover.io.rise(Rise(at, headers[at].key, slot, count + at))
                mover.wait(count)
            for at in range(count):
                if views[at][PAGE_BYTES:] != views[count + at][PAGE_BYTES:]:
                    raise SystemExit("wrong bytes")
        del views
    return {name: series[1:] for name, series in seconds.items()}


def ratio(base: list[float], ours: list[float]) -> tuple[float, list[float]]:
    """Rate of ours over the base's: of the medians, and the least and the greatest of a round."""
    each = [b / o for b, o in zip(base, ours, strict=True)]
    middle = statistics.median(base) / statistics.median(ours)
    return round(middle, 3), [round(min(each), 3), round(max(each), 3)]


def report(block_bytes: int, dram: Seconds, flash: Seconds, rounds: int) -> dict[str, object]:
    """The figures as one JSON object."""
    found: dict[str, object] = {"bench": "store_bandwidth", "block_bytes": block_bytes}
    spread: dict[str, list[float]] = {}

    def add(name: str, base: list[float], ours: list[float]) -> None:
        found[name], spread[name] = ratio(base, ours)

    for way in ("put", "get"):
        add(f"dram_{way}_over_memcpy", dram[f"memcpy_{way}"], dram[f"{way}_always"])
        add(f"dram_{way}_over_memcpy_verify_off", dram[f"memcpy_{way}"], dram[f"{way}_off"])
    for way in ("put", "get"):
        add(f"flash_{way}_over_disk", flash[f"disk_{way}"], flash[f"flash_{way}"])
    found["spread"] = spread
    found["worker_cpu"] = {
        f"{way}_{verify}": ratio(dram[f"memcpy_{way}{CPU}"], dram[f"{way}_{verify}{CPU}"])[0]
        for way in ("put", "get")
        for verify in MODES
    }
    sizes = {"dram": max(16, WORKING_SET_BYTES // block_bytes) * block_bytes}
    sizes["flash"] = max(12, WORKING_SET_BYTES // 2 // block_bytes) * block_bytes
    found["gb_per_s"] = {
        name: round(sizes[tier] / statistics.median(series) / 1e9, 2)
        for tier, all_series in (("dram", dram), ("flash", flash))
        for name, series in all_series.items()
        if not name.endswith(CPU)
    }
    return {**found, "store_batch": STORE_BATCH, "rounds": rounds}


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--block-mib", type=float, default=1.5, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--io-threads", type=int, default=2, help="of flash (%(default)s)")
    parser.add_argument("--folder", help="of the flash tier; a temporary one if not given")
    arguments = parser.parse_args()
    block_bytes = int(arguments.block_mib * (1 << 20))
    with (
        tempfile.TemporaryDirectory(prefix="kvist-bench-", dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(prefix="kvist-bench-", dir=arguments.folder) as disk,
    ):
        dram = measure_dram(block_bytes, Path(memory), arguments.rounds)
        flash = measure_flash(block_bytes, Path(disk), arguments.rounds, arguments.io_threads)
    found = report(block_bytes, dram, flash, arguments.rounds)
    print(json.dumps({**found, "io_threads": arguments.io_threads}))


if __name__ == "__main__":
    main()
