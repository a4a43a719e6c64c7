"""What is left of a load when it runs beside the computation, and what a cache costs who misses it.

For each length of suffix and each tier, in one process that holds a whole engine core:

    load      the cached blocks alone, copied and verified as the engine does it, nothing computed
    compute   time to first token with the prefix in the engine's own pool, so nothing is loaded
    both      time to first token with the prefix in the tier, and not in the pool
    before    the same with the blocks loaded whole, before the computation
    stall     (both - max(load, compute)) / max(load, compute)

They are taken in turns, on the same prompts, and medians are compared. For flash the sidecar
is restarted before each load, so that DRAM is empty. `cold` is a prompt that nobody has seen, with
the cache on and off in turns, up to its 8th token, so that storing it is in it. All answers to a
prompt are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvist.cachesvc.log import Log
from kvist.engine.config import EngineConfig
from kvist.engine.local import LocalSidecar
from kvist.engine.process import core_environment
from kvist.engine.request import FromCore, NewRequest, Outputs, Ready, SamplingParams, ToCore
from kvist.engine.sequence import Limits, Sequence

if TYPE_CHECKING:
    from kvist.engine.opening import Parts

OUTPUT_TOKENS = 8
SEED = 20261126


class Wire:
    """The core's link, inside the process."""

    def __init__(self) -> None:
        self.to_core: queue.Queue[ToCore] = queue.Queue()
        self.from_core: queue.Queue[tuple[float, FromCore]] = queue.Queue()

    def receive(self, timeout_s: float | None = 0.0) -> list[ToCore]:
        """See core.Link."""
        taken: list[ToCore] = []
        with contextlib.suppress(queue.Empty):
            taken.append(self.to_core.get(bool(timeout_s), timeout_s))
        return taken

    def send(self, message: FromCore) -> None:
        """See core.Link."""
        self.from_core.put((time.perf_counter(), message))


class Engine:
    """A core on a thread, one request at a time."""

    def __init__(self, config: EngineConfig) -> None:
        # Here: OpenMP reads its environment when torch is imported.
        import torch

        from kvist.engine.core import Core
        from kvist.engine.opening import open_parts

        torch.set_num_threads(config.threads)
        log = Log(sys.stderr, "error")
        self.parts: Parts = open_parts(config, log, time.monotonic)
        self._wire = Wire()
        self._stop = threading.Event()

        def run() -> None:
            torch.set_num_threads(config.threads)
            with torch.inference_mode():
                Core(self._wire, self.parts, config, log, time.monotonic).run(self._stop)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert isinstance(self._wire.from_core.get()[1], Ready)
        self._asked = 0

    def ask(self, prompt: list[int], count: int = OUTPUT_TOKENS) -> tuple[list[int], float, float]:
        """The answer, and milliseconds to its first and last token."""
        self._asked += 1
        name = str(self._asked)
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        self._wire.to_core.put(NewRequest(name, prompt, params))
        tokens: list[int] = []
        first = 0.0
        while True:
            at, message = self._wire.from_core.get()
            for delta in message.deltas if isinstance(message, Outputs) else ():
                if delta.id != name:
                    continue
                first = first or at
                tokens += delta.tokens
                if delta.finish_reason is not None:
                    return tokens, 1e3 * (first - began), 1e3 * (at - began)

    def settle(self) -> None:
        """Wait for the stores."""
        connector = self.parts.connector
        while connector.copying:
            time.sleep(0.005)

    def empty_pool(self) -> None:
        """Evict every page that nobody holds; the core is idle."""
        self.settle()
        pages = self.parts.pages
        pages.release(pages.allocate(pages.available))

    def load_alone(self, prompt: list[int], blocks: int) -> float:
        """Milliseconds to bring a prefix into the pool, with nothing computed."""
        from kvist.engine.copying import Copiers
        from kvist.engine.loading import LoadJob
        from kvist.engine.sequence import State

        connector, pages = self.parts.connector, self.parts.pages
        cache, sequence = connector._cache, self._sequence(prompt)
        assert cache is not None
        sequence.state, held = State.LOADING, pages.allocate(blocks)
        copiers = Copiers(cache, connector._copies, Log(sys.stderr, "error"), time.monotonic)
        began = time.perf_counter()
        cache.prefetch(sequence.keys(), blocks)
        copiers.load(LoadJob(sequence, 0, held, time.monotonic()))
        copiers.wait(60.0)
        taken = 1e3 * (time.perf_counter() - began)
        loaded = copiers.take()
        assert loaded is not None
        assert getattr(loaded, "blocks", 0) == blocks, "the load did not bring all blocks"
        copiers.close()
        pages.release(held)
        return taken

    def _sequence(self, prompt: list[int]) -> Sequence:
        request = NewRequest("alone", prompt, SamplingParams())
        size = self.parts.limits.block_tokens
        return Sequence(request, 0, Limits(1 << 20, size), self.parts.digests.of(""), 0.0)

    def tier_of(self, prompt: list[int], blocks: int) -> set[str]:
        """Where a prefix's blocks are."""
        cache = self.parts.connector._cache
        assert cache is not None
        return set(cache.tiers(self._sequence(prompt).keys()[:blocks]))

    def close(self) -> None:
        """End the loop and let the cache go."""
        self._stop.set()
        self._thread.join()
        self.parts.connector.close()


