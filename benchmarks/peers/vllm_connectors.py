"""vLLM's time to first token with no connector, with its own ExampleConnector and with Kvist.

One engine for each (CPU build, eager, 2 threads, its own process), asked in turn, so that a
machine whose speed drifts drifts for all of them; who is not asked uses no processor. Each prompt
is random tokens and a question of 16; one token is asked for.

    cold       an engine sees the prompt for the first time and, with a connector, stores it
    own hit    it is asked again: vLLM's own cache
    fresh hit  another engine with the same connector, which never saw the prompt; in turn with
               it the one without a connector is asked, whose own hit the ratio is taken to

Cold overhead is the median over prompts of the ratio to no connector; first tokens are compared
with its. Run it on an idle machine. Two Pythons: this one has Kvist, --vllm-python has vLLM too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvist.engine.local import LocalSidecar

HOST = Path(__file__).with_name("vllm_host.py")
KVIST = {
    "kv_connector": "KvistConnector",
    "kv_connector_module_path": "kvist.engine.plugins.vllm",
    "kv_role": "kv_both",
}
QUESTION_TOKENS = 16


class Engine:
    """One vLLM in a process; see vllm_host.py."""

    def __init__(self, arguments: argparse.Namespace, transfer: dict[str, Any] | None, log: Path):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        command = [str(arguments.vllm_python), str(HOST), str(arguments.model)]
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

    def close(self) -> None:
        """End it; stores that are under way are finished."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60.0)


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
        self._sidecar = LocalSidecar(folder / "sidecar", {"dram_bytes": "3GiB"})
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
        self._engines: dict[str, Engine] = {}
        self.counts: dict[str, Any] = {}
        self.answers: dict[str, list[Any]] = {name: [] for name in arguments.connectors}

    def run(self) -> dict[str, Found]:
        """Tokens of the prompt -> what was measured."""
        (self._folder / "files").mkdir()
        self._sidecar.start()
        try:
            found: dict[str, Found] = {
                str(tokens): {name: {} for name in self._arguments.connectors}
                for tokens in self._arguments.tokens
            }
            for name in self._arguments.connectors:
                self._start(name)
            self._ask_all(found, "cold")
            self._ask_all(found, "own")
            if "kvist" in self._engines:
                asked = self._engines["kvist"].ask(do="metrics", prefix="vllm:kvist_")
                self.counts = asked["metrics"]
            for name in self._engines:
                if name != "none":
                    self._engines[name].close()
                    self._start(name)
            self._ask_all(found, "fresh")
            return found
        finally:
            for engine in self._engines.values():
                engine.close()
            self._sidecar.stop()

    def _start(self, name: str) -> None:
        log = self._folder / f"{name}.log"
        self._engines[name] = Engine(self._arguments, self._transfers[name], log)
        self._engines[name].first_tokens([[1] * 300])  # what vLLM does once

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
                    reply = self._engines[name].first_tokens([prompt])
                    found[str(tokens)][name].setdefault(what, []).extend(reply["seconds"])
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
    return report


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
        "--connectors", nargs="+", default=["none", "kvist", "example"],
        choices=["none", "kvist", "example"],
    )  # fmt: skip
    arguments = parser.parse_args()
    arguments.model = arguments.model.resolve()
    arguments.vllm_python = arguments.vllm_python.absolute()
    if not arguments.vllm_python.exists():
        sys.exit(f"{arguments.vllm_python} is not there: make test-vllm sets it up")
    with tempfile.TemporaryDirectory(prefix="kvist-bench-") as folder:
        bench = Bench(arguments, Path(folder))
        print(json.dumps(summary(bench, bench.run())))


if __name__ == "__main__":
    main()
