"""vLLM's time to first token with no connector, with its own ExampleConnector, with LMCache's
server and with Kvist.

One engine for each (CPU build, eager, 2 threads, its own process), asked in turn, so that a
machine whose speed drifts drifts for all of them; who is not asked uses no processor. Each prompt
is random tokens and a question of 16; one token is asked for.

    cold       an engine sees the prompt for the first time and, with a connector, stores it
    own hit    it is asked again: vLLM's own cache
    fresh hit  another engine with the same connector, which never saw the prompt; in turn with
               it the one without a connector is asked, whose own hit the ratio is taken to

Cold overhead is the median over prompts of the ratio to no connector; first tokens are compared
with its. Before anything is measured, each engine answers prompts that leave tails of the lengths
that hits leave, because vLLM's kernels are made at the first use of a length. Stores: Kvist's by
its own counters, LMCache's by its server's log. Run it on an idle machine.

Two Pythons: this one has Kvist, --vllm-python has vLLM too. LMCache is left out without
--lmcache-venv, which lmcache_setup.py makes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvist.engine.local import LocalSidecar

AIMS = {"fresh_hit_over_vllms_own_hit": 1.5, "cold_overhead_percent": 2.0}
"""What Kvist is to stay below."""

HOST = Path(__file__).with_name("vllm_host.py")
KVIST = {
    "kv_connector": "KvistConnector",
    "kv_connector_module_path": "kvist.engine.plugins.vllm",
    "kv_role": "kv_both",
}
QUESTION_TOKENS = 16
# What one still does when it has answered, such as to store, is not to cost the next one's time.
PAUSE_S = 0.5
BLOCK = 128  # of vLLM on a CPU


class Engine:
    """One vLLM in a process; see vllm_host.py.

    Args:
        python: that has vLLM. transfer: kv_transfer_config. log: takes what it says.
        flags: model and kv_bytes.
    """

    def __init__(
        self, python: Path, transfer: dict[str, Any] | None, log: Path, flags: argparse.Namespace
    ) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        command = [str(python), str(HOST), str(flags.model), "--kv-bytes", str(flags.kv_bytes)]
        with log.open("ab") as opened:
            self._process = subprocess.Popen(
                [*command, "--transfer", json.dumps(transfer) if transfer else ""],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=opened, text=True,
                env=environment, cwd=log.parent,
            )  # fmt: skip
        self._log = log
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM ended:\n{self._log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **command: object) -> dict[str, Any]:
        """One command, its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def first_tokens(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Each prompt alone."""
        return self.ask(do="generate", prompts=prompts, max_tokens=1)

    def warm_up(self, lengths: list[int]) -> None:
        """Make the kernels of cold prompts and of the tails that hits leave."""
        for number, tokens in enumerate(lengths):
            tail = (tokens + QUESTION_TOKENS - 1) % BLOCK + 1
            for _ in range(2):
                self.first_tokens([[number + 1] * (2 * BLOCK + tail)])

    def close(self) -> None:
        """End it; stores that are under way are finished."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60.0)


class LmcacheServer:
    """LMCache's server in a process of its own, keeping 2 GB in memory.

    Args:
        venv: with LMCache. log: file that takes what it says.
    """

    def __init__(self, venv: Path, log: Path) -> None:
        self.port, http = free_port(), free_port()
        self._log = log
        command = [
            str(venv / "bin" / "python"), str(venv / "bin" / "lmcache"), "server",
            "--l1-size-gb", "2", "--eviction-policy", "LRU", "--chunk-size", "256",
            "--port", str(self.port), "--http-host", "127.0.0.1", "--http-port", str(http),
            "--supported-transfer-mode", "auto",
        ]  # fmt: skip
        environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
        with log.open("ab") as opened:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened, env=environment
            )
        until = time.monotonic() + 120.0
        while "cache server is running" not in self._log.read_text():
            if self._process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"LMCache did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.2)

    def tokens_a_second(self, verb: str) -> float | None:
        """Of all stores ("Stored") or retrievals ("Retrieved"), as its log has them."""
        found = re.findall(rf"{verb} (\d+) tokens in ([\d.]+) seconds", self._log.read_text())
        seconds = sum(float(one) for _, one in found)
        return sum(int(tokens) for tokens, _ in found) / seconds if seconds else None

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def prompts_of(tokens: int, count: int) -> list[list[int]]:
    """Random tokens; the same for every connector."""
    draw = random.Random(tokens)
    length = tokens + QUESTION_TOKENS
    return [[draw.randrange(100, 49000) for _ in range(length)] for _ in range(count)]


