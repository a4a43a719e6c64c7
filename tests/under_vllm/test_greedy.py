"""Greedy answers of vLLM on the real model with Kvist under it: from nothing and from every cache.
Runs with vLLM's Python only (make test-vllm).

vLLM's arithmetic depends on how a prompt is cut into steps, so that with its own prefix cache it
may say another word than without, where two are nearly as likely. The reference is therefore vLLM
without a connector, each prompt alone, once cold and once from its own cache; what comes from
Kvist is cut as the latter and has to be equal to it, in each token.

Three engines after one another on one sidecar, so the tests stand in the order in which the blocks
wander: DRAM, flash, DRAM.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from sim.sidecar import Sidecar
from sim.vllm_process import (
    Prompt,
    VllmProcess,
    draw_prompts,
    sidecar_metric,
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
def sidecar(folder: Path) -> Iterator[Sidecar]:
    flags = ["--dram-bytes", "3GiB", "--flash-path", str(folder / "flash"), "--flash-bytes", "4GiB"]
    made = Sidecar(folder / "sidecar", [*flags, "--flash-admission", "always"])
    made.start()
    yield made
    made.close()


@dataclass(frozen=True, slots=True)
class Reference:
    """What vLLM says by itself.

    Attributes:
        cold: each prompt for the first time. own: again, from its own cache.
    """

    cold: list[Prompt]
    own: list[Prompt]


@pytest.fixture(scope="module")
def reference(model: Path, prompts: list[Prompt], folder: Path) -> Reference:
    engine = VllmProcess(model, None, folder / "reference.log")
    made = Reference([], [])
    for part in groups(prompts):
        made.cold.extend(engine.answers(prompts[part]))
        made.own.extend(engine.answers(prompts[part]))
        assert engine.forget()
    engine.close()
    return made


def groups(prompts: list[Prompt]) -> Iterator[slice]:
    return (slice(first, first + GROUP) for first in range(0, len(prompts), GROUP))


def hits(engine: VllmProcess) -> float:
    return engine.count('hit_tokens{"tier": "hbm"}') + engine.count(DRAM)


def settled(sidecar: Sidecar, tier: str) -> None:
    """Wait until no more blocks arrive in a tier."""
    seen = -1.0
    while (now := sidecar_metric(sidecar, f'kvist_tier_used_slots{{tier="{tier}"}}')) != seen:
        seen = now
        time.sleep(1.0)


def test_cold_own_cache_and_dram_in_one_process(
    model: Path, prompts: list[Prompt], folder: Path, sidecar: Sidecar, reference: Reference
) -> None:
    engine = VllmProcess(model, sidecar.socket, folder / "first.log")
    try:
        for part in groups(prompts):
            assert engine.answers(prompts[part]) == reference.cold[part]
            assert engine.answers(prompts[part]) == reference.own[part]
            assert engine.forget()
            settled(sidecar, "dram")
            before = hits(engine)
            assert engine.answers(prompts[part]) == reference.own[part]  # from Kvist
            # Each full block of each prompt; those of shared prefixes vLLM has after the first.
            assert hits(engine) - before == usable_tokens(prompts[part])
        assert engine.count(DRAM) > usable_tokens(prompts) / 2
        assert not engine.count('load_failures{"reason": "corrupt"}')

        # Another tenant shares nothing, and after a reset of the connector nobody does.
        before = engine.count(DRAM)
        assert engine.forget()
        assert engine.answers(prompts[:3], salt="acme:1") == reference.cold[:3]
        assert engine.forget(connector=True)
        assert engine.answers(prompts[:3]) == reference.cold[:3]
        assert engine.count(DRAM) == before
    finally:
        engine.close()


def test_flash_after_both_were_restarted_with_the_process_split(
    model: Path, prompts: list[Prompt], folder: Path, sidecar: Sidecar, reference: Reference
) -> None:
    settled(sidecar, "flash")
    sidecar.stop()
    sidecar.start()
    engine = VllmProcess(model, sidecar.socket, folder / "second.log", True)
    try:
        assert engine.answers(prompts) == reference.own
        assert engine.count(FLASH) > 0
        # Another engine beside it, with prefix caching off, from the DRAM that this one warmed.
        log = folder / "third.log"
        other = VllmProcess(model, sidecar.socket, log, False, "--no-prefix-caching")
        try:
            some = prompts[:GROUP]
            assert other.answers(some) == reference.own[:GROUP]
            assert other.count(DRAM) == usable_tokens(some)
        finally:
            other.close()
    finally:
        engine.close()
