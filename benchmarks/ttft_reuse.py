"""Time to first token of the same prompt when its prefix is nowhere, in HBM, in DRAM, on flash.

One sidecar and two engines, idle but for the one request that is timed. Engine A computes a
prompt (miss) and answers it again (HBM hit); engine B, which never saw it, answers it from the
sidecar's DRAM. For flash the sidecar is restarted, so that DRAM is empty, and B answers prompts
that only A has seen. Every prompt is a text of its own of --tokens tokens and a question of 16.
TTFT is taken by the HTTP client, tokenisation excluded (prompts are sent as token ids). All
answers to a prompt are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from kvist.engine.demo_text import SYSTEM_PROMPT
from kvist.engine.local import Answer, LocalEngine, LocalSidecar, ask

QUESTION_TOKENS = 16
OUTPUT_TOKENS = 8


def wait_until(what: str, ready: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll until ready; a benchmark that waits for nothing says for what."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"gave up waiting: {what}")
        time.sleep(0.05)


def used_slots(sidecar: LocalSidecar, tier: str) -> int:
    """Blocks that a tier of the sidecar holds."""
    rows = sidecar.stats()["tiers"]
    return sum(int(row["used_slots"]) for row in rows if row["tier"] == tier)


def attached(engine: LocalEngine) -> bool:
    """Whether the engine says that it reaches its cache."""
    text = httpx.get(f"{engine.url}/metrics", timeout=5.0).text
    lines = [line for line in text.splitlines() if line.startswith("kvist_engine_cache_attached")]
    return any(float(line.rsplit(" ", 1)[1]) == 1.0 for line in lines)


class Bench:
    """The processes and the prompts."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.tokens: int = arguments.tokens
        self.sidecar = LocalSidecar(folder / "sidecar", {"dram_bytes": "2GiB"})
        flags = ["--cache", str(self.sidecar.socket), "--kv-cache-memory-bytes", "1GiB"]
        flags += ["--threads", str(arguments.threads), "--dtype", arguments.dtype]
        self.engines = [
            LocalEngine(arguments.model, folder / f"engine-{name}.log", flags) for name in "ab"
        ]

    def start(self) -> None:
        """Start everything and let both engines compute once."""
        self.sidecar.start()
        self.sidecar.wait_ready()
        for engine in self.engines:
            engine.start()
        for engine in self.engines:
            engine.wait_ready()
            wait_until("engine attached", lambda engine=engine: attached(engine))  # type: ignore[misc]
            self.ask(engine, self.prompt(f"warm-up of {engine.url}"))

    def stop(self) -> None:
        """End what runs."""
        for process in (*self.engines, self.sidecar):
            if process.running:
                process.stop()

    def prompt(self, name: str) -> list[int]:
        """Token ids of a text that shares no block with any other name's."""
        text = f"This copy belongs to {name}.\n" + SYSTEM_PROMPT
        text *= -(-self.tokens // 1400)
        question = "\nQuestion: what does the workshop say about this? Answer in one sentence now:"
        return self.encode(text)[: self.tokens] + self.encode(question * 2)[:QUESTION_TOKENS]

    def encode(self, text: str) -> list[int]:
        """Tokenise with the engine's own tokenizer."""
        reply = httpx.post(f"{self.engines[0].url}/tokenize", json={"prompt": text}, timeout=30.0)
        reply.raise_for_status()
        ids: list[int] = reply.json()["tokens"]
        return ids

    def ask(self, engine: LocalEngine, prompt: list[int]) -> Answer:
        """One timed request."""
        body = {"model": self.model(engine), "prompt": prompt, "temperature": 0}
        return ask(engine.url, {**body, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True})

    def compute(self, prompt: list[int]) -> Answer:
        """A miss on engine A; returns when its blocks are stored and written, all idle again."""
        blocks = {tier: used_slots(self.sidecar, tier) for tier in ("dram", "flash")}
        answer = self.ask(self.engines[0], prompt)
        for tier, before in blocks.items():
            want = before + self.tokens // 64
            wait_until(
                f"blocks in {tier}",
                lambda tier=tier, want=want: used_slots(self.sidecar, tier) >= want,  # type: ignore[misc]
            )
        return answer

    @staticmethod
    def model(engine: LocalEngine) -> str:
        """The name under which the engine serves."""
        name: str = httpx.get(f"{engine.url}/v1/models", timeout=5.0).json()["data"][0]["id"]
        return name


def measure(bench: Bench, repeats: int) -> dict[str, list[Answer]]:
    """Ask every prompt in every state; answers of one prompt stand at one position."""
    a, b = bench.engines
    found: dict[str, list[Answer]] = {"miss": [], "hbm": [], "dram": [], "flash": []}
    for round_number in range(repeats):
        prompt = bench.prompt(f"customer {round_number}")
        found["miss"].append(bench.compute(prompt))
        found["hbm"].append(bench.ask(a, prompt))
        found["dram"].append(bench.ask(b, prompt))
    prompts = [bench.prompt(f"supplier {number}") for number in range(repeats)]
    found["miss"] += [bench.compute(prompt) for prompt in prompts]
    bench.sidecar.stop()
    wait_until("engine noticed", lambda: not attached(b))
    bench.sidecar.start()
    bench.sidecar.wait_ready()
    wait_until("engine attached again", lambda: attached(b))
    found["flash"] = [bench.ask(b, prompt) for prompt in prompts]
    return found


def report(found: dict[str, list[Answer]], repeats: int) -> dict[str, object]:
    """Medians, ratios, spread, and whether all answers to a prompt were the same."""
    result: dict[str, object] = {"bench": "ttft_reuse"}
    result["prompt_tokens"] = found["miss"][0].prompt_tokens
    median = {
        state: statistics.median(answer.ttft_s for answer in answers) * 1e3
        for state, answers in found.items()
    }
    for state, value in median.items():
        result[f"{state}_ms"] = round(value, 1)
    for state in ("hbm", "dram", "flash"):
        result[f"miss_over_{state}"] = round(median["miss"] / median[state], 1)
    misses = [answer.text for answer in found["miss"]]
    result["outputs_equal"] = all(
        [answer.text for answer in found[state]] == expected
        for state, expected in (
            ("hbm", misses[:repeats]),
            ("dram", misses[:repeats]),
            ("flash", misses[repeats:]),
        )
    )
    result["cached_tokens"] = {
        state: sorted({answer.cached.get(state, 0) for answer in answers})
        for state, answers in found.items()
        if state != "miss"
    }
    result["spread_ms"] = {
        state: [round(f(answer.ttft_s for answer in answers) * 1e3, 1) for f in (min, max)]
        for state, answers in found.items()
    }
    result["repeats"] = repeats
    return result


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2048, help="cached prefix (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="prompts per state (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each engine (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the engines (%(default)s)")
    parser.add_argument("--model", default="demo", help="as kvist serve takes it (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvist-bench-") as folder:
        bench = Bench(Path(folder), arguments)
        try:
            bench.start()
            print("measuring; one request at a time", file=sys.stderr)
            found = measure(bench, arguments.repeats)
        finally:
            bench.stop()
    print(json.dumps({**report(found, arguments.repeats), "threads": arguments.threads}))


if __name__ == "__main__":
    main()
