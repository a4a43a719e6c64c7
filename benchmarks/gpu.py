"""What the kernels, the model and the tiers reach on a GPU, in percent of what it can do.

One command, random weights of Llama 8B's shape, under 10 minutes: every kernel against float64, the
model's promises, graphs and copies; then measured ceilings (copy and matrix product), attention in
percent of them, decode steps and prefill of the whole model against the roofline and vLLM's
published line, blocks between pinned memory and pages (GB/s, what they add to a step, hits against
recompute), an offline run, and decodes over float8 pages. "aims" says what was set out to be
reached, and whether it was.

Without a GPU, or with --tiny, the same code runs at toy sizes in Triton's interpreter. That shows
that it runs and that results are right; its rates say nothing, and the line says "tiny": true.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The parts lie beside this file, which PYTHONSAFEPATH keeps from the path.
sys.path.insert(0, str(Path(__file__).parent))

import triton
from gpu_parts import attention, checks, clock, small, tiers, tuning
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
    hits=(1024, 8192, 32768),
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
# A run that stands still is ended so long after its time, with a trace of every thread.
HUNG_S = 60
# What this engine sets out to reach: a name, where it stands in the result, the aim, and whether
# it is a least or a most.
AIMS = (
    ("decode_attention_percent_of_copy", "decode_attention/32x4096/percent_of_copy", 85, "least"),
    ("prefill_percent_of_matmul", "prefill_attention/16384/percent_of_matmul", 60, "least"),
    ("step_over_floor", "step_line/a_over_floor", 1.3, "most"),
    ("offline_percent_of_roofline", "offline/percent_of_roofline", 60, "least"),
    ("load_inflation_percent", "step_inflation/load/inflation_percent", 5, "most"),
    ("store_inflation_percent", "step_inflation/store/inflation_percent", 5, "most"),
)
# Phases that say whether results are right; they come first.
CHECKS = ("attention_errors", "small_errors", "model_errors", "copy_errors")


class Bench:
    """The phases, in order; a phase that fails is told and the others still run.

    Args:
        sizes: of the run.
        device: to measure.
        seconds: no phase begins after this.
        only: phases to run, and those that they need; empty runs all.
        flush: called after each phase with the bench, for what there is so far.
    """

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        seconds: float,
        only: Sequence[str] = (),
        flush: Callable[[Bench], object] = lambda _bench: None,
    ) -> None:
        self._sizes = sizes
        self._clock = Clock(device, sizes.repeats)
        self._deadline = time.monotonic() + seconds
        self._only = only
        self._flush = flush
        self.result: Result = {}
        self.failed: list[str] = []

    def phase(self, name: str, run: Callable[[], Any], needed: bool = False) -> Any:
        """Run a phase unless the time is over; its result goes under its name if it is a dict."""
        if self._only and name not in self._only and not needed:
            return None
        if time.monotonic() > self._deadline:
            self.result[name] = {"skipped": "out of time"}
            return None
        say(f"{name} ...")
        begin = time.monotonic()
        try:
            if self._clock.cuda:
                torch.cuda.empty_cache()  # what graphs and a phase that failed held
            done = run()
            self._clock.sync()
        except Exception as error:  # one phase must not cost the numbers of the others
            traceback.print_exc()
            self.failed.append(name)
            done = {"error": f"{type(error).__name__}: {error}"[:400]}
        say(f"  {time.monotonic() - begin:.1f} s")
        if isinstance(done, dict):
            self.result[name] = {**done, "seconds": round(time.monotonic() - begin, 1)}
            done = None if "error" in done else done
        self._flush(self)
        return done

    def checks(self) -> None:
        """Whether results are right: kernels, model, graphs, copies."""
        sizes, one = self._sizes, self._clock
        few = functools.partial(attention.new_pool, sizes, 16, sizes.model.layers, one.device)
        self.phase("attention_errors", lambda: attention.attention_errors(sizes, one))
        self.phase("small_errors", lambda: small.small_errors(sizes, one, few()))
        self.phase("model_errors", lambda: checks.model_errors(sizes, one))
        self.phase("copy_errors", lambda: checks.copy_errors(sizes, one))

    def kernels(self, pool: torch.Tensor) -> None:
        """Kernels alone."""
        sizes, one = self._sizes, self._clock
        copy, product = self.ceilings
        self.phase("decode_attention", lambda: attention.decode_rates(sizes, one, pool, copy))
        self.phase("prefill_attention", lambda: attention.prefill_rates(sizes, one, pool, product))
        if "tuning" in self._only:
            self.phase("tuning", lambda: tuning.sweep(sizes, one, pool))
        self.phase("small_kernels", lambda: small.small_rates(sizes, one, pool, copy))
        self.phase("products", lambda: small.product_rates(sizes, one, (copy, product)))

    def model(self, pool: torch.Tensor, model: CudaLlama) -> None:
        """The whole model, then blocks that move beside it."""
        sizes, one = self._sizes, self._clock
        copy, product = self.ceilings
        stepping = {"decode_steps", "step_line", "offline", "step_inflation", "invariance"}
        steps = self.phase(
            "capture",
            lambda: whole.Steps(sizes, one, model, pool),
            not stepping.isdisjoint(self._only),
        )
        if isinstance(steps, whole.Steps):
            self.phase("decode_steps", lambda: whole.decode_steps(sizes, steps, copy))
            self.phase("step_line", lambda: whole.step_line(sizes, steps, copy))
        self.phase("prefill", lambda: whole.prefill_times(sizes, one, model, pool, product))
        self.tiers(pool, model, steps)
        if isinstance(steps, whole.Steps):
            ceilings = (copy, product)
            self.phase("offline", lambda: whole.offline_run(sizes, one, model, steps, ceilings))
            self.phase("invariance", lambda: whole.invariance_cost(sizes, one, model, pool, steps))

    def float8(self, pool: torch.Tensor, model: CudaLlama) -> None:
        """Decodes over float8 pages, which take the place of the others: last."""
        sizes, one = self._sizes.float8(), self._clock
        copy, _ = self.ceilings
        if self._only and not any(name.endswith("_float8") for name in self._only):
            return
        narrow = self.phase("pool_float8", lambda: attention.as_float8(pool), needed=True)
        if not isinstance(narrow, torch.Tensor):
            return
        rates = functools.partial(attention.decode_rates, sizes, one, narrow, copy)
        self.phase("decode_attention_float8", rates)
        steps = self.phase(
            "capture_float8",
            lambda: whole.Steps(sizes, one, model, narrow),
            not {"decode_steps_float8", "step_line_float8"}.isdisjoint(self._only),
        )
        if isinstance(steps, whole.Steps):
            self.phase("decode_steps_float8", lambda: whole.decode_steps(sizes, steps, copy))
            self.phase("step_line_float8", lambda: whole.step_line(sizes, steps, copy))

    def tiers(self, pool: torch.Tensor, model: CudaLlama, steps: whole.Steps | None) -> None:
        """Blocks between the arena and pages."""
        sizes, one = self._sizes, self._clock
        opened = self.phase(
            "arena",
            lambda: tiers.Tiers(sizes, one, pool, model.compute, tiers.arena_blocks(sizes)),
            not {"tiers", "hits", "step_inflation"}.isdisjoint(self._only),
        )
        if not isinstance(opened, tiers.Tiers):
            return
        try:
            self.phase("tiers", lambda: tiers.tier_rates(sizes, opened))
            self.phase("hits", lambda: tiers.hits(sizes, model, pool, opened))
            if isinstance(steps, whole.Steps):
                inflation = functools.partial(tiers.step_inflation, sizes, steps, opened)
                self.phase("step_inflation", inflation)
        finally:
            opened.close()

    def run(self) -> None:
        """All phases."""
        sizes, one = self._sizes, self._clock
        self.checks()
        if set(self._only) - {"ceilings", *CHECKS} or not self._only:
            self.phase("ceilings", lambda: clock.ceilings(sizes, one), needed=True)
            model = self.phase("weights", lambda: whole.random_model(sizes, one.device), True)
            pool = self.phase("pool", self._pool, needed=True)
            if isinstance(model, CudaLlama) and isinstance(pool, torch.Tensor):
                self.result["pool_pages"] = len(pool)
                self.kernels(pool)
                self.model(pool, model)
                self.float8(pool, model)
        elif "ceilings" in self._only:
            self.phase("ceilings", lambda: clock.ceilings(sizes, one))

    @property
    def ceilings(self) -> tuple[float, float]:
        """Copy in GB/s, product in TFLOP/s; not a number where that is not known."""
        found, unknown = self.result.get("ceilings", {}), float("nan")
        return found.get("copy_gb_per_s", unknown), found.get("matmul_tflop_per_s", unknown)

    def _pool(self) -> torch.Tensor:
        sizes, room = self._sizes, self._sizes.pool_bytes
        if self._clock.cuda:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            room = min(room, free - LEAVE_BYTES)
        pages = max(1, room // sizes.page_bytes)
        return attention.new_pool(sizes, pages, sizes.model.layers, self._clock.device)


def wrong_results(result: Result) -> list[str]:
    """Whatever is not right."""
    found = []
    for phase in CHECKS:
        for name, entry in result.get(phase, {}).items():
            if isinstance(entry, dict) and not entry["right"]:
                found.append(name)
    if not result.get("tiers", {}).get("right", True):
        found.append("tiers")
    return found


def reached(result: Result) -> Result:
    """Each aim, what was measured, and whether that is it; null where nothing was."""
    found: Result = {}
    for name, path, aim, bound in AIMS:
        value: Any = result
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        met = None if value is None else bool(value >= aim if bound == "least" else value <= aim)
        found[name] = {f"at_{bound}": aim, "got": value, "met": met}
    return found


def rounded(value: Any) -> Any:
    """Floats to 5 digits: more would be noise. What is no number is null."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.5g}") if isinstance(value, float) else value


