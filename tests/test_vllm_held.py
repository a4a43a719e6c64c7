"""What the vLLM plugin knows of where its blocks are, and ranks with blocks of their own: without
vLLM, on a real sidecar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sim.sidecar import QUIET, Sidecar, wait_until
from sim.vllm_engine import BOTH, Engine, Request, prompt
from sim.vllm_memory import BLOCKS, LAYERS, NAMESPACE, SIZE, vllm_memory

from kvist.engine.plugins.vllm.copying import Copier
from kvist.engine.plugins.vllm.held import Change, Held
from kvist.engine.plugins.vllm.memory import BlockMemory, map_memory
from kvist.engine.plugins.vllm.planning import Planner
from kvist.proto.keys import BlockKey, block_keys


def watched(engine: Engine, now: Callable[[], float]) -> Held[tuple[str, int]]:
    """Watches all that the engine stores or finds, by request and place."""
    held: Held[tuple[str, int]] = Held(engine.clients[0], now)

    def watch(request: Request, at: int, keys: list[BlockKey]) -> None:
        held.watch((request.request_id, at), keys)

    engine.planner.watch = watch
    return held


def test_blocks_that_come_move_and_go_are_told_once_each(tmp_path: Path) -> None:
    flash = ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "8MiB"]
    flags = ["--slot-bytes", "16KiB", *flash, "--flash-admission", "always"]
    sidecar = Sidecar(tmp_path / "sidecar", flags)
    sidecar.start()
    engine = Engine(sidecar)
    now = 0.0
    held = watched(engine, lambda: now)
    request = Request("a", prompt(1, 3 * SIZE + 1))
    engine.compute(request, [1, 2, 3, 4])
    engine.stored(request)
    blocks = [("a", at) for at in range(3)]
    assert held.look() == [Change(block, None, "dram") for block in blocks]
    assert held.look() == []
    sidecar.stop()  # what is in DRAM only is written to flash
    sidecar.start()
    wait_until(lambda: engine.clients[0].state == "attached", "a new session")
    assert held.look() == [Change(block, "dram", "flash") for block in blocks]
    held.forget()
    assert held.look() == [Change(block, "flash", None) for block in blocks]
    # Found again, in whatever tier it is by then; and gone with the sidecar.
    again = Request("b", list(request.all_token_ids))
    wait_until(lambda: engine.planner.matched(again, 0) == 3 * SIZE, "blocks to rise")
    assert engine.load(again, [5, 6, 7, 8]).came == 3
    assert [change.now for change in held.look()] == ["dram"] * 3
    sidecar.kill()
    wait_until(lambda: engine.clients[0].state == "detached", "the end")
    assert held.look() == []  # it may be back in a moment, with what is on flash
    now = 11.0
    assert held.look() == [Change(("b", at), "dram", None) for at in range(3)]
    engine.close()
    sidecar.close()


def test_what_is_watched_is_bounded_and_what_never_comes_is_given_up(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path, ["--slot-bytes", "16KiB"])
    sidecar.start()
    engine = Engine(sidecar)
    request = Request("a", prompt(2, 5 * SIZE + 1))
    engine.compute(request, [1, 2, 3, 4, 5, 6])
    engine.stored(request)
    keys = block_keys(NAMESPACE.digest(), request.all_token_ids, SIZE)
    now = 0.0
    held: Held[int] = Held(engine.clients[0], lambda: now, most=3)
    for at, key in enumerate(keys):
        held.watch(at, [key])
    held.watch(99, [BlockKey(bytes(16))])
    changes = held.look()
    assert changes[:5] == [Change(at, None, "dram") for at in range(5)]
    assert changes[5:] == [Change(at, "dram", None) for at in range(2)]
    assert not held.look()
    now = 1e3
    assert not held.look()  # the last look for the one that never came
    engine.close()
    sidecar.close()


@pytest.mark.parametrize("late", [0, 1], ids=["first rank", "second rank"])
def test_each_rank_stores_its_own_blocks_and_a_load_comes_as_far_as_the_worst(
    tmp_path: Path, late: int
) -> None:
    sidecar = Sidecar(tmp_path, ["--slot-bytes", "16KiB"])
    sidecar.start()
    spaces = [replace(NAMESPACE, compute=f"vllm-test rank={rank}of2") for rank in range(2)]
    planner = Planner(sidecar.client("scheduler", spaces[0]), spaces, BOTH)
    memories, copiers = [], []
    for rank, space in enumerate(spaces):
        placement, caches = vllm_memory()
        runs = map_memory(placement, BLOCKS, caches)
        draw = np.random.default_rng(rank)
        runs[:, 1:5] = draw.integers(0, 256, (LAYERS, 4, runs.shape[2]))
        memories.append(runs)
        copiers.append(Copier(sidecar.client(f"rank{rank}", space), BlockMemory(runs), QUIET))
    request = Request("a", prompt(3, 4 * SIZE + 1))
    planner.arrive(request)
    state = SimpleNamespace(get_block_ids={"a": ([1, 2, 3, 4, 5],)}.__getitem__)
    output = SimpleNamespace(
        num_scheduled_tokens={"a": 4 * SIZE + 1}, kv_connector_block_state=state
    )
    planner.admitted(request, [1, 2, 3, 4, 5], 0)
    for copier, work in zip(copiers, planner.plan(output), strict=True):
        copier.save(work.saves)
        copier.wait_gathered()

    again = Request("b", list(request.all_token_ids))
    wait_until(lambda: planner.matched(again, 0) == 4 * SIZE, "blocks of both ranks")
    planner.admitted(again, [11, 12, 13, 14, 15], 4 * SIZE)
    works = planner.plan(SimpleNamespace(num_scheduled_tokens={}))
    for rank, (copier, work) in enumerate(zip(copiers, works, strict=True)):
        copier.load(work.loads[0])
        (job,) = copier.take_ended(10.0)
        assert job.came == 4
        assert np.array_equal(memories[rank][:, 11:15], memories[rank][:, 1:5])
    assert not np.array_equal(memories[0][:, 11:15], memories[1][:, 11:15])

    # One rank's last two blocks do not come: the request has two, and is computed from there.
    planner.loaded({"b": [(2, "corrupt") if late == 0 else (4, "")]})
    assert planner.matched(again, 0) is not None
    assert not planner.take_counts().get("miss_tokens.corrupt")  # the other rank is still loading
    planner.loaded({"b": [(2, "corrupt") if late == 1 else (4, "")]})
    counts = planner.take_counts()
    assert counts["hit_tokens.dram"] == 2 * SIZE
    assert counts["miss_tokens.corrupt"] == 2 * SIZE
    assert planner.matched(again, 0) == 0
    planner.close()
    for copier in copiers:
        copier.close()
    sidecar.close()
