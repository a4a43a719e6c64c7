"""A load is shared by threads: every block once, in order, and nothing counts after a miss."""

from __future__ import annotations

import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.engine.loading import LoadJob
from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.sequence import Limits, Sequence


def job(blocks: int) -> LoadJob:
    request = NewRequest("r", [1, 2, 3], SamplingParams())
    sequence = Sequence(request, 0, Limits(1024, 4), None, 0.0)
    return LoadJob(sequence, 0, list(range(blocks)), 0.0)


@settings(max_examples=50, deadline=None)
@given(blocks=st.integers(1, 12), lost=st.sets(st.integers(0, 11)), threads=st.integers(1, 4))
def test_exactly_one_thread_ends_a_job_and_only_blocks_before_the_first_miss_count(
    blocks: int, lost: set[int], threads: int
) -> None:
    shared = job(blocks)
    taken: list[int] = []
    ended: list[int] = []

    def work() -> None:
        while (got := shared.take(10.0, 5.0)) is not None:
            block, deadline = got
            assert deadline == 15.0
            taken.append(block)
            if shared.give(block, "corrupt" if block in lost else None):
                ended.append(block)

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()

    first_lost = min((block for block in lost if block < blocks), default=blocks)
    assert len(ended) == 1
    assert sorted(taken) == list(range(len(taken)))
    assert shared.blocks == first_lost
    assert shared.reason == ("corrupt" if first_lost < blocks else "")