def line_of(bench: Bench, tiny: bool, seconds: float) -> str:
    """The run so far, as JSON."""
    cuda = torch.cuda.is_available()
    wrong = wrong_results(bench.result)
    line = {
        "bench": "gpu",
        "device": torch.cuda.get_device_name() if cuda else "none: Triton's interpreter",
        "tiny": tiny,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": seconds,
        "failed": bench.failed,
        "wrong": wrong,
        "aims": {} if tiny else reached(bench.result),
        **bench.result,
    }
    return json.dumps(rounded(line))


def main() -> int:
    """Measure and report; 1 if a phase failed or a result is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes; the default without a GPU")
    parser.add_argument("--out", type=Path, help="write the JSON to this file after each phase")
    parser.add_argument("--seconds", type=float, default=480, help="begin no phase after this")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PHASE",
        help="these phases and what they need; tuning, which sweeps constants, runs only so",
    )  # fmt: skip
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, which is no way to measure a GPU: unset it")
    tiny = arguments.tiny or not cuda
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    if not cuda:
        torch.set_num_threads(1)
    faulthandler.dump_traceback_later(arguments.seconds + HUNG_S, exit=True)
    begin = time.monotonic()

    def flush(bench: Bench) -> str:
        text = line_of(bench, tiny, time.monotonic() - begin)
        if arguments.out is not None:
            arguments.out.write_text(text + "\n")
        return text

    bench = Bench(TINY if tiny else REAL, device, arguments.seconds, arguments.only, flush)
    bench.run()
    faulthandler.cancel_dump_traceback_later()
    print(flush(bench))
    return 1 if bench.failed or wrong_results(bench.result) else 0


if __name__ == "__main__":
    sys.exit(main())
