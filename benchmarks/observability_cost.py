"""What it costs to be observed: throughput of engine and service with all of it on over all off.

Two sidecars and two engines of one model, side by side. One pair is watched as in production and
more: Prometheus' scrape of both each second, the page's poll of /stats.json each second, and, where
this version has them, KV events with a subscriber and traces with a collector. Nobody looks at the
other pair, and it has no events and no traces. They take turns, in short slices whose order
alternates, so that both see the same machine; the figures are medians of the slices' ratios. What
a worker counts and measures is always on, in both.

    engine     requests over HTTP, half of each prompt's blocks shared, tokens (prompt and answer)
               per second; and processor time of its processes and its sidecar per token
    service    look-ups, loads and stores of one worker against the sidecar, per second
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import zmq

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.local import BIN, Answer, LocalEngine, LocalSidecar, ask
from kvist.proto.keys import NO_KEY, Namespace, block_keys
from kvist.proto.layout import BlockFormat
from kvist.proto.record import Bytes, Wanted

LOOK_EVERY_S = 1.0
BLOCK_TOKENS = 64
FORMAT = BlockFormat(4, 4, 128, "bfloat16", BLOCK_TOKENS)  # 512 KiB a block
NAMESPACE = Namespace("observability-cost", FORMAT, "none", "none")
SERVICE_BLOCKS = 16
NEW_BLOCKS = 2
CONCURRENCY = 4
# Setting of kvistd, flag of kvist serve; both told where this version knows both.
EVENTS = ("kv-events-config", "kv-events-config")
TRACES = ("otlp-endpoint", "otlp-traces-endpoint")


def knows(command: Sequence[str], flag: str) -> bool:
    """Whether a program has a flag."""
    said = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    return f"--{flag}" in said.stdout


class Collector:
    """Takes any traces and throws them away.

    Attributes:
        url: where. taken: messages so far.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((_Anything(self._take),))
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _take(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        del request, context
        self.taken += 1
        return b""

    def stop(self) -> None:
        """End it."""
        self._server.stop(None)


class _Anything(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, answer: Callable[[bytes, grpc.ServicerContext], bytes]) -> None:
        self._handler = grpc.unary_unary_rpc_method_handler(answer)

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        """The same answer, whatever was called."""
        del call
        return self._handler


class Subscriber:
    """Reads all KV events of some endpoints, as a router does.

    Attributes:
        taken: messages so far.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        self.taken = 0
        self._ended = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.subscribe(b"")
        for endpoint in endpoints:
            self._socket.connect(endpoint)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            if self._socket.poll(100):
                self._socket.recv_multipart()
                self.taken += 1

    def stop(self) -> None:
        """End it."""
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)


class Side:
    """A sidecar, an engine, and a worker of the service; stop ends them.

    Attributes:
        observed: what observes it; empty for the other side.
        looks_ms: how long scrapes and polls took.
    """

    def __init__(self, folder: Path, watched: bool, arguments: argparse.Namespace) -> None:
        folder.mkdir()
        self.observed: list[str] = ["metrics", "page"] if watched else []
        self.looks_ms: list[float] = []
        self._undo = contextlib.ExitStack()
        settings, flags = self._observe(folder) if watched else ({}, [])
        # The engine's blocks and the worker's share the slots.
        sizes = {"dram_bytes": "512MiB", "flash_bytes": "1GiB", "slot_bytes": arguments.slot}
        self.sidecar = LocalSidecar(folder / "sidecar", {**sizes, **settings})
        flags += ["--cache", str(self.sidecar.socket), "--threads", str(arguments.threads)]
        flags += ["--served-model-name", "m", "--kv-cache-memory-bytes", arguments.pool]
        self.engine = LocalEngine(arguments.model, folder / "engine.log", flags)
        self._draw = random.Random(1)
        self._prompts = 0

    def _observe(self, folder: Path) -> tuple[dict[str, str], list[str]]:
        """Events and traces, as far as they are there: settings of kvistd, flags of the engine."""
        settings: dict[str, str] = {}
        flags: list[str] = []
        kvistd, serve = [str(BIN / "kvistd")], [str(BIN / "kvist"), "serve"]
        if knows(kvistd, EVENTS[0]) and knows(serve, EVENTS[1]):
            ends = [f"ipc://{folder}/{name}" for name in ("sidecar-events", "engine-events")]
            told = [json.dumps({"enable_kv_cache_events": True, "endpoint": end}) for end in ends]
            settings[EVENTS[0].replace("-", "_")] = told[0]
            flags += [f"--{EVENTS[1]}", told[1]]
            self._undo.callback(Subscriber(ends).stop)
            self.observed.append("kv_events")
        if knows(kvistd, TRACES[0]) and knows(serve, TRACES[1]):
            collector = Collector()
            self._undo.callback(collector.stop)
            settings[TRACES[0].replace("-", "_")] = collector.url
            flags += [f"--{TRACES[1]}", collector.url]
            self.observed.append("traces")
        return settings, flags

    def start(self) -> None:
        """Start and let everything be measured once."""
        for process in (self.sidecar, self.engine):
            process.start()
            self._undo.callback(process.stop)
            process.wait_ready()
        log = Log(sys.stderr, "warning")
        self._client = open_cache(str(self.sidecar.socket), NAMESPACE, "observed", log)
        self._undo.callback(self._client.close)
        self._worker = Worker(self._client)
        # Once: to make a client with certificates takes 150 ms, which no slice should pay for.
        self._looker = httpx.Client(timeout=30.0, verify=False)
        self._undo.callback(self._looker.close)

    def stop(self) -> None:
        """End everything."""
        self._undo.close()

    def serve(self, requests: int, tokens: int) -> dict[str, float]:
        """Ask the engine; tokens per second, and processor time per token."""
        prompts = [self._prompt(tokens) for _ in range(requests)]
        before, started = self.cpu_s(), time.perf_counter()
        with self._looked_at(), ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(self._ask, prompts))
        seconds, cpu_s = time.perf_counter() - started, self.cpu_s() - before
        done = sum(answer.prompt_tokens + answer.completion_tokens for answer in answers)
        return {"per_s": done / seconds, "cpu_us": 1e6 * cpu_s / done}

    def work(self, seconds: float) -> dict[str, float]:
        """Have the worker go on for a while; operations per second."""
        before = self.cpu_s()
        with self._looked_at():
            operations, took_s = self._worker.run(seconds)
        cpu_s = self.cpu_s() - before
        return {"per_s": operations / took_s, "cpu_us": 1e6 * cpu_s / operations}

    def cpu_s(self) -> float:
        """Processor time of the sidecar and of the engine's processes, seconds."""
        groups = {self.sidecar.pid, self.engine.pid}
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = stat.read_text().rpartition(")")[2].split()
                ticks += (int(fields[11]) + int(fields[12])) * (int(fields[2]) in groups)
        return ticks / os.sysconf("SC_CLK_TCK")

    def _prompt(self, tokens: int) -> list[int]:
        """Half of it is one of eight beginnings, the other half its own."""
        self._prompts += 1
        head = random.Random(self._prompts % 8)
        half = tokens // 2
        draw = [*(head.randrange(5, 150) for _ in range(half))]
        return draw + [self._draw.randrange(5, 150) for _ in range(tokens - half)]

    def _ask(self, prompt: list[int]) -> Answer:
        body = {"model": "m", "prompt": prompt, "max_tokens": 16, "temperature": 0}
        return ask(self.engine.url, {**body, "ignore_eos": True})

    @contextlib.contextmanager
    def _looked_at(self) -> Iterator[None]:
        """Scraped and polled meanwhile, if that is this side."""
        ended = threading.Event()
        looker = threading.Thread(target=self._look, args=(ended,))
        if self.observed:
            looker.start()
        yield
        ended.set()
        if self.observed:
            looker.join()

    def _look(self, ended: threading.Event) -> None:
        pages = ("metrics", "stats.json")
        urls = [f"{self.sidecar.url}/{page}" for page in pages] + [f"{self.engine.url}/metrics"]
        while True:
            for url in urls:
                started = time.perf_counter()
                self._looker.get(url).raise_for_status()
                self.looks_ms.append(1e3 * (time.perf_counter() - started))
            if ended.wait(LOOK_EVERY_S):
                return


class Worker:
    """Looks up, loads and stores; prompts go on from one another, as conversations do.

    Args:
        client: attached soon.
    """

    def __init__(self, client: CacheClient) -> None:
        self._client = client
        if not client.wait_attached(30.0):
            raise SystemExit("the service's worker is not attached")
        self._draw = np.random.default_rng(0)
        shape = (SERVICE_BLOCKS, FORMAT.payload_bytes)
        self._payload = self._draw.integers(0, 256, shape, dtype=np.uint8)
        self._out: Bytes = np.empty(FORMAT.payload_bytes, np.uint8)

    def run(self, seconds: float) -> tuple[int, float]:
        """Go on for so long; operations, and how long it was."""
        started, operations = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            tokens = self._draw.integers(0, 50_000, SERVICE_BLOCKS * BLOCK_TOKENS).astype("<u4")
            for blocks in range(NEW_BLOCKS, SERVICE_BLOCKS + 1, NEW_BLOCKS):
                operations += self._request(tokens[: blocks * BLOCK_TOKENS])
        return operations, time.perf_counter() - started

    def _request(self, tokens: np.ndarray[Any, np.dtype[np.uint32]]) -> int:
        client, digest = self._client, NAMESPACE.digest()
        keys = block_keys(digest, tokens, BLOCK_TOKENS)
        own = [part.tobytes() for part in np.split(tokens, len(keys))]
        found = client.lookup(keys).blocks
        for key, part in zip(keys[:found], own, strict=False):
            wanted = Wanted(key, digest, part, FORMAT.payload_bytes)
            # Sunk since and no longer in DRAM: nobody waits for it here, an engine would have.
            reason = client.load(wanted, self._out, time.monotonic())
            if reason not in (None, "flash_late"):
                raise SystemExit(f"a block that was stored a moment ago did not come: {reason}")
        hits, misses = found * BLOCK_TOKENS, (len(keys) - found) * BLOCK_TOKENS
        client.count(hits + misses, {"dram": hits}, {"never_stored": misses})
        client.touch(keys, found)
        items = [
            StoreItem(
                keys[at], keys[at - 1] if at else NO_KEY, digest, at, own[at], self._payload[at]
            )
            for at in range(found, len(keys))
        ]
        client.store(items)
        return 2 + len(keys)


def ratios(on: Sequence[float], off: Sequence[float]) -> dict[str, Any]:
    """Medians of both, the median of the slices' ratios, and their quartiles."""
    each = sorted(one / other for one, other in zip(on, off, strict=True))
    quarter = len(each) // 4
    return {
        "on": round(statistics.median(on), 2),
        "off": round(statistics.median(off), 2),
        "ratio": round(statistics.median(each), 4),
        "quartiles": [round(each[quarter], 4), round(each[-1 - quarter], 4)],
    }


def in_turns(
    slices: int, sides: Sequence[Side], measure: Callable[[Side], dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """One slice after the other, whose first side alternates; by figure."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(slices):
        for side in sides if number % 2 else sides[::-1]:
            found[bool(side.observed)].append(measure(side))
    on, off = found[True], found[False]
    return {name: ratios([x[name] for x in on], [x[name] for x in off]) for name in on[0]}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start both sides and measure; what is printed."""
    sides = [Side(folder / "on", True, arguments), Side(folder / "off", False, arguments)]
    try:
        for side in sides:
            side.start()
        print("measuring", file=sys.stderr)
        for side in sides:  # what is compiled, faulted in and measured once
            side.serve(CONCURRENCY, arguments.tokens)
            side.work(arguments.seconds)
        engine = in_turns(
            arguments.slices, sides, lambda side: side.serve(arguments.requests, arguments.tokens)
        )
        service = in_turns(4 * arguments.slices, sides, lambda side: side.work(arguments.seconds))
    finally:
        for side in sides:
            side.stop()
    return {
        "bench": "observability_cost",
        "observed": sides[0].observed,
        "cores": len(os.sched_getaffinity(0)),
        "engine_throughput": engine["per_s"],
        "engine_cpu_us_per_token": engine["cpu_us"],
        "service_throughput": service["per_s"],
        "service_cpu_us_per_operation": service["cpu_us"],
        "look_ms": round(statistics.median(sides[0].looks_ms), 2),
        "slices": arguments.slices,
        "requests": arguments.requests,
        "tokens": arguments.tokens,
    }


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo", help="as kvist serve takes it (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each engine (%(default)s)")
    parser.add_argument("--pool", default="256MiB", help="each engine's KV pool (%(default)s)")
    parser.add_argument("--slot", default="1536KiB", help="that a block fits (%(default)s)")
    parser.add_argument("--slices", type=int, default=8, help="of each side (%(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="in a slice (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of the service (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="two short slices, to see that it runs")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.slices, arguments.requests, arguments.tokens = 2, 4, 160
        arguments.seconds = 0.1
    with tempfile.TemporaryDirectory(prefix="kvist-bench-") as folder:
        print(json.dumps(run(arguments, Path(folder))))


if __name__ == "__main__":
    main()
