"""Two real engine cores at one real sidecar: what both need at once is computed once."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sim.core_thread import CoreThread
from sim.models import tiny_llama
from sim.sidecar import QUIET, Sidecar, wait_until
from test_core_cache import BLOCK_TOKENS, prompt, settings

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.control import GrpcControl
from kvist.engine.config import EngineConfig
from kvist.engine.flights import Flights
from kvist.engine.opening import namespace_of, open_parts
from kvist.engine.weights import load_model
from kvist.proto.keys import BlockKey, block_keys

PROMPT = 600
# Copies behind the step may hold a quarter of the pool: here that is more than the prompt's blocks,
# so none is dropped however slow the machine is at the moment.
POOL_BYTES = 2 << 20
USABLE = (PROMPT - 1) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path / "sidecar", ["--dram-bytes", "16MiB"])
    made.start()
    yield made
    made.close()


@pytest.fixture
def start(model: str, tmp_path: Path, sidecar: Sidecar) -> Iterator[Callable[[], CoreThread]]:
    running: list[CoreThread] = []

    def make() -> CoreThread:
        folder = tmp_path / str(len(running))
        folder.mkdir()
        chosen = settings(model, tmp_path, cache=sidecar.address, kv_cache_bytes=POOL_BYTES)
        parts = open_parts(EngineConfig(**chosen), Log(io.StringIO()), time.monotonic)
        del chosen["model"]
        core = CoreThread(folder, parts, **chosen)
        running.append(core)
        return core.start()

    yield make
    for core in running:
        core.stop()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that tests run on may be slow at any moment; what is counted must not be."""
    monkeypatch.setattr(Flights, "patience_s", lambda _self, _tokens: 60.0)


def counter(sidecar: Sidecar, name: str) -> float:
    lines = sidecar.get("metrics").splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def test_an_identical_prompt_at_two_engines_at_once_is_computed_once(
    sidecar: Sidecar, start: Callable[[], CoreThread]
) -> None:
    cores = [start(), start()]
    tokens = prompt(1, PROMPT)
    requests = [core.submit(tokens, 8, ignore_eos=True) for core in cores]
    answers = [core.tokens(one) for core, one in zip(cores, requests, strict=True)]
    assert answers[0] == answers[1]
    for core in cores:
        core.settle()
    computed = sorted(core.stats.computed_tokens for core in cores)
    assert computed == [PROMPT - USABLE, PROMPT]
    hits = [core.stats.hits_tokens.get("dram", 0) for core in cores]
    assert sorted(hits) == [0, USABLE]
    assert counter(sidecar, 'kvist_flight_waits_total{outcome="got"}') == 1
    assert counter(sidecar, "kvist_flight_tokens_total") == USABLE


class Other:
    """A worker that claims what it will not compute."""

    def __init__(self, sidecar: Sidecar, model: str) -> None:
        loaded = load_model(model, "float32")
        namespace = namespace_of(loaded, BLOCK_TOKENS, "float32")
        self.client = CacheClient(GrpcControl(sidecar.address), namespace, "other", QUIET)
        self.client.start()
        assert self.client.wait_attached(10.0)
        self._digest = namespace.digest()

    def keys(self, tokens: list[int]) -> list[BlockKey]:
        return block_keys(self._digest, tokens, BLOCK_TOKENS)


def test_who_waits_holds_up_nobody_and_goes_on_when_the_other_worker_dies(
    sidecar: Sidecar, start: Callable[[], CoreThread], model: str
) -> None:
    core, other = start(), Other(sidecar, model)
    tokens = prompt(2, PROMPT)
    keys = other.keys(tokens)
    other.client.claim(keys)
    wait_until(lambda: other.client.claimant(keys[-1]) == "self", "the claim")
    waiting = core.submit(tokens, 4, ignore_eos=True)
    passing = core.submit(prompt(3, 100), 4, ignore_eos=True)
    assert len(core.tokens(passing)) == 4
    assert not core.ended(waiting)
    assert core.stats.waiting == 1
    other.client.close()
    assert len(core.tokens(waiting)) == 4
    core.settle()
    assert core.stats.misses_tokens["flight_late"] == USABLE
    assert sum(core.stats.misses_tokens.values()) == PROMPT + 100
    assert counter(sidecar, 'kvist_flight_waits_total{outcome="lost"}') == 1


def test_a_waiting_request_that_is_aborted_leaves_nothing(
    sidecar: Sidecar, start: Callable[[], CoreThread], model: str
) -> None:
    core, other = start(), Other(sidecar, model)
    tokens = prompt(4, PROMPT)
    other.client.claim(other.keys(tokens))
    waiting = core.submit(tokens, 4, ignore_eos=True)
    core.wait(lambda: core.stats.waiting == 1)
    core.send_abort(waiting)
    assert core.last(waiting).finish_reason == "abort"
    core.settle()
    assert core.parts.connector.deferred == 0
    other.client.close()
