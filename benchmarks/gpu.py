"""What the kernels, the model and the tiers reach on a GPU, in percent of what it can do.

One command, random weights of Llama 8B's shape, under 10 minutes: measured ceilings (copy and
matrix product), every kernel against float64, attention in percent of the ceilings, decode steps
and prefill of the whole model against the roofline and vLLM's published line, an offline run, and
blocks between pinned memory and pages: GB/s, what they add to a step, hits against recompute.

Without a GPU, or with --tiny, the same code runs at toy sizes in Triton's interpreter. That shows
that it runs and that results are right; its rates say nothing, and the line says "tiny": true.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The parts lie beside this file, which PYTHONSAFEPATH keeps from the path.
sys.path.insert(0, str(Path(__file__).parent))

from gpu_parts import attention, clock, small, tiers
from gpu_parts import model as whole
from gpu_parts.clock import Clock, Result, Sizes, say

from kvist.engine.models.base import ModelConfig
from kvist.engine.models.llama_cuda import CudaLlama

LLAMA_8B = ModelConfig(
    vocab=128256,
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    max_model_len=131072,
    rms_eps=1e-5,
    rope_theta=500000.0,
    tie_embeddings=False,
    eos_token_ids=(),
    name="llama",
)
REAL = Sizes(
    model=LLAMA_8B,
    dtype=torch.bfloat16,
    block_tokens=64,
    pool_bytes=80 << 30,
    copy_bytes=4 << 30,
    matmul=8192,
    decode=(
        *((1, keys) for keys in (1024, 4096, 16384, 65536)),
        *((8, keys) for keys in (1024, 4096, 16384)),
        *((32, keys) for keys in (1024, 4096, 16384)),
        *((128, keys) for keys in (1024, 4096)),
        (256, 1024),
    ),
    skewed=(65536, *[512] * 63, *[100] * 64),
    prefill=(512, 1024, 2048, 4096, 8192, 16384),
    rows=(1, 8, 32, 64, 128, 256),
    contexts=(1024, 8192),
    fit=(256, 1024, 4096, 16384, 65536),
    offline=(1000, 1000),
    offline_rows=256,
    slots=256,
    hits=(1024, 10240, 51200),
    chunk=8192,
    repeats=20,
)
TINY = Sizes(
    model=ModelConfig(
        vocab=96,
        layers=1,
        hidden=32,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=48,
        max_model_len=128,
        rms_eps=1e-5,
        rope_theta=10000.0,
        tie_embeddings=False,
        eos_token_ids=(),
        name="llama",
    ),
    dtype=torch.float32,
    block_tokens=8,
    pool_bytes=1 << 20,
    copy_bytes=1 << 20,
    matmul=128,
    decode=((2, 20),),
    skewed=(40, 3),
    prefill=(12, 20),
    rows=(1, 2),
    contexts=(16,),
    fit=(8, 24),
    offline=(8, 2),
    offline_rows=2,
    slots=4,
    hits=(24,),
    chunk=16,
    repeats=1,
)
# Device memory that is left beside weights and pages: scratch of the steps, graphs, references.
LEAVE_BYTES = 12 << 30
# What this engine sets out to reach: a name, where it stands in the result, the aim. Of a step and
# of inflation, less is better.
AIMS = (
    ("decode_attention_percent_of_copy", ("decode_attention", "32x4096", "percent_of_copy"), 85),
    ("prefill_percent_of_matmul", ("prefill_attention", "16384", "percent_of_matmul"), 60),
    ("step_over_floor", ("step_line", "a_over_floor"), 1.3),
    ("offline_percent_of_roofline", ("offline", "percent_of_roofline"), 60),
    ("load_inflation_percent", ("step_inflation", "load", "inflation_percent"), 5),
    ("store_inflation_percent", ("step_inflation", "store", "inflation_percent"), 5),
)


class Bench:
    """The phases, in order; a phase that fails is told and the others still run."""

    def __init__(self, sizes: Sizes, device: torch.device, seconds: float) -> None:
        self._sizes = sizes
        self._clock = Clock(device, sizes.repeats)
        self._deadline = time.monotonic() + seconds
        self.result: Result = {}
        self.failed: list[str] = []

    def phase(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a phase unless the time is over; its result goes under its name if it is a dict."""
        if time.monotonic() > self._deadline:
            self.result[name] = {"skipped": "out of time"}
            return None
        say(f"{name} ...")
        begin = time.monotonic()
        try:
            done = run()
            self._clock.sync()
        except Exception as error:  # one phase must not cost the numbers of the others
            self.failed.append(name)
            done = {"error": f"{type(error).__name__}: {error}"[:400]}
        if isinstance(done, dict):
            self.result[name] = {**done, "seconds": round(time.monotonic() - begin, 1)}
            return None if "error" in done else done
        say(f"  {time.monotonic() - begin:.1f} s")
        return done

    def kernels(self, pool: torch.Tensor) -> None:
        """Kernels alone: right, then fast."""
        sizes, one = self._sizes, self._clock
        copy, product = self.ceilings
        self.phase("attention_errors", lambda: attention.attention_errors(sizes, one))
        self.phase("small_errors", lambda: small.small_errors(sizes, one, pool))
        self.phase("decode_attention", lambda: attention.decode_rates(sizes, one, pool, copy))
        self.phase("prefill_attention", lambda: attention.prefill_rates(sizes, one, pool, product))
        self.phase("small_kernels", lambda: small.small_rates(sizes, one, pool, copy))
        self.phase("products", lambda: small.product_rates(sizes, one, (copy, product)))

    def model(self, pool: torch.Tensor, model: CudaLlama) -> None:
        """The whole model, then blocks that move beside it."""
        sizes, one = self._sizes, self._clock
        copy, product = self.ceilings
        steps = self.phase("capture", lambda: whole.Steps(sizes, one, model, pool))
        if isinstance(steps, whole.Steps):
            self.phase("decode_steps", lambda: whole.decode_steps(sizes, steps, copy))
            self.phase("step_line", lambda: whole.step_line(sizes, steps, copy))
            ceilings = (copy, product)
            self.phase("offline", lambda: whole.offline_run(sizes, one, model, steps, ceilings))
        self.phase("prefill", lambda: whole.prefill_times(sizes, one, model, pool, product))
        moved = self.phase("arena", lambda: tiers.Tiers(sizes, one, pool, model))
        if isinstance(moved, tiers.Tiers):
            self.phase("tiers", lambda: tiers.tier_rates(sizes, moved))
            self.phase("hits", lambda: tiers.hits(sizes, model, pool, moved))
            if isinstance(steps, whole.Steps):
                inflation = functools.partial(tiers.step_inflation, sizes, steps, moved)
                self.phase("step_inflation", inflation)
            moved.close()
        if isinstance(steps, whole.Steps):
            self.phase("invariance", lambda: whole.invariance_cost(sizes, one, model, pool, steps))

    def run(self) -> None:
        """All phases."""
        sizes, one = self._sizes, self._clock
        if self.phase("ceilings", lambda: clock.ceilings(sizes, one)) is None:
            return
        model = self.phase("weights", lambda: whole.random_model(sizes, one.device))
        if model is None:
            return
        pages = self._pages()
        self.result["pool_pages"] = pages
        pool = attention.new_pool(sizes, pages, sizes.model.layers, one.device)
        self.kernels(pool)
        self.model(pool, model)

    @property
    def ceilings(self) -> tuple[float, float]:
        """Copy in GB/s, product in TFLOP/s."""
        found = self.result["ceilings"]
        return found["copy_gb_per_s"], found["matmul_tflop_per_s"]

    def _pages(self) -> int:
        room = self._sizes.pool_bytes
        if self._clock.cuda:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            room = min(room, free - LEAVE_BYTES)
        return max(1, room // self._sizes.page_bytes)


def wrong_results(result: Result) -> list[str]:
    """Kernels whose results are not right."""
    found = []
    for phase in ("attention_errors", "small_errors"):
        for name, entry in result.get(phase, {}).items():
            if isinstance(entry, dict) and not entry["right"]:
                found.append(name)
    if not result.get("tiers", {}).get("right", True):
        found.append("tiers")
    return found


def reached(result: Result) -> Result:
    """What was reached of each aim that was measured."""
    found: Result = {}
    for name, path, aim in AIMS:
        value: Any = result
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[name] = {"aim": aim, "got": value}
    return found


def rounded(value: Any) -> Any:
    """Floats to 5 digits: more would be noise."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> int:
    """Measure and report; 1 if a phase failed or a result is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes; the default without a GPU")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--seconds", type=float, default=540, help="begin no phase after this")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    tiny = arguments.tiny or not cuda
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    if not cuda:
        torch.set_num_threads(1)
    begin = time.monotonic()
    bench = Bench(TINY if tiny else REAL, device, arguments.seconds)
    bench.run()
    wrong = wrong_results(bench.result)
    line = {
        "bench": "gpu",
        "device": torch.cuda.get_device_name() if cuda else "none: Triton's interpreter",
        "tiny": tiny,
        "torch": torch.__version__,
        "seconds": time.monotonic() - begin,
        "failed": bench.failed,
        "wrong": wrong,
        "aims": {} if tiny else reached(bench.result),
        **bench.result,
    }
    text = json.dumps(rounded(line))
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    print(text)
    return 1 if bench.failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
