"""The core's loop: the real wire, the real schedule, answers that do not depend on the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sim.core_thread import CoreThread, make_parts
from sim.fake_cache import FakeCache
from sim.fake_model import BLOCK_TOKENS, FORMAT, FakeDeviceModel, FakeModel, config, continuation

from kvist.engine.core import FAILED_STEPS_MAX, LOADING_MESSAGES, loading_sender
from kvist.engine.opening import Parts
from kvist.engine.priority import BATCH, INTERACTIVE, REALTIME
from kvist.engine.request import CACHE_BYPASS, Abort, CoreStats, FromCore, Loading
from kvist.proto.keys import Namespace

NAMESPACE = Namespace("fake", FORMAT, "none", "float32")


class FakeCore(CoreThread):
    """A core with the fake model within reach."""

    def __init__(self, folder: Path, model: FakeModel, parts: Parts, **config: Any) -> None:
        super().__init__(folder, parts, **config)
        self.model = model
        self.overlaps = config["async_scheduling"]


Start = Callable[..., FakeCore]


def prompt(length: int, start: int = 1) -> list[int]:
    return [(start + 7 * i) % 251 for i in range(length)]


@pytest.fixture(params=["step by step", "overlapping", "on a device"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Start cores, of both kinds; they end with the test."""
    running: list[FakeCore] = []

    def make(
        cache: FakeCache | None = None, pages: int = 64, eos: tuple[int, ...] = (), **more: Any
    ) -> FakeCore:
        folder = tmp_path / str(len(running))
        folder.mkdir()
        kind = FakeDeviceModel if request.param == "on a device" else FakeModel
        model = kind(config(eos=eos))
        more.setdefault("async_scheduling", request.param != "step by step")
        core = FakeCore(folder, model, make_parts(model, NAMESPACE, pages, cache), **more)
        running.append(core)
        return core.start()

    yield make
    for core in running:
        core.stop()


def sums_agree(stats: CoreStats) -> bool:
    served = sum(stats.hits_tokens.values()) + sum(stats.misses_tokens.values())
    return served == stats.queries_tokens


def test_ready_tells_the_limits(start: Start) -> None:
    ready = start(pages=32).ready
    assert ready is not None
    assert (ready.max_model_len, ready.block_tokens, ready.pages) == (128, BLOCK_TOKENS, 32)
    assert ready.namespace == NAMESPACE.digest().hex()


def test_many_requests_at_once_get_what_each_would_get_alone(start: Start) -> None:
    core = start(max_num_batched_tokens=24, max_num_seqs=5)
    asked = [(prompt(5 + 3 * i, i), 4 + i) for i in range(8)]
    ids = [core.submit(*one) for one in asked]
    assert [core.tokens(one) for one in ids] == [continuation(*one) for one in asked]
    core.settle()
    assert core.stats.generated_tokens == sum(count for _, count in asked)
    assert sums_agree(core.stats)


def test_the_pool_serves_a_prefix_and_the_answer_is_the_same(start: Start) -> None:
    core = start()
    first, second = core.generate(prompt(30), 6), core.generate(prompt(30), 6)
    assert first == second == continuation(prompt(30), 6)
    cached = core.deltas["r2"][0].cached
    assert cached is not None
    assert (cached.hbm, cached.total) == (28, 28)
    assert core.stats.hits_tokens == {"hbm": 28}


def test_the_output_of_one_request_is_a_prefix_for_the_next(start: Start) -> None:
    core = start()
    answer = core.generate(prompt(10), 10)
    core.generate(prompt(10) + answer + prompt(3), 2)
    cached = core.deltas["r2"][0].cached
    assert cached is not None
    # 10 + 10 tokens, of which the last has no KV yet.
    assert cached.hbm == 16


def test_a_new_core_takes_from_the_cache_what_an_old_one_computed(start: Start) -> None:
    cache = FakeCache()
    old = start(cache)
    expected = old.generate(prompt(30), 6)
    old.settle()
    assert old.stats.stored_blocks == 8, "7 of the prompt, one with the output's first tokens"
    new = start(cache)
    assert new.generate(prompt(30), 6) == expected
    cached = new.deltas["r1"][0].cached
    assert cached is not None
    assert (cached.dram, cached.total) == (28, 28)
    assert new.model.computed == 2 + 5
    new.settle()
    assert (new.stats.stored_blocks, sums_agree(new.stats)) == (0, True)


def test_blocks_after_a_corrupt_one_are_computed_and_the_answer_is_the_same(start: Start) -> None:
    cache = FakeCache()
    old = start(cache)
    expected = old.generate(prompt(30), 6)
    old.settle()
    cache.corrupt = {list(cache.blocks)[3]}
    new = start(cache)
    assert new.generate(prompt(30), 6) == expected
    assert new.stats.misses_tokens == {"corrupt": 16, "tail": 2}