def wait_until(what: str, ready: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll until ready; a benchmark that waits for nothing says for what."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"gave up waiting: {what}")
        time.sleep(0.01)


class Bench:
    """Sidecar, engine and prompts."""

    def __init__(self, folder: Path, flags: argparse.Namespace) -> None:
        self.flags = flags
        room = f"{flags.dram_mib}MiB"
        self.sidecar = LocalSidecar(
            folder / "sidecar",
            {"dram_bytes": room, "flash_bytes": room, "flash_admission": "always"},
        )
        self.sidecar.start()
        self.sidecar.wait_ready()
        self.config = EngineConfig(
            model=flags.model,
            device="cpu",
            threads=flags.threads,
            dtype=flags.dtype,
            cache=f"unix:{self.sidecar.socket}",
            kv_cache_bytes=flags.pool_mib << 20,
            max_num_batched_tokens=flags.budget,
        )
        os.environ.update(core_environment(self.config, os.environ))
        self.engine = Engine(self.config)
        self.blocks: int = flags.cached // self.config.block_tokens
        self._rng = np.random.default_rng(SEED)
        self.prefixes = [self.draw(flags.cached) for _ in range(flags.prompts)]
        self.answers: dict[tuple[int, ...], list[int]] = {}

    def draw(self, count: int) -> list[int]:
        """Token ids that nobody has seen."""
        last = self.engine.parts.runner.vocab - 100
        return [int(token) for token in self._rng.integers(100, last, count)]

    def ask(self, prompt: list[int]) -> float:
        """TTFT in milliseconds; the answer must be what it was before."""
        answer, first, _ = self.engine.ask(prompt)
        known = self.answers.setdefault(tuple(prompt), answer)
        if known != answer:
            raise SystemExit("wrong: the same prompt has got two answers")
        return first

    def fill(self) -> None:
        """Compute the prefixes once, until they are in DRAM and on flash."""
        for prefix in self.prefixes:
            self.ask([*prefix, *self.draw(8)])
            self.engine.settle()

        def on_flash() -> bool:
            tiers = {row["tier"]: row for row in self.sidecar.stats()["tiers"]}
            wanted = self.blocks * len(self.prefixes)
            return int(tiers["flash"]["used_slots"]) >= int(wanted)

        wait_until("the prefixes to be on flash", on_flash)

    def restart(self) -> None:
        """Empty DRAM: end the sidecar and begin a new one on its flash."""
        cache = self.engine.parts.connector._cache
        assert cache is not None
        before = cache.reattaches
        self.sidecar.stop()
        self.sidecar.start()
        self.sidecar.wait_ready()
        wait_until(
            "the engine to attach", lambda: cache.reattaches > before and cache.state == "attached"
        )
        wait_until("the arena to be populated", lambda: "arena populated" in self.log_tail())

    def log_tail(self) -> str:
        """What the sidecar said since its last start."""
        text = (self.sidecar.socket.parent / "kvistd.log").read_text()
        return text[text.rindex(" ready socket=") :]

    def overlap(self, tier: str, suffix: int) -> dict[str, Any]:
        """Measure one tier with one length of suffix."""
        names = ("load_ms", "compute_ms", "both_ms", "before_ms")
        times: dict[str, list[float]] = {name: [] for name in names}
        weigher = self.engine.parts.connector.weigher
        assert weigher is not None
        before = self.engine.parts.connector.load_stats()
        for turn in range(self.flags.repeats):
            prefix = self.prefixes[turn % len(self.prefixes)]
            prompt = [*prefix, *self.draw(suffix)]
            self._away(tier, prompt)
            times["load_ms"].append(self.engine.load_alone(prompt, self.blocks))
            ways = [("both_ms", True), ("before_ms", False)]
            for name, weigher.by_layers in ways if turn % 2 else reversed(ways):
                self._away(tier, prompt)
                times[name].append(self.ask([*prefix, *self.draw(suffix)]))
            weigher.by_layers = True
            # Now the prefix is in the pool.
            times["compute_ms"].append(self.ask([*prefix, *self.draw(suffix)]))
            if not turn:  # the answers with the prefix in the pool and in the tier agree
                self.ask(prompt)
                self._away(tier, prompt)
                self.ask(prompt)
        after = self.engine.parts.connector.load_stats()
        middle = {name: statistics.median(values) for name, values in times.items()}
        least = max(middle["load_ms"], middle["compute_ms"])
        return {
            "tier": tier,
            "suffix_tokens": suffix,
            **{name: round(value, 2) for name, value in middle.items()},
            "spread": {n: [round(min(v), 1), round(max(v), 1)] for n, v in times.items()},
            "stall_percent": round(100 * (middle["both_ms"] - least) / least, 1),
            "serial_percent": round(
                100 * (middle["load_ms"] + middle["compute_ms"] - least) / least, 1
            ),
            "by_layers": after.ways["layers"] - before.ways["layers"],
            "while_rising": after.ways["rising"] - before.ways["rising"],
            "gate_wait_ms": round(1e3 * (after.gate_wait_s - before.gate_wait_s), 2),
        }

    def _away(self, tier: str, prompt: list[int]) -> None:
        """See that a prefix is in a tier and nowhere above it."""
        self.engine.empty_pool()
        if tier == "flash":
            self.restart()
        found = self.engine.tier_of(prompt, self.blocks)
        if found != {tier}:
            raise SystemExit(f"the prefix is in {found or 'no tier'}, wanted {tier}")

    def cold(self) -> dict[str, Any]:
        """A cold prompt with the cache on and off, in turns."""
        off = Engine(dataclasses.replace(self.config, cache="off"))
        engines = {"on": self.engine, "off": off}
        first: dict[str, list[float]] = {"on": [], "off": []}
        whole: dict[str, list[float]] = {"on": [], "off": []}
        for turn in range(2 + 2 * self.flags.cold_repeats):
            order = ("on", "off") if turn % 2 else ("off", "on")
            prompt = self.draw(self.flags.cold_tokens)
            for name in order:
                _, to_first, to_last = engines[name].ask(prompt)
                engines[name].settle()
                if turn >= 2:
                    first[name].append(to_first)
                    whole[name].append(to_last)
        off.close()

        def percent(times: dict[str, list[float]]) -> float:
            ratios = [on / of for on, of in zip(times["on"], times["off"], strict=True)]
            return round(100 * (statistics.median(ratios) - 1), 2)

        return {
            "tokens": self.flags.cold_tokens,
            "ttft_on_ms": round(statistics.median(first["on"]), 2),
            "ttft_off_ms": round(statistics.median(first["off"]), 2),
            "ttft_percent": percent(first),
            "answer_percent": percent(whole),
        }

    def close(self) -> None:
        """End everything."""
        self.engine.close()
        self.sidecar.stop()


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="as for kvist serve (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the computation (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="compute threads (%(default)s)")
    parser.add_argument("--cached", type=int, default=2048, help="tokens of prefix (%(default)s)")
    parser.add_argument(
        "--suffixes", default="16,256,512", help="tokens computed, with commas (%(default)s)"
    )
    parser.add_argument("--tiers", default="dram,flash", help="which (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of each (%(default)s)")
    parser.add_argument("--prompts", type=int, default=2, help="different prefixes (%(default)s)")
    parser.add_argument("--budget", type=int, default=512, help="tokens of a step (%(default)s)")
    parser.add_argument("--pool-mib", type=int, default=256, help="of the KV pool (%(default)s)")
    parser.add_argument("--dram-mib", type=int, default=1024, help="of each tier (%(default)s)")
    parser.add_argument("--cold-tokens", type=int, default=512, help="cold prompt (%(default)s)")
    parser.add_argument("--cold-repeats", type=int, default=8, help="pairs of turns (%(default)s)")
    return parser.parse_args()


def main() -> int:
    """Measure and print; the last line is one JSON object."""
    flags = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the sidecar ends with us
    with tempfile.TemporaryDirectory(prefix="kvist-overlap-") as folder:
        bench = Bench(Path(folder), flags)
        try:
            bench.fill()
            rows = []
            for tier in flags.tiers.split(","):
                for suffix in flags.suffixes.split(","):
                    rows.append(bench.overlap(tier, int(suffix)))
                    print(json.dumps(rows[-1]), flush=True)
            cold = bench.cold() if flags.cold_repeats else {}
            rates = bench.engine.parts.connector.load_stats().rates
        finally:
            bench.close()
    # The line's own figures are those of the hardest case: the shortest suffix.
    keys = ("load_ms", "compute_ms", "both_ms", "stall_percent")
    hardest: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -int(row["suffix_tokens"])):
        hardest[row["tier"]] = {key: row[key] for key in keys}
    document = {
        "bench": "overlap",
        **hardest[rows[0]["tier"]],
        "tiers": hardest,
        "cached_tokens": flags.cached,
        "threads": flags.threads,
        "rows": rows,
        "cold": cold,
        "rates": rates,
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
