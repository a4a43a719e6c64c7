"""Single flight: who waits for whom, for how long, and what it saves.

A cache in a dict and a clock in a number drive the rules; tests/test_two_cores.py has the engines.
"""

from __future__ import annotations

import pytest
from sim.fake_cache import FakeCache

from kvist.engine.flights import CLAIM_WAIT_S, UNMEASURED_S, WINDOW_BLOCKS, Flights
from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.sequence import Limits, Sequence, State

SIZE = 4
LIMITS = Limits(max_model_len=4096, block_tokens=SIZE)


class Bench:
    """Flights of one engine; the other one is what the test writes into the cache's claims."""

    def __init__(self) -> None:
        self.cache = FakeCache()
        self.cache.alone = False
        self.clock_s = 100.0
        self.flights = Flights(self.cache, lambda: self.clock_s)

    def sequence(self, tokens: int, start: int = 0) -> Sequence:
        prompt = list(range(start, start + tokens))
        return Sequence(NewRequest("r", prompt, SamplingParams()), 1, LIMITS, bytes(32), 0.0)

    def store(self, sequence: Sequence, blocks: int) -> None:
        """Another engine stores leading blocks; their claims end."""
        for key in sequence.keys()[:blocks]:
            self.cache.blocks[key] = None  # type: ignore[assignment]
            self.cache.claims.pop(key, None)

    def defers(self, sequence: Sequence, blocks: int = 0) -> bool:
        return self.flights.defers(sequence, blocks)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_engine_that_is_alone_never_asks(bench: Bench) -> None:
    bench.cache.alone = True
    sequence = bench.sequence(400)
    assert not bench.defers(sequence)
    bench.flights.computing(sequence)
    assert bench.cache.claims == {}


def test_a_request_asks_for_its_first_missing_block_and_goes_on_when_it_has_it(
    bench: Bench,
) -> None:
    sequence = bench.sequence(41)
    bench.store(sequence, 2)
    assert bench.defers(sequence), "it asks"
    assert list(bench.cache.claims) == sequence.keys()[2:3], "and holds nothing else meanwhile"
    assert not bench.defers(sequence)
    assert bench.flights.waiting == 0
    assert bench.cache.flights == [], "it did not wait for anybody"
    bench.flights.computing(sequence)
    assert set(bench.cache.claims) == set(sequence.keys()), "now it claims what it computes"


def test_an_answer_that_does_not_come_is_not_waited_for_long(bench: Bench) -> None:
    bench.cache.claim = bench.cache.release  # type: ignore[method-assign]
    sequence = bench.sequence(41)
    assert bench.defers(sequence)
    bench.clock_s += CLAIM_WAIT_S / 2
    assert bench.defers(sequence)
    bench.clock_s += CLAIM_WAIT_S
    assert not bench.defers(sequence)
    assert not sequence.flight_late


def test_it_waits_as_long_as_its_next_block_is_computed_elsewhere(bench: Bench) -> None:
    sequence = bench.sequence(41)
    keys = sequence.keys()
    bench.cache.claims = dict.fromkeys(keys, "other")
    for stored in range(10):
        bench.store(sequence, stored)
        assert bench.defers(sequence)
        assert bench.flights.waiting == 1
    bench.store(sequence, 10)
    assert not bench.defers(sequence)
    assert (bench.flights.waiting, bench.cache.flights) == (0, [40])
    assert not sequence.flight_late


def test_it_computes_itself_where_the_other_prompt_differs(bench: Bench) -> None:
    sequence = bench.sequence(41)
    keys = sequence.keys()
    bench.cache.claims = dict.fromkeys(keys[:4], "other")
    assert bench.defers(sequence)
    bench.store(sequence, 4)
    assert bench.defers(sequence), "it asks for the fifth block"
    assert bench.cache.claims == {keys[4]: "self"}
    assert not bench.defers(sequence)
    assert bench.cache.flights == [16]
    assert not sequence.flight_late


def test_what_the_other_gave_up_is_computed_here_and_counted_as_late(bench: Bench) -> None:
    sequence = bench.sequence(41)
    bench.cache.claims = dict.fromkeys(sequence.keys(), "other")
    assert bench.defers(sequence)
    bench.cache.claims = {}
    assert bench.defers(sequence), "it asks for it"
    assert not bench.defers(sequence)
    assert bench.cache.flights == [0]
    assert sequence.flight_late