def in_ms(seconds: list[float]) -> dict[str, float]:
    """Median and spread."""
    scaled = sorted(1e3 * one for one in seconds)
    return {"median": statistics.median(scaled), "min": scaled[0], "max": scaled[-1]}


def memcpy_gb_s() -> float:
    """One thread, 64 MiB pieces of 512 MiB; what a load can be compared with."""
    source, out = np.ones((8, 64 << 20), np.uint8), np.ones(64 << 20, np.uint8)
    times = []
    for at in range(8):
        started = time.perf_counter()
        np.copyto(out, source[at])
        times.append(time.perf_counter() - started)
    return out.nbytes / statistics.median(times) / 1e9


Found = dict[str, dict[str, list[float]]]
"""connector -> what -> seconds, one a prompt"""


class Bench:
    """The engines, asked in turn."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._sidecar = LocalSidecar(folder / "sidecar", {"dram_bytes": "2GiB"})
        self._transfers: dict[str, dict[str, Any] | None] = {
            "none": None,
            "kvist": {
                **KVIST,
                "kv_connector_extra_config": {"kvist.cache": str(self._sidecar.socket)},
            },
            "example": {
                "kv_connector": "ExampleConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"shared_storage_path": str(folder / "files")},
            },
        }
        self._pythons = dict.fromkeys(self._transfers, arguments.vllm_python)
        self._lmcache: LmcacheServer | None = None
        self._engines: dict[str, Engine] = {}
        self.counts: dict[str, Any] = {}
        self.lmcache_tokens_a_second: dict[str, float | None] = {}
        self.answers: dict[str, list[Any]] = {name: [] for name in arguments.connectors}
        self.cached: dict[tuple[str, str, str], int] = {}

    def run(self) -> dict[str, Found]:
        """Tokens of the prompt -> what was measured."""
        (self._folder / "files").mkdir()
        self._sidecar.start()
        try:
            if "lmcache" in self._arguments.connectors:
                self._start_lmcache()
            found: dict[str, Found] = {
                str(tokens): {name: {} for name in self._arguments.connectors}
                for tokens in self._arguments.tokens
            }
            for name in self._arguments.connectors:
                self._start(name)
            self._ask_all(found, "cold")
            self._ask_all(found, "own")
            if "kvist" in self._engines:
                self._count()
            for name in self._engines:
                if name != "none":
                    self._engines[name].close()
                    self._start(name)
            self._ask_all(found, "fresh")
            if "kvist" in self._engines:
                self._count()
            if self._lmcache is not None:
                self.lmcache_tokens_a_second = {
                    verb: self._lmcache.tokens_a_second(verb) for verb in ("Stored", "Retrieved")
                }
            return found
        finally:
            for engine in self._engines.values():
                engine.close()
            self._sidecar.stop()
            if self._lmcache is not None:
                self._lmcache.stop()

    def _count(self) -> None:
        """Add an engine's counters; each engine begins with none."""
        asked = self._engines["kvist"].ask(do="metrics", prefix="vllm:kvist_")
        for name, count in asked["metrics"].items():
            self.counts[name] = self.counts.get(name, 0) + count

    def _start_lmcache(self) -> None:
        venv = self._arguments.lmcache_venv
        self._lmcache = LmcacheServer(venv, self._folder / "lmcache-server.log")
        self._pythons["lmcache"] = venv / "bin" / "python"
        self._transfers["lmcache"] = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": self._lmcache.port,
            },
        }

    def _start(self, name: str) -> None:
        log = self._folder / f"{name}.log"
        python, transfer = self._pythons[name], self._transfers[name]
        self._engines[name] = Engine(python, transfer, log, self._arguments)
        self._engines[name].warm_up(self._arguments.tokens)

    def _ask_all(self, found: dict[str, Found], what: str) -> None:
        """Ask for each prompt of each length, engine by engine; the first of them changes."""
        for tokens in self._arguments.tokens:
            prompts = prompts_of(tokens, self._arguments.repeats)
            if what == "own":
                prompts = prompts[:1] * len(prompts)
            for number, prompt in enumerate(prompts):
                names = list(self._engines)
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    time.sleep(PAUSE_S)
                    reply = self._engines[name].first_tokens([prompt])
                    found[str(tokens)][name].setdefault(what, []).extend(reply["seconds"])
                    key = str(tokens), name, what
                    self.cached[key] = min(reply["cached"][0], self.cached.get(key, tokens))
                    if what != "own":
                        self.answers[name].append((what, tokens, number, reply["tokens"]))


