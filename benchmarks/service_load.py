"""Sixteen workers at one sidecar: look up, load, store, over prompts of Zipf popularity.

Each client is a process with a CacheClient of its own, as an engine has one. Again and again it
draws a prompt (its head shared with nine others), looks up its longest cached prefix, loads every
block of it (each is verified and must be the one that was stored), and stores the blocks that
were missing: all that an engine does but the computing. The loop is closed, so the latencies are
those of a machine with nothing to spare.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.local import LocalSidecar
from kvist.proto.keys import NO_KEY, BlockKey, Namespace, block_keys, origin_of
from kvist.proto.layout import BlockFormat
from kvist.proto.record import Bytes, Wanted

FORMAT = BlockFormat(8, 4, 128, "bfloat16", 64)  # 1 MiB a block
NAMESPACE = Namespace("service-load", FORMAT, "none", "none")
PROMPTS = 2000
GROUP = 10
HEAD_BLOCKS = 8
TAIL_BLOCKS = (2, 24)
ZIPF = 1.1
OPERATIONS = ("lookup", "load_block", "store")


class Prompts:
    """The prompts by rank: a head that a group shares, and a tail of its own."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[BlockKey], list[bytes]]] = {}

    def get(self, rank: int) -> tuple[list[BlockKey], list[bytes]]:
        """Keys of a prompt's blocks, and each block's own tokens."""
        if rank not in self._known:
            head = np.random.default_rng(rank // GROUP).integers(0, 50_000, HEAD_BLOCKS * 64)
            draw = np.random.default_rng(1_000_000 + rank)
            tail = draw.integers(0, 50_000, int(draw.integers(*TAIL_BLOCKS)) * 64)
            tokens = np.concatenate([head, tail]).astype("<u4")
            keys = block_keys(NAMESPACE.digest(), tokens, 64)
            own = [tokens[at * 64 : (at + 1) * 64].tobytes() for at in range(len(keys))]
            self._known[rank] = keys, own
        return self._known[rank]


class LoadClient:
    """One worker's loop, and what it measured.

    Attributes:
        seconds: operation -> seconds of each.
        counts: requests, blocks asked, found, lost and stored, drops by reason.
    """

    def __init__(self, client: CacheClient, seed: int) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in OPERATIONS}
        self.counts: Counter[str] = Counter()
        self._client = client
        self._prompts = Prompts()
        self._draw = np.random.default_rng(seed)
        weights = 1.0 / np.arange(1, PROMPTS + 1) ** ZIPF
        self._weights = weights / weights.sum()
        self._out: Bytes = np.empty(FORMAT.payload_bytes, np.uint8)
        random = np.random.default_rng(0)
        size = (TAIL_BLOCKS[1] + HEAD_BLOCKS, FORMAT.payload_bytes)
        self._payloads = random.integers(0, 256, size, dtype=np.uint8)

    def run(self, until: float) -> None:
        """Make requests until a moment of time.monotonic."""
        while time.monotonic() < until:
            for rank in self._draw.choice(PROMPTS, 16, p=self._weights):
                self._request(int(rank))

    def _request(self, rank: int) -> None:
        keys, tokens = self._prompts.get(rank)
        client, digest = self._client, NAMESPACE.digest()
        started = time.perf_counter()
        found = client.lookup(keys)
        self.seconds["lookup"].append(time.perf_counter() - started)
        loaded = 0
        for key, own in zip(keys[: found.blocks], tokens, strict=False):
            started = time.perf_counter()
            wanted = Wanted(key, digest, own, FORMAT.payload_bytes)
            reason = client.load(wanted, self._out, time.monotonic() + 1.0)
            self.seconds["load_block"].append(time.perf_counter() - started)
            if reason is not None:
                self.counts[f"miss.{reason}"] += 1
                break
            if self._out[:16].tobytes() != key:
                raise SystemExit("a block with other bytes than were stored")
            loaded += 1
        self._count(len(keys), loaded, found.reason or "evicted")
        client.touch(keys, loaded)
        if loaded < len(keys):
            self._store(keys, tokens, loaded)

    def _count(self, blocks: int, loaded: int, reason: str) -> None:
        misses = {reason: blocks - loaded} if blocks > loaded else {}
        self._client.count(blocks, {"dram": loaded} if loaded else {}, misses)
        self.counts.update(requests=1, asked_blocks=blocks, loaded_blocks=loaded)

    def _store(self, keys: list[BlockKey], tokens: list[bytes], first: int) -> None:
        items = []
        for depth in range(first, len(keys)):
            payload = self._payloads[depth]
            payload[:16] = np.frombuffer(keys[depth], np.uint8)
            parent = keys[depth - 1] if depth else NO_KEY
            origin = b"" if depth else origin_of("", tokens[0])
            items.append(
                StoreItem(
                    keys[depth], parent, NAMESPACE.digest(), depth, tokens[depth], payload, origin
                )
            )
        started = time.perf_counter()
        result = self._client.store(items)
        self.seconds["store"].append(time.perf_counter() - started)
        self.counts.update(stored_blocks=result.stored, present_blocks=result.present)
        self.counts.update({f"dropped.{why}": count for why, count in result.dropped.items()})