def test_others_run_while_a_request_waits_for_its_blocks(start: Start) -> None:
    cache = FakeCache()
    old = start(cache)
    old.generate(prompt(30), 2)
    old.settle()
    new = start(cache)
    cache.gate.clear()
    slow = new.submit(prompt(30), 2)
    assert new.generate(prompt(9, 99), 5) == continuation(prompt(9, 99), 5)
    assert not new.ended(slow)
    assert new.stats.waiting == 1
    cache.gate.set()
    assert new.tokens(slow) == continuation(prompt(30), 2)


def test_a_request_aborted_while_it_loads_frees_its_pages(start: Start) -> None:
    cache = FakeCache()
    old = start(cache)
    old.generate(prompt(30), 2)
    old.settle()
    new = start(cache)
    cache.gate.clear()
    slow = new.submit(prompt(30), 2)
    new.wait(lambda: new.stats.waiting == 1)
    new.send(Abort(slow))
    assert new.last(slow).finish_reason == "abort"
    cache.gate.set()
    new.settle()
    assert new.generate(prompt(30), 2) == continuation(prompt(30), 2)


def test_a_sidecar_that_is_gone_costs_hits_and_no_answer(start: Start) -> None:
    cache = FakeCache()
    cache.state = "detached"
    core = start(cache)
    assert core.generate(prompt(30), 6) == continuation(prompt(30), 6)
    assert core.stats.cache_state == "detached"
    assert core.stats.misses_tokens == {"detached": 28, "tail": 2}


def test_requests_that_lose_their_pages_lose_no_token(start: Start) -> None:
    core = start(pages=8, max_num_batched_tokens=64)
    ids = [core.submit(prompt(12, i), 16) for i in range(3)]
    assert [core.tokens(one) for one in ids] == [continuation(prompt(12, i), 16) for i in range(3)]
    assert core.stats.preemptions["decode"] > 0
    core.settle()


def test_an_abort_frees_everything_and_the_others_go_on(start: Start) -> None:
    core = start(max_num_seqs=2)
    long = [core.submit(prompt(10, i), 200) for i in range(3)]
    core.wait(lambda: bool(core.deltas[long[0]]))
    for one in long[1:]:
        core.send(Abort(one))
    core.send(Abort("nobody"))
    assert core.tokens(long[0]) == continuation(prompt(10, 0), 200)
    assert core.last(long[2]).finish_reason == "abort"
    core.settle()


def test_a_bypass_leaves_no_trace_in_any_tier(start: Start) -> None:
    cache = FakeCache()
    core = start(cache)
    for _ in range(2):
        answer = core.generate(prompt(30), 6, cache=CACHE_BYPASS)
        assert answer == continuation(prompt(30), 6)
    core.settle()
    assert cache.blocks == {}
    assert (core.stats.queries_tokens, core.stats.computed_tokens) == (0, 60)
    assert core.parts.pages.registered == 0


@pytest.mark.parametrize("total", [1, 7, 50, 272, 5000])
def test_a_load_is_told_to_its_end_in_few_messages(total: int) -> None:
    sent: list[FromCore] = []
    tell = loading_sender(sent.append)
    for done in range(1, total + 1):
        tell(done, total)
    assert sent[-1] == Loading(total, total)
    assert len(sent) == min(total, LOADING_MESSAGES)


def test_tenants_do_not_share(start: Start) -> None:
    cache = FakeCache()
    core = start(cache)
    core.generate(prompt(30), 2, salt="a")
    core.generate(prompt(30), 2, salt="b")
    core.generate(prompt(30), 2, salt="a")
    assert core.stats.hits_tokens == {"hbm": 28}


def test_without_prefix_caching_nothing_is_reused(start: Start) -> None:
    core = start(enable_prefix_caching=False)
    for _ in range(2):
        core.generate(prompt(30), 2)
    assert core.stats.misses_tokens == {"no_cache": 56, "tail": 4}


def test_an_end_token_is_sent_and_ends_the_answer(start: Start) -> None:
    expected = continuation(prompt(6), 12)
    core = start(eos=(expected[4],))
    one = core.submit(prompt(6), 12)
    assert core.tokens(one) == expected[: expected.index(expected[4]) + 1]
    assert core.last(one).finish_reason == "stop"
    ignoring = core.submit(prompt(6), 12, ignore_eos=True)
    assert core.tokens(ignoring) == expected
    assert core.last(ignoring).finish_reason == "length"


def test_a_first_delta_tells_its_times(start: Start) -> None:
    core = start()
    core.generate(prompt(6), 3)
    first, second, _ = core.deltas["r1"]
    assert first.queue_s >= 0
    assert first.prefill_s > 0
    assert first.cached is not None
    assert second.cached is None


def test_logprobs_come_with_each_token(start: Start) -> None:
    core = start()
    core.generate(prompt(6), 2, logprobs=2)
    for delta in core.deltas["r1"]:
        (logprobs,) = delta.logprobs
        assert logprobs.top[0] == (delta.tokens[0], logprobs.chosen)
        assert len(logprobs.top) == 2


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], "no tokens"),
        ([1] * 400, "max_model_len"),
        ([1, 100_000], "token id"),
        ([-1], "token id"),
    ],
)
def test_a_request_that_cannot_be_computed_is_told_why(
    start: Start, tokens: list[int], text: str
) -> None:
    core = start()
    delta = core.last(core.submit(tokens, 1))
    assert delta.finish_reason == "error"
    assert text in (delta.error or "")
    assert core.generate(prompt(5), 2) == continuation(prompt(5), 2)