def summary(bench: Bench, found: dict[str, Found]) -> dict[str, Any]:
    """Medians, spreads, ratios within this run."""
    report: dict[str, Any] = {"benchmark": "vllm_connectors", "memcpy_gb_s": memcpy_gb_s()}
    for tokens, measured in found.items():
        rows: dict[str, dict[str, Any]] = {
            name: {f"{what}_ms": in_ms(seconds) for what, seconds in one.items()}
            for name, one in measured.items()
        }
        for (length, name, what), cached in bench.cached.items():
            if length == tokens:  # a hit that was none, or only a part of one, is to be seen
                rows[name][f"{what}_cached_tokens_min"] = cached
        base = measured.get("none")
        for name, one in measured.items():
            if base is None or name == "none":
                continue
            pairs = zip(one["cold"], base["cold"], strict=True)
            own = statistics.median(base["fresh"])  # asked in turn with the fresh engines
            rows[name] |= {
                "cold_overhead_percent": 100 * (statistics.median(a / b for a, b in pairs) - 1),
                "fresh_hit_over_vllms_own_hit": statistics.median(one["fresh"]) / own,
            }
        report[tokens] = rows
    report["first_tokens_equal"] = len({str(sorted(one)) for one in bench.answers.values()}) == 1
    report["kvist_counts"] = bench.counts
    report["moved_gb_s"] = moved_gb_s(bench)
    report["aims_met"] = {
        aim: all(report[tokens].get("kvist", {}).get(aim, most + 1) <= most for tokens in found)
        for aim, most in AIMS.items()
    }
    return report


def moved_gb_s(bench: Bench) -> dict[str, float]:
    """How fast blocks went out and came in beside the engine, as each says itself."""
    said = {name.partition("kvist_")[2]: count for name, count in bench.counts.items()}
    rates: dict[str, float] = {}
    for what in ("save", "load"):
        if said.get(f"{what}_seconds"):
            rates[f"kvist_{what}"] = said[f"{what}_bytes"] / said[f"{what}_seconds"] / 1e9
    if said.get("save_blocks"):
        token_bytes = said["save_bytes"] / said["save_blocks"] / BLOCK
        for verb, rate in bench.lmcache_tokens_a_second.items():
            if rate is not None:
                rates[f"lmcache_{verb.lower()}"] = rate * token_bytes / 1e9
    return rates


def main() -> None:
    """Print one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--model", type=Path, default=Path("build/smollm2-hf"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 6000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--kv-bytes", type=int, default=3 << 29, help="of each engine; all prompts must fit"
    )
    parser.add_argument(
        "--connectors", nargs="+", default=["none", "kvist", "example", "lmcache"],
        choices=["none", "kvist", "example", "lmcache"],
    )  # fmt: skip
    parser.add_argument("--lmcache-venv", type=Path, help="made by lmcache_setup.py")
    arguments = parser.parse_args()
    if arguments.lmcache_venv is None:
        arguments.connectors = [one for one in arguments.connectors if one != "lmcache"]
    else:
        arguments.lmcache_venv = arguments.lmcache_venv.absolute()
    arguments.model = arguments.model.resolve()
    arguments.vllm_python = arguments.vllm_python.absolute()
    if not arguments.vllm_python.exists():
        sys.exit(f"{arguments.vllm_python} is not there: make test-vllm sets it up")
    with tempfile.TemporaryDirectory(prefix="kvist-bench-") as folder:
        bench = Bench(arguments, Path(folder))
        print(json.dumps(summary(bench, bench.run())))


if __name__ == "__main__":
    main()
