"""Claims: granted to the first, seen by all, gone with the block, its worker or their time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.direct import StoreControl, attached
from sim.sidecar import Prompt, namespace
from sim.stores import Bench

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.core.claims import CLAIM_S, SESSION_CLAIMS_MAX, Claims, ClaimTable
from kvist.proto.keys import BlockKey
from kvist.proto.shm import CLAIM_BUCKET, CLAIM_BUCKETS

TABLE_BYTES = CLAIM_BUCKET.size * CLAIM_BUCKETS


def key(number: int) -> BlockKey:
    return BlockKey(hashlib.sha256(number.to_bytes(8, "little")).digest()[:16])


def beside(number: int) -> BlockKey:
    """Keys that all want the same bucket."""
    return BlockKey((7 + number * CLAIM_BUCKETS).to_bytes(8, "little") + bytes(8))


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "release", "settle", "end", "expire"]),
        st.integers(0, 11),
        st.integers(1, 3),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(actions=ACTIONS)
def test_the_table_shows_what_a_dict_says(actions: list[tuple[str, int, int]]) -> None:
    view = memoryview(bytearray(TABLE_BYTES))
    claims, reader = Claims(ClaimTable(view)), ClaimTable(view.toreadonly())
    keys = [key(n) for n in range(6)] + [beside(n) for n in range(6)]
    model: dict[BlockKey, tuple[int, float]] = {}
    now = 0.0
    for what, which, session in actions:
        name = keys[which]
        if what == "claim":
            full = which >= 6 and sum(each in model for each in keys[6:]) == 4
            granted = claims.claim(name, session, now)
            assert granted == (model[name][0] == session if name in model else not full)
            if granted:
                model.setdefault(name, (session, now + CLAIM_S))
        elif what == "release":
            claims.release(name, session)
            if name in model and model[name][0] == session:
                del model[name]
        elif what == "settle":
            claims.settle(name)
            model.pop(name, None)
        elif what == "end":
            claims.end(session)
            model = {each: held for each, held in model.items() if held[0] != session}
        else:
            now += CLAIM_S / 3
            claims.expire(now)
            model = {each: held for each, held in model.items() if held[1] > now}
        for each in keys:
            assert reader.owner(each) == model.get(each, (0, 0.0))[0]
        assert len(claims) == len(model)


def test_a_session_has_no_more_than_its_share() -> None:
    claims = Claims(ClaimTable(memoryview(bytearray(TABLE_BYTES))))
    granted = sum(claims.claim(key(n), 1, 0.0) for n in range(4 * SESSION_CLAIMS_MAX))
    assert granted == SESSION_CLAIMS_MAX
    assert sum(claims.claim(key(n), 2, 0.0) for n in range(10_000, 10_100)) > 90


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.open()
    yield made
    made.close()


@pytest.fixture
def clients(bench: Bench) -> Iterator[list[CacheClient]]:
    made = [attached(StoreControl(bench.store), namespace()) for _ in range(2)]
    yield made
    for client in made:
        client.close()


def test_a_lone_worker_is_told_that_it_is_alone(bench: Bench) -> None:
    client = attached(StoreControl(bench.store), namespace())
    assert client.claimant(key(1)) == "alone"
    other = attached(StoreControl(bench.store), namespace())
    assert client.claimant(key(1)) == "none"
    other.close()
    bench.store.tick()
    assert client.claimant(key(1)) == "alone"
    client.close()


def test_a_claim_is_seen_by_the_others_without_a_call_until_the_block_is_stored(
    bench: Bench, clients: list[CacheClient]
) -> None:
    first, second = clients
    prompt = Prompt(1, 3)
    calls = first.rpc_calls + second.rpc_calls
    first.claim(prompt.keys)
    second.claim(prompt.keys)
    bench.store.tick()
    assert [first.claimant(each) for each in prompt.keys] == ["self"] * 3
    assert [second.claimant(each) for each in prompt.keys] == ["other"] * 3
    second.release(prompt.keys)  # not its own
    first.release(prompt.keys[2:])
    bench.store.tick()
    assert [second.claimant(each) for each in prompt.keys] == ["other", "other", "none"]
    assert first.rpc_calls + second.rpc_calls == calls
    first.store(prompt.items[:1])
    assert [second.claimant(each) for each in prompt.keys] == ["none", "other", "none"]
    assert second.lookup(prompt.keys).blocks == 1


def test_the_claims_of_a_worker_that_is_gone_go_with_it(
    bench: Bench, clients: list[CacheClient]
) -> None:
    first, second = clients
    third = attached(StoreControl(bench.store), namespace())
    first.claim([key(1)])
    bench.store.tick()
    assert second.claimant(key(1)) == "other"
    first.close()
    bench.store.tick()
    assert second.claimant(key(1)) == "none"
    third.close()


def test_a_claim_that_its_worker_forgot_ends_by_itself(
    bench: Bench, clients: list[CacheClient]
) -> None:
    clients[0].claim([key(1)])
    bench.store.tick()
    bench.clock_s += CLAIM_S + 1
    bench.store.tick()
    assert clients[1].claimant(key(1)) == "none"
