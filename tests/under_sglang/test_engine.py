"""SGLang's own engine on the real SmolLM2-135M, on a CPU: scheduler, radix tree, host cache and
controller are SGLang's, its GPU kernels are stood in for (sim.sglang_cpu). Greedy answers from
Kvist are those without it. Runs with SGLang's Python only (make test-sglang).

The tests stand in the order in which the pages wander: DRAM, another process, flash.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs SGLang: make test-sglang")

from sim.sglang_engine import PAGE, SglangProcess
from sim.sidecar import Sidecar, wait_until

ROOT = Path(__file__).parent.parent.parent
DRAW = random.Random(5)
PROMPTS = [[DRAW.randrange(100, 40000) for _ in range(length)] for length in (150, 300, 410)]


# transformers, which makes the folder, meets the same torchvision as SGLang does.
RUN = (
    "import runpy, sys; from sim.sglang_cpu import declare_vision; declare_vision();"
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    out = ROOT / "build" / "smollm2-hf"
    script = ROOT / "benchmarks" / "peers" / "smollm2_folder.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([sys.executable, "-c", RUN, str(script), str(out)], check=True, env=environment)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang-engine")


@pytest.fixture(scope="module")
def sidecar(folder: Path) -> Iterator[Sidecar]:
    flash = ["--flash-path", str(folder / "flash"), "--flash-bytes", "256MiB"]
    flags = ["--dram-bytes", "128MiB", *flash, "--flash-admission", "always"]
    made = Sidecar(folder / "sidecar", flags)
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(smollm2: Path, folder: Path, sidecar: Sidecar) -> Iterator[SglangProcess]:
    made = SglangProcess(smollm2, sidecar.socket, folder / "first.log")
    yield made
    made.close()


@pytest.fixture(scope="module")
def cold(engine: SglangProcess, sidecar: Sidecar) -> list[list[int]]:
    answers = [engine.generate(prompt) for prompt in PROMPTS]
    assert [answer["cached"] for answer in answers] == [0, 0, 0]
    stored = sum(len(prompt) // PAGE for prompt in PROMPTS)
    wait_until(lambda: used(sidecar, "dram") >= stored, "pages to be stored", 30.0)
    return [answer["tokens"] for answer in answers]


def used(sidecar: Sidecar, tier: str) -> float:
    name = f'kvist_tier_used_slots{{tier="{tier}"}}'
    lines = sidecar.get("metrics").splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def usable(prompt: list[int]) -> int:
    """Tokens in pages before the last token, which is always computed."""
    return (len(prompt) - 1) // PAGE * PAGE


def check(answers: list[dict[str, Any]], cold: list[list[int]]) -> None:
    assert [answer["storage"] for answer in answers] == [usable(prompt) for prompt in PROMPTS]
    assert [answer["tokens"] for answer in answers] == cold


def test_answers_from_kvist_are_those_without_it(
    engine: SglangProcess, cold: list[list[int]]
) -> None:
    engine.flush()
    check([engine.generate(prompt) for prompt in PROMPTS], cold)
    longer = [*PROMPTS[0], *range(1000, 1060)]
    engine.flush()
    assert engine.generate(longer)["storage"] == len(PROMPTS[0]) // PAGE * PAGE


def test_a_sidecar_that_dies_and_comes_back_costs_hits_and_no_answer(
    engine: SglangProcess, sidecar: Sidecar, cold: list[list[int]]
) -> None:
    wait_until(lambda: used(sidecar, "flash") >= used(sidecar, "dram"), "pages to sink", 30.0)
    engine.flush()
    sidecar.kill()
    without = [engine.generate(prompt) for prompt in PROMPTS]
    assert [answer["tokens"] for answer in without] == cold
    assert sum(answer["storage"] for answer in without) == 0
    sidecar.start()
    time.sleep(1.0)  # to attach
    engine.flush()
    check([engine.generate(prompt) for prompt in PROMPTS], cold)  # from flash


def test_a_second_process_has_them_from_flash_after_both_were_restarted(
    smollm2: Path, folder: Path, sidecar: Sidecar, engine: SglangProcess, cold: list[list[int]]
) -> None:
    engine.close()
    sidecar.stop()
    sidecar.start()
    second = SglangProcess(smollm2, sidecar.socket, folder / "second.log")
    try:
        check([second.generate(prompt) for prompt in PROMPTS], cold)
    finally:
        second.close()
