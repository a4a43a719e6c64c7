"""The threads that copy blocks in take those of a higher class first."""

from __future__ import annotations

import io

import numpy as np
import pytest
from sim.fake_cache import FakeCache
from sim.sidecar import wait_until

from kvist.cachesvc.log import Log
from kvist.engine import copying
from kvist.engine.loading import LoadGate, LoadJob
from kvist.engine.priority import BATCH, INTERACTIVE, REALTIME
from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.sequence import Limits, Sequence, State
from kvist.transfer.pages import HostPages

SIZE, PAGE_BYTES = 4, 64


def loading(number: int, priority: int) -> Sequence:
    """A request of a block and a token whose block is being loaded."""
    tokens = [100 * number + token for token in range(SIZE + 1)]
    request = NewRequest(str(number), tokens, SamplingParams())
    made = Sequence(request, number, Limits(64, SIZE), bytes(32), 0.0, priority)
    made.state = State.LOADING
    return made


@pytest.mark.parametrize("by_layers", [True, False])
def test_loads_of_a_higher_class_go_first_then_those_that_were_asked_for_first(
    monkeypatch: pytest.MonkeyPatch, by_layers: bool
) -> None:
    monkeypatch.setattr(copying, "LOADERS", 1)
    pool = np.zeros((16, PAGE_BYTES), np.uint8)
    cache = FakeCache()
    cache.gate.clear()
    copies = HostPages(lambda page: pool[page])
    copiers = copying.Copiers(cache, copies, Log(io.StringIO()), lambda: 1.0)
    jobs = []
    classes = [BATCH, BATCH, INTERACTIVE, BATCH, REALTIME, INTERACTIVE, REALTIME]
    for number, priority in enumerate(classes):
        jobs.append(LoadJob(loading(number, priority), 0, [number], 0.0))
        if by_layers:
            jobs[-1].gate, jobs[-1].cuts = LoadGate(), (1,)
        copiers.load(jobs[-1])
        # The first one keeps the thread busy until all others wait.
        wait_until(lambda: jobs[0].began_s == 1.0, "a thread to take it up")
    cache.gate.set()
    ended: list[int] = []
    while len(ended) < len(jobs):
        copiers.wait(10.0)
        result = copiers.take()
        assert isinstance(result, copying.Loaded)
        ended.append(result.sequence.number)
    copiers.close()
    assert ended == [0, 4, 6, 2, 5, 1, 3]
