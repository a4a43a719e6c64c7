"""A real (tiny) model with the real embedded cache: no answer depends on where its prefix was."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sim.cached_core import BLOCK_TOKENS, SETTINGS, prompt
from sim.core_thread import CoreThread
from sim.models import tiny_llama

from kvist.cachesvc.log import Log
from kvist.engine.config import EngineConfig
from kvist.engine.opening import Parts, limits_of, open_parts, pool_pages
from kvist.engine.request import CACHE_BYPASS
from kvist.engine.weights import load_model
from kvist.proto.errors import ConfigInvalid

Start = Callable[..., CoreThread]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


def settings(model: str, folder: Path, **more: Any) -> dict[str, Any]:
    flash = str(folder / "flash")
    return {"model": model, **SETTINGS, "cache_flash_path": flash, **more}


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[Start]:
    running: list[CoreThread] = []

    def make(**more: Any) -> CoreThread:
        folder = tmp_path / str(len(running))
        folder.mkdir()
        chosen = settings(model, tmp_path, **more)
        log = Log(io.StringIO())
        parts = open_parts(EngineConfig(**chosen), log, time.monotonic)
        del chosen["model"]
        core = CoreThread(folder, parts, **chosen)
        running.append(core)
        return core.start()

    yield make
    for core in running:
        core.stop()


@pytest.fixture
def alone(start: Start) -> Callable[[list[int], int], list[int]]:
    """What a request gets without any cache and with nobody beside it."""
    core = start(cache="off", enable_prefix_caching=False)

    def answer(tokens: list[int], count: int) -> list[int]:
        return core.generate(tokens, count, ignore_eos=True)

    return answer


def ask(core: CoreThread, tokens: list[int], count: int = 12) -> tuple[list[int], tuple[int, ...]]:
    """The answer, and the prompt tokens from HBM, DRAM and flash."""
    request = core.submit(tokens, count, ignore_eos=True)
    answer = core.tokens(request)
    cached = core.deltas[request][0].cached
    assert cached is not None
    return answer, (cached.hbm, cached.dram, cached.flash)


def test_hbm_and_dram_hits_give_the_answer_of_a_full_computation(
    start: Start, alone: Callable[[list[int], int], list[int]]
) -> None:
    core = start()
    expected = alone(prompt(1, 500), 12)
    assert ask(core, prompt(1, 500)) == (expected, (0, 0, 0))
    assert ask(core, prompt(1, 500)) == (expected, (496, 0, 0))
    for seed in range(2, 7):  # push it out of the pool
        ask(core, prompt(seed, 500))
    core.settle()
    assert ask(core, prompt(1, 500)) == (expected, (0, 496, 0))
    core.settle()
    served = sum(core.stats.hits_tokens.values()) + sum(core.stats.misses_tokens.values())
    assert served == core.stats.queries_tokens


def test_a_new_core_takes_a_prefix_from_the_flash_that_an_old_one_left(
    start: Start, alone: Callable[[list[int], int], list[int]]
) -> None:
    old = start(cache_flash_bytes=64 << 20)
    expected = alone(prompt(1, 300), 12)
    ask(old, prompt(1, 300))
    for seed in range(2, 12):  # used twice and pushed out of DRAM, so that it sinks
        ask(old, prompt(1, 300))
        ask(old, prompt(seed, 300))
    old.settle()
    old.stop()
    new = start(cache_flash_bytes=64 << 20)
    answer, (hbm, dram, flash) = ask(new, prompt(1, 300))
    assert answer == expected
    assert (hbm, dram + flash) == (0, 288)


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_requests_give_the_answers_of_a_full_computation(
    start: Start, alone: Callable[[list[int], int], list[int]], overlap: bool
) -> None:
    core = start(async_scheduling=overlap)
    asked = [prompt(seed, 440) for seed in range(4)]
    ids = [core.submit(tokens, 120, ignore_eos=True) for tokens in asked]
    assert [core.tokens(one) for one in ids] == [alone(tokens, 120) for tokens in asked]
    assert core.stats.preemptions["decode"] > 0


def test_requests_that_share_a_step_and_a_prefix_give_the_answers_they_would_give_alone(
    start: Start, alone: Callable[[list[int], int], list[int]]
) -> None:
    core = start()
    asked = [prompt(1, 64) + prompt(seed, 5 + seed) for seed in range(2, 10)]
    ids = [core.submit(tokens, 10, ignore_eos=True) for tokens in asked]
    assert [core.tokens(one) for one in ids] == [alone(tokens, 10) for tokens in asked]
    assert core.stats.hits_tokens["hbm"] == 7 * 64


def test_a_bypass_gives_the_same_answer_and_leaves_nothing(
    start: Start, alone: Callable[[list[int], int], list[int]]
) -> None:
    core = start()
    answer = core.generate(prompt(1, 100), 12, cache=CACHE_BYPASS, ignore_eos=True)
    assert answer == alone(prompt(1, 100), 12)
    assert ask(core, prompt(1, 100))[1] == (0, 0, 0)


def test_a_seeded_draw_is_repeated_with_and_without_the_cache(start: Start) -> None:
    core = start()
    more = {"temperature": 1.0, "seed": 7, "ignore_eos": True}
    first = core.generate(prompt(1, 100), 20, **more)
    assert core.generate(prompt(1, 100), 20, **more) == first
    assert core.generate(prompt(1, 100), 20, cache=CACHE_BYPASS, **more) == first


def test_settings_that_do_not_fit_the_model_are_refused(model: str, tmp_path: Path) -> None:
    loaded = load_model(model, "float32")
    format = loaded.block_format(BLOCK_TOKENS, loaded.dtype)

    def config(**more: Any) -> EngineConfig:
        return EngineConfig(**settings(model, tmp_path, **more))

    with pytest.raises(ConfigInvalid, match="model's 2048"):
        limits_of(config(max_model_len=4096), loaded.config, 1000)
    with pytest.raises(ConfigInvalid, match="--kv-cache-memory-bytes"):
        limits_of(config(max_model_len=2048), loaded.config, 100)
    with pytest.raises(ConfigInvalid, match="needs 8KiB"):
        pool_pages(config(kv_cache_bytes=None, cache="off"), format, lambda _: 100)
    assert limits_of(config(), loaded.config, 100).max_model_len == 1600


@pytest.mark.parametrize("overlap", [False, True])
def test_sampled_answers_do_not_depend_on_the_others_nor_on_where_a_prefix_was(
    start: Start, overlap: bool
) -> None:
    draws = {"temperature": 1.0, "top_p": 0.95, "ignore_eos": True}
    lone = start(deterministic=True, cache="off", enable_prefix_caching=False)
    crowd = start(deterministic=True, async_scheduling=overlap)
    asked = [prompt(1, 200) + prompt(seed, 20 + seed) for seed in range(2, 6)]
    seeds: list[dict[str, Any]] = [{}, {"seed": 5}, {}, {"seed": 6}]
    wanted = [
        lone.generate(one, 40, **draws, **more) for one, more in zip(asked, seeds, strict=True)
    ]
    for _ in range(2):  # the second time from the cache
        ids = [
            crowd.submit(one, 40, **draws, **more)
            for one, more in reversed(list(zip(asked, seeds, strict=True)))
        ]
        assert [crowd.tokens(one) for one in reversed(ids)] == wanted
    assert sum(crowd.stats.hits_tokens.values()) > 0


def test_the_banner_says_what_came_of_the_cache(model: str, tmp_path: Path) -> None:
    def words(**more: Any) -> str:
        log = Log(io.StringIO())
        parts = open_parts(EngineConfig(**settings(model, tmp_path, **more)), log, time.monotonic)
        opened.append(parts)
        return parts.ready().cache

    opened: list[Parts] = []
    try:
        assert words(cache="off") == "HBM only"
        assert words(enable_prefix_caching=False) == "off, in every tier"
        assert words(cache_flash_bytes=0).endswith("flash off")
        room = 1 << 24
        assert words(cache_flash_bytes=room).endswith(f"16MiB in {tmp_path / 'flash'}")
        assert f"flash: in use by process {os.getpid()}, off" in words(cache_flash_bytes=room)
        missing = tmp_path / "none.sock"
        assert words(cache=str(missing)) == (
            f"sidecar at unix:{missing}: serving without it, trying again; not reachable (No such "
            "file or directory); is kvistd running?"
        )
    finally:
        for parts in opened:
            parts.close()
