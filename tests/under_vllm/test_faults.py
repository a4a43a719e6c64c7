"""Aborts, preemption and SIGKILL of either side, in one vLLM on the real model: no wrong token, no
hang, no leaked slot. Runs with vLLM's Python only (make test-vllm).

One engine with few blocks and without a prefix cache of its own, so that every request goes to
Kvist. Its answers from Kvist before anything happens are what it has to say ever after.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from sim.sidecar import Sidecar, wait_until
from sim.vllm_process import Prompt, VllmProcess, sidecar_metric, usable_tokens

DRAM = 'hit_tokens{"tier": "dram"}'
DRAW = random.Random(11)
PROMPTS = [[DRAW.randrange(100, 49000) for _ in range(length)] for length in (270, 400, 530)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm-faults")


@pytest.fixture(scope="module")
def sidecar(folder: Path) -> Iterator[Sidecar]:
    made = Sidecar(folder / "sidecar", ["--dram-bytes", "512MiB"])
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, sidecar: Sidecar) -> Iterator[VllmProcess]:
    flags = ("--no-prefix-caching", "--blocks", "24", "--max-model-len", "2048")
    made = VllmProcess(model, sidecar.socket, folder / "engine.log", False, *flags)
    yield made
    made.close()


@pytest.fixture(scope="module")
def cold(engine: VllmProcess) -> list[Prompt]:
    return engine.answers(PROMPTS)


@pytest.fixture(scope="module")
def warm(engine: VllmProcess, cold: list[Prompt]) -> list[Prompt]:
    assert len(cold) == len(PROMPTS)
    time.sleep(1.0)  # stores end behind the answers
    before = engine.count(DRAM)
    answers = engine.answers(PROMPTS)
    assert engine.count(DRAM) - before == usable_tokens(PROMPTS)
    return answers


def test_requests_that_are_given_up_at_any_stage_leave_nothing_behind(
    engine: VllmProcess, warm: list[Prompt]
) -> None:
    for steps in (0, 1, 2, 3, 5):
        assert engine.ask("abort", prompts=PROMPTS, steps=steps)["left"] == 0
    assert engine.answers(PROMPTS) == warm


def test_preempted_requests_end_and_spoil_no_block(engine: VllmProcess, warm: list[Prompt]) -> None:
    longer = [one * 2 for one in PROMPTS]
    answers = engine.answers(longer, tokens=300, at_once=True)
    assert [len(one) for one in answers] == [300] * len(longer)
    preempted = engine.ask("metrics", prefix="vllm:num_preemptions")["metrics"]
    assert sum(preempted.values()) > 0
    assert engine.answers(PROMPTS) == warm


def test_a_sidecar_that_dies_at_random_costs_hits_and_no_answer(
    engine: VllmProcess, sidecar: Sidecar, cold: list[Prompt], warm: list[Prompt]
) -> None:
    """Any part of a prompt may come or not; what vLLM says both cold and warm it must say."""
    draw, done, kills = random.Random(7), threading.Event(), 0

    def storm() -> None:
        nonlocal kills
        while not done.wait(draw.uniform(0.2, 2.0)):
            sidecar.kill()
            kills += 1
            time.sleep(draw.uniform(0.0, 0.5))
            sidecar.start()

    thread = threading.Thread(target=storm)
    thread.start()
    sure = [at for at in range(len(PROMPTS)) if cold[at] == warm[at]]
    try:
        for _ in range(5):
            answers = engine.answers(PROMPTS)
            assert [answers[at] for at in sure] == [warm[at] for at in sure]
    finally:
        done.set()
        thread.join()
    assert kills > 1
    assert sure
    wait_until(lambda: sidecar_metric(sidecar, "kvist_sessions") == 2, "both halves to be back")
    engine.answers(PROMPTS)  # stored anew
    time.sleep(1.0)
    before = engine.count(DRAM)
    assert engine.answers(PROMPTS) == warm
    assert engine.count(DRAM) - before == usable_tokens(PROMPTS)


def test_a_vllm_that_dies_amid_its_work_leaves_no_slot_reserved(
    engine: VllmProcess, sidecar: Sidecar
) -> None:
    fresh = [[token + shift for token in one] for one in PROMPTS for shift in range(1, 9)]
    engine.send("generate", prompts=fresh, max_tokens=1)
    time.sleep(2.0)
    engine.kill()
    wait_until(lambda: sidecar_metric(sidecar, "kvist_sessions") == 0, "its sessions to end")
    assert sidecar_metric(sidecar, "kvist_reserved_slots") == 0
