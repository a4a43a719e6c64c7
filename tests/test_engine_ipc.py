"""The wire between the API process and the core: order, routing, aborts, ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kvist.engine.ipc import ApiLink, CoreGone, CoreLink
from kvist.engine.request import (
    Abort,
    CachedTokens,
    CoreStats,
    Delta,
    Fatal,
    Loading,
    NewRequest,
    Outputs,
    Ready,
    SamplingParams,
    TokenLogprobs,
)

READY = Ready(128, 16, 8, 1024, "float32", "bfloat16", "ab")


def ask(name: str) -> NewRequest:
    return NewRequest(name, [1, 2, 3], SamplingParams(seed=-1, stop_token_ids=(7,)))


class Wire:
    """Both ends in one process, the core's on the test's own calls."""

    def __init__(self, folder: Path) -> None:
        endpoint = f"ipc://{folder}/core"
        self.seen: list[Outputs] = []
        self.api = CoreLink(endpoint, self.seen.append)
        self.core = ApiLink(endpoint)
        self.core.send(READY)

    def send(self, *deltas: Delta) -> None:
        self.core.send(Outputs(list(deltas), CoreStats(steps=1)))

    def close(self) -> None:
        self.core.close()
        self.api.close()


def play(folder: Path, scene: Callable[[Wire], Coroutine[Any, Any, None]]) -> None:
    """Run a scene over a fresh wire whose core has said that it is ready."""

    async def run() -> None:
        wire = Wire(folder)
        try:
            assert await wire.api.receive() == READY
            await asyncio.wait_for(scene(wire), 10)
        finally:
            wire.close()

    asyncio.run(run())


def test_messages_cross_unchanged_and_in_order(tmp_path: Path) -> None:
    async def scene(wire: Wire) -> None:
        wire.api.submit([ask("a"), ask("b")])
        wire.api.abort("a")
        got: list[object] = []
        while len(got) < 3:
            got += wire.core.receive(1.0)
        assert got == [ask("a"), ask("b"), Abort("a")]
        logprobs = [TokenLogprobs(-0.5, [(5, -0.5)])]
        delta = Delta("b", [5], logprobs, "stop", None, CachedTokens(1, 2, 3), 0.5, 0.25)
        wire.send(delta)
        assert await wire.api.receive() == Outputs([delta], CoreStats(steps=1))
        assert wire.seen[-1].deltas == [delta]
        wire.core.send(Loading(3, 7))
        assert await wire.api.receive() == Loading(3, 7)
        wire.core.send(Fatal("no memory"))
        assert await wire.api.receive() == Fatal("no memory")

    play(tmp_path, scene)


def test_each_stream_gets_its_own_requests_and_ends_after_their_last(tmp_path: Path) -> None:
    async def scene(wire: Wire) -> None:
        with wire.api.submit([ask("a"), ask("b")]) as both, wire.api.submit([ask("c")]) as one:
            wire.send(Delta("a", [1]), Delta("c", [2]), Delta("b", [3], finish_reason="stop"))
            wire.send(
                Delta("a", [4], finish_reason="length"), Delta("c", [5], finish_reason="stop")
            )
            await wire.api.receive()
            await wire.api.receive()
            assert [delta.tokens async for delta in both] == [[1], [3], [4]]
            assert [delta.tokens async for delta in one] == [[2], [5]]
        assert wire.api.live == 0

    play(tmp_path, scene)


def test_leaving_a_stream_aborts_what_runs_and_deltas_on_the_way_are_dropped(
    tmp_path: Path,
) -> None:
    async def scene(wire: Wire) -> None:
        with wire.api.submit([ask("a"), ask("b")]) as stream:
            wire.send(Delta("b", [1], finish_reason="stop"))
            await wire.api.receive()
            assert (await anext(stream)).id == "b"
        got: list[object] = []
        while len(got) < 3:
            got += wire.core.receive(1.0)
        assert got[2:] == [Abort("a")]
        wire.send(Delta("a", [2]))
        await wire.api.receive()
        assert wire.api.live == 0

    play(tmp_path, scene)


def test_a_failure_ends_every_stream_and_the_first_reason_stays(tmp_path: Path) -> None:
    async def scene(wire: Wire) -> None:
        with wire.api.submit([ask("a"), ask("b")]) as stream:
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            wire.api.fail("it burned")
            wire.api.fail("it drowned")
            with pytest.raises(CoreGone, match="burned"):
                await waiting
        with pytest.raises(CoreGone, match="burned"):
            wire.api.submit([ask("c")])

    play(tmp_path, scene)


def test_the_core_waits_as_long_as_it_is_told(tmp_path: Path) -> None:
    async def scene(wire: Wire) -> None:
        assert wire.core.receive() == []
        assert wire.core.receive(0.01) == []
        got: list[object] = []
        waiter = threading.Thread(target=lambda: got.extend(wire.core.receive(None)))
        waiter.start()
        wire.api.submit([ask("a")])
        await asyncio.to_thread(waiter.join, 5)
        assert got == [ask("a")]

    play(tmp_path, scene)


def test_a_request_without_a_core_is_refused_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        link = CoreLink(f"ipc://{tmp_path}/core", lambda _outputs: None)
        with pytest.raises(CoreGone, match="not connected"):
            link.submit([ask("a")])
        link.close()

    asyncio.run(run())
