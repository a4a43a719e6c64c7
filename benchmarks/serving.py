"""A recorded trace replayed through `kvist bench serve`: no reuse, HBM alone, and every tier.

One `kvist serve` after the other answers the same requests of a trace of hash ids (see
engine/bench/timed_trace), shortened so that a small machine can compute them: with reuse turned
off, with pages of the HBM pool only, and with the embedded cache of DRAM beside it. The pool is
small, as HBM is beside what a service sees in an hour: of the first 48 requests of a trace of
coding agents, with the lengths given here, it can keep 60 % and an endless cache 76 %. Requests
go out in the trace's order, --concurrency at a time. computed_tokens are prompt tokens that went
through the model.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvist.engine.local import BIN, LocalEngine

MODES: dict[str, tuple[str, ...]] = {
    "no_reuse": ("--cache", "off", "--no-enable-prefix-caching"),
    "hbm": ("--cache", "off"),
    "tiers": ("--cache", "embedded", "--cache-flash-bytes", "0", "--cache-dram-bytes", "2GiB"),
}
KEPT = ("completed", "failed", "duration", "total_input_tokens", "total_output_tokens")


def replay(arguments: argparse.Namespace, flags: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Start a server, replay, stop it; the figures of `kvist bench serve`.

    Raises:
        SystemExit: the replay failed.
    """
    common = ["--threads", str(arguments.threads), "--dtype", arguments.dtype]
    common += ["--kv-cache-memory-bytes", arguments.pool]
    server = LocalEngine(arguments.model, folder / "engine.log", [*common, *flags])
    server.start()
    try:
        server.wait_ready()
        done = subprocess.run(
            [
                *(str(BIN / "kvist"), "bench", "serve", "--base-url", server.url, "--json"),
                *("--dataset-name", "timed_trace", "--dataset-path", str(arguments.trace)),
                *("--no-self-timed", "--max-concurrency", str(arguments.concurrency)),
                *("--num-prompts", str(arguments.requests), "--num-warmups", "1"),
                *("--timed-trace-input-scale", str(arguments.input_scale)),
                *("--timed-trace-output-scale", str(arguments.output_scale)),
                *("--timed-trace-max-len", str(arguments.max_len)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        server.stop()
    if done.returncode:
        sys.exit(f"the replay failed; the server said:\n{server.tail()}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("trace", type=Path, help="JSON lines, perhaps .xz or .gz")
    parser.add_argument("--requests", type=int, default=48, help="of the trace (%(default)s)")
    parser.add_argument(
        "--input-scale", type=float, default=1 / 128, help="of prompts (%(default)s)"
    )
    parser.add_argument("--output-scale", type=float, default=0.02, help="(%(default)s)")
    parser.add_argument("--max-len", type=int, default=2048, help="tokens (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--pool", default="48MiB", help="of KV pages (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the engine (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the engine (%(default)s)")
    parser.add_argument("--model", default="demo", help="as kvist serve takes it (%(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends with us
    result: dict[str, Any] = {"bench": "serving", "trace": arguments.trace.name}
    for mode, flags in MODES.items():
        print(f"replaying with {mode}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="kvist-bench-") as folder:
            figures = replay(arguments, flags, Path(folder))
        result[mode] = {key: figures[key] for key in KEPT}
        result[mode]["computed_tokens"] = figures["computed_tokens"]
        result[mode]["cached_tokens_by_tier"] = figures["cached_tokens_by_tier"]
        result[mode]["mean_ttft_ms"] = round(figures["mean_ttft_ms"], 1)
        result[mode]["p99_ttft_ms"] = round(figures["p99_ttft_ms"], 1)
    for mode in ("hbm", "tiers"):
        base, ours = result["no_reuse"], result[mode]
        computed = ours["computed_tokens"] / max(1, base["computed_tokens"])
        result[f"{mode}_computed_percent"] = round(100 * computed, 1)
        result[f"{mode}_ttft_speedup"] = round(base["mean_ttft_ms"] / ours["mean_ttft_ms"], 2)
    for key in ("requests", "input_scale", "concurrency", "pool", "threads"):
        result[key] = getattr(arguments, key)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
