"""The engine on a device, in Triton's interpreter: the real core, scheduler and wire over the
persistent batch, with copies that are late on purpose. Answers are those of the CPU's model."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sim.core_thread import CoreThread
from sim.models import tiny_llama

from kvist.cachesvc.log import Log
from kvist.engine.config import EngineConfig
from kvist.engine.models.base import Chunk
from kvist.engine.models.llama import LlamaModel
from kvist.engine.opening import open_parts
from kvist.engine.weights import LoadedModel, load_model
from kvist.tiers.hbm import PagePool

BLOCK_TOKENS = 8
Start = Callable[..., CoreThread]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def loaded(model: str) -> LoadedModel:
    return load_model(model, "float32")


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[Start]:
    running: list[CoreThread] = []

    def make(**more: Any) -> CoreThread:
        folder = tmp_path / str(len(running))
        folder.mkdir()
        chosen = {
            "device": "interpreter",
            "dtype": "float32",
            "block_tokens": BLOCK_TOKENS,
            "max_model_len": 128,
            "max_num_batched_tokens": 24,
            "max_num_seqs": 4,
            "kv_cache_bytes": 1 << 20,
            "cache": "off",
            **more,
        }
        log = Log(io.StringIO())
        parts = open_parts(EngineConfig(model=model, **chosen), log, time.monotonic)
        core = CoreThread(folder, parts, **chosen)
        running.append(core)
        return core.start()

    yield make
    for core in running:
        core.stop()


def prompt(length: int, start: int = 1) -> list[int]:
    return [(start + 7 * i * i) % 200 for i in range(length)]


def greedy(loaded: LoadedModel, tokens: list[int], count: int) -> list[int]:
    """What the CPU's model answers."""
    text, model = list(tokens), LlamaModel(loaded)
    pool = PagePool(loaded.block_format(BLOCK_TOKENS, "float32"), 16).tensor
    with torch.inference_mode():
        for _ in range(count):
            logits = model.forward([Chunk(text, 0, range(16), True)], pool)
            text.append(int(logits.argmax()))
    return text[len(tokens) :]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "invariant"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapping", "step by step"])
def test_requests_of_any_arrival_get_the_answers_of_the_cpu(
    start: Start, loaded: LoadedModel, deterministic: bool, overlap: bool
) -> None:
    core = start(deterministic=deterministic, async_scheduling=overlap)
    asked = [(prompt(19), 6), (prompt(30, 5), 4), (prompt(5, 9), 7), (prompt(7, 3), 5)]
    ids = [core.submit(*one, ignore_eos=True) for one in asked]
    answers = [core.tokens(one) for one in ids]
    assert answers == [greedy(loaded, *one) for one in asked]
    core.settle()
