"""What may go wrong around the vLLM plugin without vLLM: steps that are broken off, memory that
cannot be read, a disk that is late. Nothing wrong is stored then, and nobody waits for ever."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from sim import vllm_fixtures as fixtures
from sim.fake_cache import FakeCache
from sim.sidecar import QUIET
from sim.vllm_engine import Engine, Request, prompt, step
from sim.vllm_memory import NAMESPACE, SIZE

from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.plugins.vllm.chunks import ChunkNames, Courier, Job
from kvist.engine.plugins.vllm.copying import Copier
from kvist.engine.plugins.vllm.lookups import Save
from kvist.engine.plugins.vllm.planning import Planner, Roles
from kvist.proto.keys import NO_KEY, block_keys
from kvist.proto.record import Bytes, Wanted
from kvist.transfer.device import Target

sidecar, engine = fixtures.sidecar, fixtures.engine


def broken_off(copier: Copier, saves: list[Save]) -> None:
    """A step whose forward pass does not end, as vLLM's model runner leaves it."""
    try:
        try:
            raise SystemExit
        finally:
            copier.end_step(saves)
    except SystemExit:
        pass


def test_a_step_that_is_broken_off_stores_nothing_and_neither_do_those_behind_it(
    engine: Engine,
) -> None:
    request = Request("a", prompt(20, 3 * SIZE))
    saves = step(engine.planner, request, 3 * SIZE, [1, 2, 3])
    try:
        raise KeyError
    except KeyError:  # whoever runs vLLM may be handling an error of its own
        engine.copier.begin_step()
        engine.copier.end_step(saves[:1])
    engine.copier.begin_step()
    broken_off(engine.copier, saves[1:2])
    engine.copier.begin_step()
    engine.copier.end_step(saves[2:])
    engine.stored(Request("probe", request.all_token_ids[: SIZE + 1]))
    counts = engine.copier.take_counts()
    assert counts["save_blocks"] == 1
    assert counts["save_drops.step_failed"] == 2


def test_a_step_that_never_came_to_its_forward_pass_is_noticed_by_the_next(engine: Engine) -> None:
    request = Request("a", prompt(21, SIZE))
    engine.copier.begin_step()
    engine.copier.begin_step()
    engine.copier.end_step(step(engine.planner, request, SIZE, [1]))
    assert engine.copier.take_counts() == {"save_drops.step_failed": 1}


def test_a_block_that_cannot_be_copied_out_costs_itself_and_no_step_waits_for_it(
    engine: Engine,
) -> None:
    request = Request("a", prompt(22, 2 * SIZE))
    saves = step(engine.planner, request, 2 * SIZE, [1, 2])
    lost = replace(saves[0], block=10_000)
    for _ in range(2):
        engine.copier.save([lost])
        engine.copier.wait_gathered()
    engine.copier.save(saves)
    engine.copier.wait_gathered()
    engine.stored(request)
    assert engine.copier.take_counts()["save_drops.error"] == 2


def test_a_request_whose_turn_comes_late_is_still_put_off_for_what_fell_back_to_flash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = FakeCache()
    planner = Planner(cache, [NAMESPACE], Roles(True, True))  # type: ignore[arg-type]
    request = Request("a", prompt(23, SIZE + 1))
    (key,) = block_keys(NAMESPACE.digest(), request.all_token_ids, SIZE)
    item = StoreItem(key, NO_KEY, NAMESPACE.digest(), 0, b"", np.zeros(1, np.uint8))
    cache.blocks[key] = item, b""
    cache.flash.add(key)
    monkeypatch.setattr("kvist.engine.plugins.vllm.planning.FLASH_WAIT_S", 0.0)
    planner.arrive(request)  # its block rises, and ...
    cache.flash.add(key)  # ... falls back while others are served, for longer than FLASH_WAIT_S
    monkeypatch.setattr("kvist.engine.plugins.vllm.planning.FLASH_WAIT_S", 60.0)
    assert planner.matched(request, 0) is None
    assert planner.rising
    assert planner.matched(request, 0) == SIZE
    # vLLM asks for all requests, also for those which it then computes whatever is said.
    cache.flash.add(key)
    cache.stuck = True
    unwanted = Request("b", list(request.all_token_ids))
    assert planner.matched(unwanted, 0) is None
    planner.admitted(unwanted, [1, 2], 0)
    assert not planner.rising


class StuckDisk(FakeCache):
    """Waits as long as it may for a chunk on flash, and says how long that was."""

    def __init__(self) -> None:
        super().__init__()
        self.patience: list[float] = []

    def load(
        self,
        wanted: Wanted,
        out: Bytes | Target,  # noqa: ARG002
        deadline: float,
    ) -> str | None:
        self.patience.append(deadline - time.monotonic())
        return "flash_late" if wanted.key in self.flash else "never_stored"


def test_a_disk_that_is_stuck_holds_up_the_loads_of_a_tier_once_and_not_for_each_chunk() -> None:
    cache = StuckDisk()
    names = ChunkNames(NAMESPACE.digest(), NAMESPACE.format)
    chunks = [names.chunk(bytes([at]) * 36, None) for at in range(6)]
    cache.flash = {chunk.key for chunk in chunks[1:] if chunk is not None}
    courier = Courier(cache, np.zeros((6, 64), np.uint8), QUIET)  # type: ignore[arg-type]
    courier.load(Job(None, chunks, list(range(6))))
    courier.drain()
    (job,) = courier.take_ended()
    assert job.reasons == ["never_stored"] + 5 * ["flash_late"]
    assert sum(patience > 0.5 for patience in cache.patience) == 2
    courier.close()
