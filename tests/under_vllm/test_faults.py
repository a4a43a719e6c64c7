"""Aborts, preemption, damaged bytes and SIGKILL of either side, in vLLM on the real model: no wrong
token, no hang, no leaked slot. Runs with vLLM's Python only (make test-vllm).

One engine with few blocks and without a prefix cache of its own, so that every request goes to
Kvist; with vLLM's process split and without. Its steps are of one block at most (test_greedy.py
says why), so whatever part of a prompt comes, there is one right answer.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from sim.sidecar import Sidecar, wait_until
from sim.vllm_process import (
    ONE_BLOCK_STEPS,
    Prompt,
    VllmProcess,
    settled,
    sidecar_metric,
    usable_tokens,
)

DRAM = 'hit_tokens{"tier": "dram"}'
DRAW = random.Random(11)
PROMPTS = [[DRAW.randrange(100, 49000) for _ in range(length)] for length in (270, 400, 530)]
FLAGS = (*ONE_BLOCK_STEPS, "--no-prefix-caching", "--blocks", "24", "--max-model-len", "2048")


@pytest.fixture(scope="module", params=[False, True], ids=["one-process", "process-split"])
def split(request: pytest.FixtureRequest) -> bool:
    chosen: bool = request.param
    return chosen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, split: bool) -> Path:
    return tmp_path_factory.mktemp(f"vllm-faults-{split}")


@pytest.fixture(scope="module")
def sidecar(folder: Path) -> Iterator[Sidecar]:
    made = Sidecar(folder / "sidecar", ["--dram-bytes", "512MiB"])
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, sidecar: Sidecar, split: bool) -> Iterator[VllmProcess]:
    made = VllmProcess(model, sidecar.socket, folder / "engine.log", split, *FLAGS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def right(engine: VllmProcess, sidecar: Sidecar) -> list[Prompt]:
    """The answers, cold; the blocks are stored when this returns."""
    answers = engine.answers(PROMPTS)
    comes_from_dram(engine, sidecar, answers)
    return answers


def comes_from_dram(engine: VllmProcess, sidecar: Sidecar, answers: list[Prompt]) -> None:
    """Ask once more; each full block must come from Kvist."""
    settled(sidecar, "dram")  # stores end behind the answers
    before = engine.count(DRAM)
    assert engine.answers(PROMPTS) == answers
    assert engine.count(DRAM) - before == usable_tokens(PROMPTS)


def test_requests_that_are_given_up_at_any_stage_leave_nothing_behind(
    engine: VllmProcess, right: list[Prompt]
) -> None:
    for steps in (0, 1, 2, 3, 5):
        assert engine.ask("abort", prompts=PROMPTS, steps=steps)["left"] == 0
    assert engine.answers(PROMPTS) == right


def test_preempted_requests_end_and_spoil_no_block(
    engine: VllmProcess, right: list[Prompt]
) -> None:
    longer = [one * 2 for one in PROMPTS]
    answers = engine.answers(longer, tokens=300, at_once=True)
    assert [len(one) for one in answers] == [300] * len(longer)
    preempted = engine.ask("metrics", prefix="vllm:num_preemptions")["metrics"]
    assert sum(preempted.values()) > 0
    assert engine.answers(PROMPTS) == right


def test_flipped_bits_in_the_arena_are_found_and_vllm_computes_those_blocks(
    engine: VllmProcess, sidecar: Sidecar, right: list[Prompt]
) -> None:
    arena = next(path for path in (sidecar.folder / "shm").rglob("*arena*"))
    data = np.memmap(arena, dtype=np.uint8, mode="r+")
    used = np.flatnonzero(data.reshape(-1, 4096)[:, 256:].any(axis=1))
    data[used * 4096 + 2048] ^= 0x40
    before = engine.count('load_failures{"reason": "corrupt"}')
    assert engine.answers(PROMPTS) == right
    assert engine.count('load_failures{"reason": "corrupt"}') - before == len(PROMPTS)
    assert engine.count('miss_tokens{"reason": "corrupt"}') > 0
    comes_from_dram(
        engine, sidecar, right
    )  # what was damaged was dropped, computed and stored anew


def test_a_sidecar_that_dies_at_random_costs_hits_and_no_answer(
    engine: VllmProcess, sidecar: Sidecar, right: list[Prompt]
) -> None:
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
    try:
        rounds = 0
        while rounds < 6 or kills < 2:  # on a busy machine a sidecar takes seconds to start
            assert engine.answers(PROMPTS) == right
            rounds += 1
            assert rounds < 100, "the sidecar did not die twice"
    finally:
        done.set()
        thread.join()
    wait_until(lambda: sidecar_metric(sidecar, "kvist_sessions") == 2, "both halves to be back")
    assert engine.answers(PROMPTS) == right  # stored anew
    comes_from_dram(engine, sidecar, right)
    assert sidecar_metric(sidecar, "kvist_reserved_slots") == 0


def test_a_vllm_that_dies_amid_its_work_leaves_no_slot_and_the_next_one_answers(
    model: Path, folder: Path, sidecar: Sidecar, split: bool, engine: VllmProcess,
    right: list[Prompt],
) -> None:  # fmt: skip
    draw, victim = random.Random(13), engine
    fresh = [[token + shift for token in one] for one in PROMPTS for shift in range(1, 9)]
    for life in range(2):
        victim.send("generate", prompts=fresh, max_tokens=1)
        time.sleep(draw.uniform(0.5, 3.0))
        victim.kill()
        wait_until(lambda: sidecar_metric(sidecar, "kvist_sessions") == 0, "its sessions to end")
        assert sidecar_metric(sidecar, "kvist_reserved_slots") == 0
        log = folder / f"life-{life}.log"
        victim = VllmProcess(model, sidecar.socket, log, split, *FLAGS)
        comes_from_dram(victim, sidecar, right)
    victim.close()
