"""The GPU benchmark runs at toy sizes without a GPU, and every kernel compiles for one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
# A Hopper gives a program 227 KiB of shared memory and a thread 255 registers.
SHARED_MAX = 227 << 10


def last_line(script: str, *arguments: str, **env: str) -> dict[str, Any]:
    """Run a benchmark in a process of its own and take its JSON."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        env={**inherited, **env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run_goes_through_every_phase_and_finds_every_kernel_right(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    line = last_line("gpu.py", "--tiny", "--out", str(out))
    assert json.loads(out.read_text()) == line
    assert line["failed"] == []
    assert line["wrong"] == []
    assert line["tiny"]
    kernels = {*line["attention_errors"], *line["small_errors"]} - {"seconds"}
    assert len(kernels) == 13
    assert {"decode_attention_float8", "prefill_attention_float8"} < kernels
    promises = {
        name for name, entry in line["model_errors"].items() if name != "seconds" and entry["right"]
    }
    assert promises == {"fast_logits", "invariant_logits", "fast_graphs", "invariant_graphs"}
    assert {line["copy_errors"][way]["right"] for way in ("pinned", "by_layers", "staged")} == {
        True
    }
    for phase in ("decode_attention", "prefill_attention", "small_kernels", "products"):
        assert len(line[phase]) > 2
    assert line["tiers"]["pinned_bytes"] > 0
    assert line["hits"]["24"]["tokens_from_dram"] == 8
    assert line["step_inflation"]["load"]["gb_per_s_beside"] > 0
    for phase in ("decode_steps", "prefill", "tiers", "hits", "invariance"):
        assert len(line[phase]) > 1
    for phase in ("step_line", "step_line_float8"):
        assert {"a_ms", "b_ms_per_token", "floor_a_ms"} <= set(line[phase])
    floor, narrow = (
        line[name]["1x16"]["floor_ms"] for name in ("decode_steps", "decode_steps_float8")
    )
    assert narrow < floor, "half the bytes of K and V, or a quarter"
    assert line["decode_attention_float8"]["2x20"]["us"] > 0
    assert line["offline"]["tok_per_s"] > 0
    assert line["tiers"]["right"]


def test_a_wrong_kernel_and_a_damaged_block_are_named(gpu: ModuleType) -> None:
    right, wrong = {"error": 1e-4, "right": True}, {"error": float("nan"), "right": False}
    errors = {"decode_attention": right, "prefill_attention": wrong, "seconds": 1.0}
    found = gpu.wrong_results({"attention_errors": errors, "tiers": {"right": False}})
    assert found == ["prefill_attention", "tiers"]
    assert gpu.wrong_results({"attention_errors": {"error": "RuntimeError: no memory"}}) == []


def test_a_phase_that_fails_is_told_and_the_next_one_runs(gpu: ModuleType) -> None:
    bench = gpu.Bench(gpu.TINY, gpu.torch.device("cpu"), seconds=60)

    def fail() -> None:
        raise RuntimeError("no memory")

    assert bench.phase("first", fail) is None
    assert bench.phase("second", lambda: {"ms": 1.0})["ms"] == 1.0
    assert bench.failed == ["first"]
    assert bench.result["first"]["error"] == "RuntimeError: no memory"


def test_no_phase_begins_when_the_time_is_over(gpu: ModuleType) -> None:
    bench = gpu.Bench(gpu.TINY, gpu.torch.device("cpu"), seconds=0)
    bench.run()
    assert bench.result
    assert all(entry == {"skipped": "out of time"} for entry in bench.result.values())


def test_what_was_measured_is_on_disk_after_each_phase(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    device, only = gpu.torch.device("cpu"), ["ceilings"]

    def flush(bench: Any) -> None:
        out.write_text(gpu.line_of(bench, True, 1.0))

    bench = gpu.Bench(gpu.TINY, device, 60, only, flush)
    bench.phase("ceilings", lambda: {"copy_gb_per_s": float("nan")})
    assert json.loads(out.read_text())["ceilings"]["copy_gb_per_s"] is None
    bench.run()
    assert json.loads(out.read_text())["ceilings"]["copy_gb_per_s"] > 0
    assert set(bench.result) == {"ceilings"}


def test_constants_are_changed_one_at_a_time_and_what_fails_is_told(gpu: ModuleType) -> None:
    module = ModuleType("kernel")
    module.STAGES, module.WARPS = 3, 4  # type: ignore[attr-defined]
    seen = []

    def run() -> float:
        seen.append((module.STAGES, module.WARPS))  # type: ignore[attr-defined]
        if module.STAGES == 9:  # type: ignore[attr-defined]
            raise RuntimeError("out of shared memory")
        return 1.5

    found = gpu.tuning._vary(((module, "STAGES", (2, 9)), (module, "WARPS", (8,))), run)
    assert seen == [(2, 4), (9, 4), (3, 8)]
    assert found["STAGES"] == {"now": 3, "2": 1.5, "9": "RuntimeError: out of shared memory"}
    assert (module.STAGES, module.WARPS) == (3, 4)  # type: ignore[attr-defined]


def test_each_aim_is_named_with_what_was_got_and_whether_that_is_it(gpu: ModuleType) -> None:
    aims = gpu.reached(
        {"step_line": {"a_over_floor": 1.2}, "offline": {"percent_of_roofline": 59.9}}
    )
    assert len(aims) == len(gpu.AIMS)
    assert aims["step_over_floor"] == {"at_most": 1.3, "got": 1.2, "met": True}
    assert aims["offline_percent_of_roofline"] == {"at_least": 60, "got": 59.9, "met": False}
    assert aims["load_inflation_percent"]["met"] is None


def test_every_kernel_compiles_for_hopper_without_spills_and_with_matrix_units(
    tmp_path: Path,
) -> None:
    line = last_line("kernel_report.py", TRITON_CACHE_DIR=str(tmp_path))
    codes = line.pop("codes_of_steps")
    kernels = {name: entry for name, entry in line.items() if isinstance(entry, dict)}
    assert len(kernels) == 21
    for name, entry in kernels.items():
        assert entry["shared_bytes"] <= SHARED_MAX, name
        if name.endswith("_float32"):  # without matrix units: right, for tests and toys, and slow
            continue
        assert entry["spilled_bytes"] == 0, name
        # The sampler's logarithms are polynomials; nobody's bits depend on another step of it.
        assert entry["fused"] == 0 or name == "sample_kernel", name
    for name in ("prefill_kernel", "prefill_kernel_float8", "matmul_kernel"):
        assert kernels[name]["wgmma"] > 0
    for name in ("split_kernel", "split_kernel_float8"):
        assert kernels[name]["mma"] > 0
        assert kernels[name]["async_copies"] > 0
    # A code is compiled when it is first asked for, while requests wait: a step of another shape
    # must not ask for another one. The first norm of a model has nothing to add, and lists are of
    # splits or of tiles.
    assert codes == {name: 1 + (name in ("add_norm_kernel", "cut_kernel")) for name in codes}
    assert {"cut_kernel", "split_kernel", "merge_kernel", "prefill_kernel"} < set(codes)