def test_a_failed_step_ends_its_requests_and_not_the_core(start: Start) -> None:
    core = start()
    core.model.fail_next = FAILED_STEPS_MAX - 1
    for _ in range(FAILED_STEPS_MAX - 1):
        delta = core.last(core.submit(prompt(9), 1))
        assert delta.finish_reason == "error"
        assert "asked to fail" in (delta.error or "")
    assert core.generate(prompt(9), 2) == continuation(prompt(9), 2)
    core.settle()


def test_a_core_whose_every_step_fails_gives_up(start: Start) -> None:
    core = start()
    core.model.fail_next = 100
    for _ in range(FAILED_STEPS_MAX - 1):
        core.generate(prompt(9), 2)
    core.submit(prompt(9), 2)
    core.wait(lambda: core.error is not None)
    assert "in a row" in str(core.error)


def test_steps_that_overlap_compute_no_token_beyond_a_length_that_is_known(start: Start) -> None:
    core = start()
    ids = [core.submit(prompt(5 + i, i), 6) for i in range(4)]
    core.finish(*ids)
    core.settle()
    assert core.stats.wasted_tokens == 0


def test_an_end_token_costs_one_token_when_steps_overlap_and_none_when_not(start: Start) -> None:
    expected = continuation(prompt(6), 12)
    core = start(eos=(expected[4],))
    core.generate(prompt(6), 12)
    core.settle()
    core.generate(prompt(30), 1)
    assert core.stats.wasted_tokens == core.overlaps


def test_a_seeded_draw_survives_a_preemption(start: Start) -> None:
    draws = {"temperature": 30.0, "ignore_eos": True}
    roomy, tight = start(pages=64), start(pages=8)
    ids = [[core.submit(prompt(12, i), 16, seed=i, **draws) for i in range(3)]
           for core in (roomy, tight)]  # fmt: skip
    wanted = [roomy.tokens(one) for one in ids[0]]
    assert [tight.tokens(one) for one in ids[1]] == wanted
    assert tight.stats.preemptions["decode"] > 0 == roomy.stats.preemptions["decode"]
    assert len({tuple(one) for one in wanted}) == 3


def test_a_realtime_request_takes_the_seat_of_a_batch_one_which_goes_on_from_the_cache(
    start: Start,
) -> None:
    cache = FakeCache()
    core = start(cache, max_num_seqs=1, pages=28)
    core.model.nap_s = 0.03
    low = core.submit(prompt(30), 80, priority=BATCH)
    core.wait(lambda: len(core.deltas[low]) >= 4)
    high = core.submit(prompt(90, 9), 4, priority=REALTIME)
    assert core.tokens(high) == continuation(prompt(90, 9), 4)
    assert not core.ended(low)
    core.model.nap_s = 0.0
    assert core.tokens(low) == continuation(prompt(30), 80)
    core.settle()
    assert core.stats.preemptions == {"decode": 0, "seat": 1, "pages": 0}
    resumed = core.stats.resumed_tokens
    assert resumed["hbm"] + resumed["dram"] >= 28
    # The last page, which was not full, and a block that may still be on its way to the cache.
    assert resumed["computed"] <= 2 * BLOCK_TOKENS
    assert sums_agree(core.stats)


def test_a_server_may_have_another_class_for_those_that_name_none(start: Start) -> None:
    core = start(max_num_seqs=1, default_priority="batch")
    core.model.nap_s = 0.03
    first, second = core.submit(prompt(5), 40), core.submit(prompt(5, 3), 4)
    core.wait(lambda: core.stats.waiting_by_class == (0, 0, 1))
    assert core.stats.running_by_class == (0, 0, 1)
    named = core.submit(prompt(5, 7), 4, priority=INTERACTIVE)
    core.finish(named)
    assert not core.ended(first)
    assert not core.ended(second)
    core.model.nap_s = 0.0
    core.finish(first, second)


def test_the_same_request_gets_the_same_draws_whoever_else_asks(start: Start) -> None:
    draws = {"temperature": 30.0, "ignore_eos": True}
    lone, busy = start(deterministic=True), start(deterministic=True, max_num_seqs=3)
    others = [busy.submit(prompt(7 + i, i), 9, **draws) for i in range(5)]
    mine = busy.submit(prompt(12, 40), 12, **draws)
    again = busy.submit(prompt(12, 40), 12, **draws)
    assert busy.tokens(mine) == busy.tokens(again) == lone.generate(prompt(12, 40), 12, **draws)
    other = busy.submit(prompt(12, 40), 12, choice=1, **draws)
    assert busy.tokens(other) != busy.tokens(mine), "n answers to one prompt differ"
    busy.finish(*others)
