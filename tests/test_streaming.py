"""Blocks that move while the model computes: a real model, a real cache, and what may go wrong.

Whatever happens to a load, the answer is that of a full computation, and what was computed on
blocks that were not verified is seen by nobody.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sim.cached_core import BLOCK_TOKENS, BLOCKS, Cached, prompt
from sim.models import tiny_llama
from sim.sidecar import Sidecar, wait_until

from kvist.cachesvc.worker.loading import LayerLoad
from kvist.engine.loading import LoadGate
from kvist.proto.record import header_length


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture
def cached(model: str, tmp_path: Path) -> Iterator[Cached]:
    made = Cached(model, tmp_path)
    yield made
    made.core.stop()


class Held:
    """In place of a client's stream: waits before it begins, until let go.

    Attributes:
        layers: what the gate was told.
        gate: of the load.
        at_first_layers: done when the first layers of all blocks are there, and no others.
    """

    def __init__(self, cached: Cached) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self.layers: list[int] = []
        self.gate: LoadGate | None = None
        self.at_first_layers: Callable[[], object] = lambda: None
        self._stream = cached.client.stream
        cached.client.stream = self  # type: ignore[method-assign]

    def __call__(self, load: LayerLoad) -> tuple[int, str]:
        def reached(layers: int) -> None:
            self.layers.append(layers)
            if layers == load.cuts[0]:
                self.at_first_layers()
            load.reached(layers)

        assert isinstance(load.reached, functools.partial)
        self.gate = load.reached.args[0]
        self.began.set()
        assert self.go.wait(30)
        return self._stream(LayerLoad(load.wanted, load.outs, load.cuts, reached))


def test_a_prefix_is_loaded_layer_by_layer_and_the_answer_is_that_of_a_full_computation(
    cached: Cached,
) -> None:
    assert cached.ask() == (cached.expected, BLOCKS * BLOCK_TOKENS)
    cached.core.settle()
    loads = cached.core.stats.loads
    assert (loads.ways, loads.undone) == ({"layers": 1, "rising": 0, "blocks": 0}, 0)


@pytest.mark.parametrize("block", [0, 17, BLOCKS - 1])
@pytest.mark.parametrize("place", [0, -1])
def test_what_was_computed_with_a_corrupt_block_reaches_no_answer(
    cached: Cached, block: int, place: int
) -> None:
    cached.payload(block)[place] ^= 0xFF
    assert cached.ask() == (cached.expected, block * BLOCK_TOKENS)
    cached.core.settle()
    assert cached.core.stats.loads.undone == 1
    assert cached.core.stats.misses_tokens["corrupt"] == (BLOCKS - block) * BLOCK_TOKENS
    # Neither the pool nor the cache has kept anything of it.
    assert cached.ask() == (cached.expected, 0)
    for seed in range(2, 7):
        cached.core.generate(prompt(seed), 4, ignore_eos=True)
    cached.core.settle()
    assert cached.ask()[0] == cached.expected


def test_others_in_the_batch_are_not_disturbed_by_a_load_that_fails(cached: Cached) -> None:
    alone = cached.core.generate(prompt(9, 40), 60, ignore_eos=True)
    cached.payload(3)[:] = 0xFF  # NaN, in whatever dtype
    beside = cached.core.submit(prompt(9, 40), 60, ignore_eos=True)
    cached.core.wait(lambda: len(cached.core.deltas[beside]) > 2)
    assert cached.ask()[0] == cached.expected
    assert cached.core.tokens(beside) == alone
    assert cached.core.stats.loads.undone == 1


def test_a_seeded_draw_is_the_same_when_the_first_attempt_was_thrown_away(cached: Cached) -> None:
    more: dict[str, Any] = {"temperature": 1.0, "seed": 7, "ignore_eos": True}
    first = cached.core.generate(prompt(1), 20, cache="bypass", **more)
    cached.payload(5)[100] ^= 1
    assert cached.core.generate(prompt(1), 20, **more) == first
    assert cached.core.stats.loads.undone == 1


def test_a_slot_that_is_reused_amid_the_load_is_torn_and_computed_again(cached: Cached) -> None:
    held = Held(cached)
    request = cached.submit()
    assert held.began.wait(30)
    start = header_length(4 * BLOCK_TOKENS)
    address = cached.payload(20).ctypes.data - start
    generation = ctypes.c_uint64.from_address(address)

    def rewrite() -> None:
        generation.value += 2

    held.at_first_layers = rewrite
    held.go.set()
    assert cached.answer(request) == cached.expected
    cached.core.settle()
    assert cached.core.stats.misses_tokens["torn"] == (BLOCKS - 20) * BLOCK_TOKENS


def test_a_load_that_is_slower_than_the_computation_holds_it_up_and_no_more(
    cached: Cached,
) -> None:
    held = Held(cached)
    request = cached.submit()
    assert held.began.wait(30)
    wait_until(lambda: held.gate is not None and held.gate.waits > 0, "the step to wait")
    assert not cached.core.deltas[request], "nothing is said before the load has ended"
    held.go.set()
    assert cached.answer(request) == cached.expected
    cached.core.settle()
    assert cached.core.stats.loads.gate_waits > 0
    assert held.layers[-1] == cached.core.parts.format.layers


def test_an_abort_amid_a_load_frees_the_pages_when_the_copy_has_ended(cached: Cached) -> None:
    held = Held(cached)
    request = cached.submit()
    assert held.began.wait(30)
    cached.core.send_abort(request)
    held.go.set()
    cached.core.finish(request)
    cached.core.settle()
    cached.core.parts.pages.check({})
    assert cached.ask()[0] == cached.expected


def test_a_sidecar_that_is_killed_amid_a_load_costs_nothing_and_is_a_miss_afterwards(
    model: str, tmp_path: Path
) -> None:
    sidecar = Sidecar(tmp_path / "sidecar")
    sidecar.start()
    cached = Cached(model, tmp_path, sidecar.address)
    held = Held(cached)
    held.at_first_layers = sidecar.kill
    held.go.set()
    assert cached.ask() == (cached.expected, BLOCKS * BLOCK_TOKENS)
    assert cached.ask(prompt(2))[1] == 0
    cached.core.settle()
    assert cached.core.stats.misses_tokens["detached"] > 0
    cached.core.stop()
    sidecar.close()


def test_a_step_does_not_wait_for_loads_that_wait_for_flash(cached: Cached) -> None:
    copiers = cached.core.parts.connector._copiers
    assert copiers is not None
    go = threading.Event()
    for _ in range(2):  # as many as there are loaders, each waiting for a block
        copiers._load_jobs.put(Stuck(go))  # type: ignore[arg-type]
    assert cached.ask() == (cached.expected, BLOCKS * BLOCK_TOKENS)
    go.set()


class Stuck:
    """A load that waits."""

    gate = None
    pages = (0,)
    sequence = SimpleNamespace(rank=0)

    def __init__(self, go: threading.Event) -> None:
        self._go = go

    def take(self, _now: float, _patience_s: float) -> None:
        """No block, after a while."""
        assert self._go.wait(30)


def test_a_step_that_fails_amid_a_load_leaks_no_page_and_the_next_request_is_served(
    cached: Cached,
) -> None:
    runner = cached.core.parts.runner
    forward = runner._model.forward

    def broken(*_arguments: Any) -> Any:
        runner._model.forward = forward  # type: ignore[method-assign]
        raise RuntimeError("the test was asked to fail")

    runner._model.forward = broken  # type: ignore[method-assign,assignment]
    request = cached.submit()
    assert cached.core.last(request).finish_reason == "error"
    cached.core.settle()
    cached.core.parts.pages.check({})
    assert cached.ask() == (cached.expected, BLOCKS * BLOCK_TOKENS)


def test_a_cap_slows_loads_and_changes_no_answer(model: str, tmp_path: Path) -> None:
    cached = Cached(model, tmp_path, cache_load_bytes_per_s=1 << 20)
    assert cached.ask() == (cached.expected, BLOCKS * BLOCK_TOKENS)
    cached.core.settle()
    copied = BLOCKS * cached.core.parts.format.payload_bytes
    loads = cached.core.stats.loads
    # But for what the bucket held in the beginning; on a slow machine the copies take some of it.
    assert loads.load_s > 0.5 * copied / (1 << 20)
    assert loads.throttled_s["load"] > 0
    assert loads.throttled_s["store"] == 0
    cached.core.stop()


def test_told_not_to_overlap_it_loads_whole_blocks_before_the_computation(
    model: str, tmp_path: Path
) -> None:
    cached = Cached(model, tmp_path, cache_overlap=False)
    assert cached.ask() == (cached.expected, BLOCKS * BLOCK_TOKENS)
    cached.core.settle()
    assert cached.core.stats.loads.ways == {"layers": 0, "rising": 0, "blocks": 1}
    cached.core.stop()