def work(socket: str, seed: int, begin: float, until: float, folder: str) -> None:
    """A client process: run, and leave the figures in the folder."""
    client = open_cache(socket, NAMESPACE, f"load-{seed}", Log(sys.stderr, "warning"))
    if not client.wait_attached(30.0):
        raise SystemExit("not attached")
    load = LoadClient(client, seed)
    calls = client.rpc_calls
    time.sleep(max(0.0, begin - time.monotonic()))
    load.run(until)
    load.counts["calls"] = client.rpc_calls - calls
    client.close()
    for name, seconds in load.seconds.items():
        np.save(f"{folder}/{seed}.{name}.npy", np.array(seconds))
    Path(f"{folder}/{seed}.json").write_text(json.dumps(load.counts))


def cpu_s(pid: int) -> float:
    """CPU that a process has used, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def grpc_calls(sidecar: LocalSidecar) -> int:
    """Calls that the sidecar has answered over gRPC; a store's go over the packet socket."""
    lines = httpx.get(f"{sidecar.url}/metrics", timeout=5.0).text.splitlines()
    counted = [line for line in lines if line.startswith("kvist_grpc_calls_total")]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in counted))


def gather(folder: Path) -> tuple[Counter[str], dict[str, dict[str, float]]]:
    """Sums of the counts, and p50 and p99 of each operation in microseconds."""
    counts: Counter[str] = Counter()
    for path in folder.glob("*.json"):
        counts.update(json.loads(path.read_text()))
    latencies = {}
    for name in OPERATIONS:
        times = np.concatenate([np.load(path) for path in folder.glob(f"*.{name}.npy")])
        counts[f"ops.{name}"] = len(times)
        p50, p99 = (float(np.percentile(times, share)) * 1e6 for share in (50, 99))
        latencies[name] = {"p50": round(p50, 1), "p99": round(p99, 1)}
    return counts, latencies


def measure(sidecar: LocalSidecar, clients: int, seconds: float, folder: Path) -> dict[str, object]:
    """Run the clients; what came of it."""
    spawn = multiprocessing.get_context("spawn")
    begin = time.monotonic() + 5.0 + 0.5 * clients  # a process imports for most of a second
    until = begin + seconds
    processes = [
        spawn.Process(target=work, args=(str(sidecar.socket), seed, begin, until, str(folder)))
        for seed in range(clients)
    ]
    for process in processes:
        process.start()
    time.sleep(max(0.0, begin - time.monotonic()))
    before, called = cpu_s(sidecar.pid), grpc_calls(sidecar)
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a client failed:\n{sidecar.tail()}")
    cpu, grpc = cpu_s(sidecar.pid) - before, grpc_calls(sidecar) - called
    counts, latencies = gather(folder)
    stored_gib = counts["stored_blocks"] * FORMAT.payload_bytes / 2**30
    requests = counts["requests"]
    operations = sum(counts[f"ops.{name}"] for name in OPERATIONS)
    return {
        "bench": "service_load",
        "seconds": seconds,
        "clients": clients,
        "cores": len(os.sched_getaffinity(0)),
        "block_bytes": FORMAT.payload_bytes,
        "operations_per_s": round(operations / seconds, 1),
        "requests_per_s": round(requests / seconds, 1),
        "latency_us": latencies,
        "block_hit_ratio": round(counts["loaded_blocks"] / counts["asked_blocks"], 4),
        "loaded_gib": round(counts["loaded_blocks"] * FORMAT.payload_bytes / 2**30, 2),
        "stored_gib": round(stored_gib, 2),
        "calls_per_request": round(counts["calls"] / requests, 3),
        "grpc_calls_per_request": round(grpc / requests, 3),
        "sidecar_cpu_s": round(cpu, 2),
        "sidecar_cpu_share": round(cpu / seconds, 3),
        "sidecar_cpu_s_per_stored_gib": round(cpu / stored_gib, 3) if stored_gib else None,
        "counts": dict(sorted(counts.items())),
    }


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0, help="(%(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="processes (%(default)s)")
    parser.add_argument("--dram", default="2GiB", help="size of the DRAM tier (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvist-bench-") as name:
        folder = Path(name)
        (folder / "out").mkdir()
        settings = {"dram_bytes": arguments.dram, "flash_path": ""}
        sidecar = LocalSidecar(folder / "sidecar", settings)
        sidecar.start()
        try:
            sidecar.wait_ready()
            result = measure(sidecar, arguments.clients, arguments.seconds, folder / "out")
        finally:
            sidecar.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
