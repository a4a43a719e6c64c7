"""The engine on a device, in Triton's interpreter: the real core, scheduler and wire over the
persistent batch, with copies that are late on purpose. Answers are those of the CPU's model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sim.device_core import BLOCK_TOKENS, WHERE, DeviceCores
from sim.models import tiny_llama

from kvist.engine.models.base import Chunk
from kvist.engine.models.llama import LlamaModel
from kvist.engine.weights import LoadedModel, load_model
from kvist.tiers.hbm import PagePool

ASKED = [([(start + 7 * i * i) % 200 for i in range(length)], count)
         for length, start, count in ((19, 1, 3), (7, 9, 4), (2, 5, 5))]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def loaded(model: str) -> LoadedModel:
    return load_model(model, "float32")


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[DeviceCores]:
    cores = DeviceCores(model, tmp_path)
    yield cores
    cores.stop()


def logits_of(loaded: LoadedModel, text: list[int]) -> torch.Tensor:
    """Of each position of a text, by the CPU's model."""
    pool = PagePool(loaded.block_format(BLOCK_TOKENS, "float32"), 16).tensor
    chunks = [Chunk([token], place, range(16), True) for place, token in enumerate(text)]
    with torch.inference_mode():
        return LlamaModel(loaded).forward(chunks, pool)


@pytest.mark.parametrize(
    ("deterministic", "overlap"), [(False, True), (True, False)], ids=["fast", "invariant"]
)
def test_requests_of_any_arrival_get_the_answers_of_the_cpu(
    start: DeviceCores, loaded: LoadedModel, deterministic: bool, overlap: bool
) -> None:
    core = start(deterministic=deterministic, async_scheduling=overlap)
    ids = [core.submit(*one, ignore_eos=True, logprobs=2) for one in ASKED]
    for (prompt, count), request in zip(ASKED, ids, strict=True):
        answer = core.tokens(request)
        assert len(answer) == count
        logs = torch.log_softmax(logits_of(loaded, prompt + answer), dim=-1)[len(prompt) - 1 : -1]
        assert answer == logs.argmax(-1).tolist()
        told = [one for delta in core.deltas[request] for one in delta.logprobs]
        for row, token, one in zip(logs, answer, told, strict=True):
            values, tokens = row.topk(2)
            assert one.chosen == pytest.approx(float(row[token]), abs=1e-3)
            assert [token for token, _ in one.top] == tokens.tolist()
            assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-3)
    core.settle()


def test_a_sampled_answer_depends_on_no_neighbour_and_not_on_what_was_cached(
    start: DeviceCores,
) -> None:
    core = start(deterministic=True)
    draws = {"temperature": 1.0, "top_k": 30, "seed": 5, "ignore_eos": True}
    (prompt, count), *others = ASKED
    request = core.submit(prompt, count, **draws)
    for other in others:
        core.submit(*other, ignore_eos=True)
    beside = core.tokens(request)
    core.settle()
    assert core.generate(prompt, count, **draws) == beside
    cached = core.deltas[f"r{len(ASKED) + 1}"][0].cached
    assert cached is not None
    assert cached.hbm == 2 * BLOCK_TOKENS


def test_where_it_computes_and_how_is_told_and_is_a_namespace_of_its_own(
    start: DeviceCores,
) -> None:
    cores = [start(), start(deterministic=True), start(device="cpu")]
    told = [core.ready for core in cores]
    assert len({one.namespace for one in told if one is not None}) == 3
    fast, invariant, cpu = told
    assert fast is not None
    assert invariant is not None
    assert cpu is not None
    assert fast.kernels == "Kvist's own in Triton, fast"
    assert invariant.kernels == "Kvist's own in Triton, invariant to the batch"
    assert cpu.device == "CPU"
    assert fast.device.startswith("Triton's" if WHERE == "interpreter" else "NVIDIA")


SERVE_ON_CPU = """
import io, sys, time
from kvist.cachesvc.log import Log
from kvist.engine import core, process
from kvist.engine.config import EngineConfig
from kvist.engine.opening import open_parts

config = EngineConfig(model=sys.argv[1], device="cpu", cache="off", kv_cache_bytes=1 << 20)
parts = open_parts(config, Log(io.StringIO()), time.monotonic)
print([name for name in sys.modules if name == "triton" or name.startswith("triton.")])
"""


def test_an_engine_on_a_cpu_has_no_triton_in_its_process(model: str) -> None:
    command = [sys.executable, "-P", "-c", SERVE_ON_CPU, model]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[]", done.stderr