def test_its_patience_is_the_time_that_it_would_need_itself(bench: Bench) -> None:
    assert bench.flights.patience_s(1000) == UNMEASURED_S
    donor = bench.sequence(128, start=5000)
    bench.flights.computing(donor)
    donor.computed, donor.registered = 128, 32
    bench.clock_s += 0.5
    bench.flights.computing(donor)
    assert bench.flights.tokens_per_s == pytest.approx(256)
    sequence = bench.sequence(64)
    bench.cache.claims = dict.fromkeys(sequence.keys(), "other")
    assert bench.defers(sequence)
    bench.clock_s += 0.24
    assert bench.defers(sequence)
    bench.clock_s += 0.02
    assert not bench.defers(sequence)
    assert sequence.flight_late
    assert bench.cache.flights == [0]


def test_what_takes_no_time_is_not_waited_for(bench: Bench) -> None:
    bench.flights.tokens_per_s = 1e6
    sequence = bench.sequence(41)
    bench.cache.claims = dict.fromkeys(sequence.keys(), "other")
    assert not bench.defers(sequence)


def test_claims_run_ahead_of_what_is_computed_and_end_with_the_prompt(bench: Bench) -> None:
    blocks = 2 * WINDOW_BLOCKS
    sequence = bench.sequence(blocks * SIZE + 1)
    bench.flights.computing(sequence)
    assert set(bench.cache.claims) == set(sequence.keys()[:WINDOW_BLOCKS])
    sequence.registered, sequence.computed = 10, 10 * SIZE
    bench.flights.computing(sequence)
    assert set(bench.cache.claims) == set(sequence.keys()[: WINDOW_BLOCKS + 10])
    sequence.registered, sequence.computed = blocks, blocks * SIZE
    bench.flights.computing(sequence)
    assert set(bench.cache.claims) == set(sequence.keys())


def test_a_request_that_ends_gives_up_what_it_has_not_computed(bench: Bench) -> None:
    running, asking = bench.sequence(41), bench.sequence(41, start=1000)
    bench.flights.computing(running)
    assert bench.defers(asking)
    running.registered, running.state = 3, State.FINISHED
    asking.state = State.FINISHED
    bench.flights.prune()
    assert set(bench.cache.claims) == set(running.keys()[:3]), "those are being stored"
    assert bench.flights.waiting == 0


def test_two_requests_of_one_engine_do_not_wait_for_each_other(bench: Bench) -> None:
    one, two = bench.sequence(41), bench.sequence(41)
    assert bench.defers(one)
    assert not bench.defers(two), "the claim is this engine's own"
    assert not bench.defers(one)


def test_no_two_engines_ever_wait_for_each_other() -> None:
    """Two prompts, two engines, every order of steps: somebody computes at any time."""
    for order in range(1 << 8):
        left, right = Bench(), Bench()
        left.cache.blocks = right.cache.blocks = {}
        claims: dict[bytes, Bench] = {}
        for bench in (left, right):
            bench.cache.claim = _claim(claims, bench)  # type: ignore[assignment,method-assign]
            bench.cache.claimant = _claimant(claims, bench)  # type: ignore[assignment,method-assign]
        waits = {left: left.sequence(41), right: right.sequence(41)}
        for step in range(8):
            bench = right if order >> step & 1 else left
            if bench in waits and not bench.defers(waits[bench]):
                del waits[bench]
        for _ in range(2):
            for bench in list(waits):
                if not bench.defers(waits[bench]):
                    del waits[bench]
        assert len(waits) < 2


def _claim(claims: dict[bytes, Bench], bench: Bench):  # type: ignore[no-untyped-def]
    return lambda keys: [claims.setdefault(key, bench) for key in keys]


def _claimant(claims: dict[bytes, Bench], bench: Bench):  # type: ignore[no-untyped-def]
    def claimant(key: bytes) -> str:
        owner = claims.get(key)
        return "none" if owner is None else "self" if owner is bench else "other"

    return claimant
