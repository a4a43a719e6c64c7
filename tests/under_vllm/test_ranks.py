"""Two tensor-parallel workers and LoRA adapters in vLLM, on a tiny random Llama. Runs with vLLM's
Python only (make test-vllm). Two workers wait for each other by spinning, so prompts are short."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from sim.sidecar import Sidecar
from sim.tiny_llama import VOCABULARY, make_tiny_adapter, make_tiny_llama
from sim.vllm_process import ONE_BLOCK_STEPS, VllmProcess, sidecar_metric, usable_tokens

DRAM = 'hit_tokens{"tier": "dram"}'
DRAW = random.Random(23)
PROMPTS = [[DRAW.randrange(VOCABULARY) for _ in range(length)] for length in (150, 270)]
FLAGS = (*ONE_BLOCK_STEPS, "--no-tokenizer", "--no-prefix-caching", "--max-model-len", "1024",
         "--kv-bytes", str(32 << 20))  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path / "sidecar", ["--dram-bytes", "64MiB", "--slot-bytes", "1MiB"])
    made.start()
    yield made
    made.close()


def test_two_ranks_store_their_own_heads_and_load_them_in_another_life(
    tiny: Path, tmp_path: Path, sidecar: Sidecar
) -> None:
    answers = []
    for life in range(2):
        log = tmp_path / f"life-{life}.log"
        engine = VllmProcess(tiny, sidecar.socket, log, True, *FLAGS, "--tensor-parallel-size", "2")
        try:
            assert sidecar_metric(sidecar, "kvist_sessions") == 3  # two workers, one scheduler
            answers.append(engine.answers(PROMPTS, tokens=2))
            hits = engine.count(DRAM)
            time.sleep(1.0)
        finally:
            engine.close()
    assert hits == usable_tokens(PROMPTS)
    assert answers[0] == answers[1]
    # Each block once for each rank.
    blocks = 2 * usable_tokens(PROMPTS) / 128
    assert sidecar_metric(sidecar, "kvist_blocks") == blocks
    assert sidecar_metric(sidecar, "kvist_reserved_slots") == 0


def test_adapters_share_blocks_with_nobody_but_themselves(
    tiny: Path, tmp_path: Path, sidecar: Sidecar
) -> None:
    cat, dog = (
        make_tiny_adapter(tmp_path / name, seed) for seed, name in enumerate(("cat", "dog"))
    )
    engine = VllmProcess(tiny, sidecar.socket, tmp_path / "lora.log", False, *FLAGS, "--lora")
    try:
        said = {}
        for name, adapter in (("none", None), ("cat", cat), ("dog", dog)):
            path = None if adapter is None else str(adapter)
            said[name] = engine.answers(PROMPTS, lora=path)
            assert engine.count(DRAM) == 0
        assert len({str(one) for one in said.values()}) == 3
        time.sleep(1.0)
        for name, adapter in (("none", None), ("cat", cat), ("dog", dog)):
            path = None if adapter is None else str(adapter)
            before = engine.count(DRAM)
            assert engine.answers(PROMPTS, lora=path) == said[name]
            assert engine.count(DRAM) - before == usable_tokens(PROMPTS)
    finally:
        engine.close()
