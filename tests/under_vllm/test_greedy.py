"""Greedy answers of vLLM on the real model with Kvist under it: from nothing and from every cache.
Runs with vLLM's Python only (make test-vllm).

vLLM's arithmetic depends on how a prompt is cut into steps: a token may get other last bits in a
step of 1,771 tokens than in one of 107. Here each step is of at most one block, 128 tokens, and
each prompt is alone. So a prompt is cut at the same places whatever part of it is cached, and
there is one right answer: what a vLLM without a connector says for the first time. Every other way
has to give it, token by token. With vLLM's usual steps its own cache may give another word than
none; there, what comes from Kvist has to be equal to what comes from vLLM's own cache.

Engines after one another on one sidecar, so the tests stand in the order in which the blocks
wander: DRAM, flash, DRAM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from sim.sidecar import Sidecar
from sim.vllm_process import (
    ONE_BLOCK_STEPS,
    Prompt,
    VllmProcess,
    draw_prompts,
    settled,
    usable_tokens,
)

GROUP = 20  # prompts whose KV fits into vLLM's own pool together
DRAM, FLASH = 'hit_tokens{"tier": "dram"}', 'hit_tokens{"tier": "flash"}'


@pytest.fixture(scope="module")
def prompts(request: pytest.FixtureRequest) -> list[Prompt]:
    return draw_prompts(request.config.getoption("--prompts"), seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("under-vllm")


@pytest.fixture(scope="module")
def sidecar(folder: Path, prompts: list[Prompt]) -> Iterator[Sidecar]:
    # Of each prompt two tenants have blocks: of up to 1,800 tokens, 400 of them on average.
    room = f"{512 + 24 * len(prompts)}MiB"
    flash = ["--flash-path", str(folder / "flash"), "--flash-bytes", room]
    made = Sidecar(
        folder / "sidecar", ["--dram-bytes", room, *flash, "--flash-admission", "always"]
    )
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def right(model: Path, prompts: list[Prompt], folder: Path) -> list[Prompt]:
    """What vLLM says by itself, each prompt for the first time."""
    engine = VllmProcess(
        model, None, folder / "reference.log", False, *ONE_BLOCK_STEPS, "--no-prefix-caching"
    )
    try:
        return engine.answers(prompts)
    finally:
        engine.close()


def groups(prompts: list[Prompt]) -> Iterator[slice]:
    return (slice(first, first + GROUP) for first in range(0, len(prompts), GROUP))


def hits(engine: VllmProcess) -> float:
    return engine.count('hit_tokens{"tier": "hbm"}') + engine.count(DRAM)


def told_pool(sidecar: Sidecar) -> tuple[float, float]:
    workers = json.loads(sidecar.get("stats.json"))["workers"]
    (rates,) = [one["rates"] for one in workers if "pool_blocks.total" in one["rates"]]
    return rates["pool_blocks.filled"], rates["pool_blocks.total"]


def test_cold_own_cache_and_dram_in_one_process(
    model: Path, prompts: list[Prompt], folder: Path, sidecar: Sidecar, right: list[Prompt]
) -> None:
    engine = VllmProcess(model, sidecar.socket, folder / "first.log", False, *ONE_BLOCK_STEPS)
    try:
        for part in groups(prompts):
            assert engine.answers(prompts[part]) == right[part]  # cold
            assert engine.answers(prompts[part]) == right[part]  # from vLLM's own cache
            assert engine.forget()
            settled(sidecar, "dram")
            before = hits(engine)
            assert engine.answers(prompts[part]) == right[part]  # from Kvist
            # Each full block of each prompt; those of shared prefixes vLLM has after the first.
            assert hits(engine) - before == usable_tokens(prompts[part])
        assert engine.count(DRAM) > usable_tokens(prompts) / 2
        assert engine.count("load_blocks") == engine.count(DRAM) / 128

        # vLLM's pool is told: what it keeps to find again counts, which vLLM calls free.
        filled, total = told_pool(sidecar)
        assert 0 < filled <= total

        # Another tenant shares nothing, and after a reset of the connector nobody does.
        before = engine.count(DRAM)
        assert engine.forget()
        assert engine.answers(prompts[:3], salt="acme:1") == right[:3]
        assert engine.forget(connector=True)
        assert engine.answers(prompts[:3]) == right[:3]
        assert engine.count(DRAM) == before
    finally:
        engine.close()


def test_flash_after_both_were_restarted_with_the_process_split(
    model: Path, prompts: list[Prompt], folder: Path, sidecar: Sidecar, right: list[Prompt]
) -> None:
    settled(sidecar, "flash")
    sidecar.stop()
    sidecar.start()
    engine = VllmProcess(model, sidecar.socket, folder / "second.log", True, *ONE_BLOCK_STEPS)
    try:
        assert engine.answers(prompts) == right
        assert engine.count(FLASH) > usable_tokens(prompts) / 2
        assert engine.count("rise_waits") > 0  # requests that vLLM was asked to put off
        # Another vLLM beside it, without prefix caching, from the DRAM that this one warmed.
        flags = (*ONE_BLOCK_STEPS, "--no-prefix-caching")
        other = VllmProcess(model, sidecar.socket, folder / "third.log", False, *flags)
        try:
            assert other.answers(prompts) == right
            assert other.count(DRAM) == usable_tokens(prompts)
        finally:
            other.close()
    finally:
        engine.close()


def test_with_vllms_usual_steps_kvist_says_what_vllms_own_cache_says(
    model: Path, prompts: list[Prompt], folder: Path, sidecar: Sidecar
) -> None:
    some = prompts[:GROUP]
    engine = VllmProcess(model, sidecar.socket, folder / "steps.log")
    try:
        # Other steps, other last bits: a tenant of their own keeps them apart from those above.
        cold = engine.answers(some, salt="steps")
        own = engine.answers(some, salt="steps")
        assert engine.forget()
        settled(sidecar, "dram")
        before = hits(engine)
        assert engine.answers(some, salt="steps") == own
        assert hits(engine) - before == usable_tokens(some)
        changed = sum(a != b for a, b in zip(cold, own, strict=True))
        print(f"\nvLLM's own cache changed {changed} of {len(some)} answers")
    finally:
        engine.close()
