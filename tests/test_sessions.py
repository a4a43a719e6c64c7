"""Sessions: who may write which slot, with real processes that stop and die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sim.blocks import NAMESPACE, SHAPE, SLOT_BYTES
from sim.direct import StoreControl, attached
from sim.sidecar import Prompt, namespace
from sim.stores import Bench, Worker, chain, check, keys_of

from kvist.cachesvc.core.store import Store
from kvist.proto.errors import SessionUnknown

# Holds the ring as a worker does, fills the slots that it is told with 0xAB, slowly.
PROCESS = f"""
import sys, time, pathlib
from kvist.cachesvc.worker.ring import RingWriter
from kvist.transfer.shm import ArenaMap
ring = RingWriter(pathlib.Path(sys.argv[1]))
arena = ArenaMap(pathlib.Path(sys.argv[2]), {SLOT_BYTES}, 16)
ring.add_for("", 0, {{"lookups": 5}})
print("ready", flush=True)
sys.stdin.readline()
time.sleep(60)
"""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.open(reservation_share=0.5)
    yield made
    made.close()


@pytest.fixture
def store(bench: Bench) -> Store:
    return bench.store


@pytest.fixture
def worker(bench: Bench) -> Worker:
    return bench.worker()


@contextmanager
def running(store: Store) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with a session; it is killed at the end, even if it is stopped."""
    info = store.attach("process", 1, NAMESPACE, "test", SHAPE)
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(info.ring_path), str(info.arena_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process, info.session
        finally:
            process.kill()


def reserve(store: Store, session: str, first: int, count: int) -> list[int | None]:
    blocks = chain(first, count)
    names = [(block.header.key, block.header.parent) for block in blocks]
    return [answer.slot for answer in store.reserve(session, names)]


def test_session_holds_no_more_than_its_share(store: Store, worker: Worker) -> None:
    assert worker.info.reservation_limit == 8
    answers = worker.reserve(chain(0, 10))
    assert [answer.outcome for answer in answers] == ["reserved"] * 8 + ["refused"] * 2
    assert answers[8].reason == "share"
    assert answers[9].reason == "no_parent"
    worker.store.abort(worker.info.session, [answer.slot for answer in answers[:8] if answer.slot])
    assert store.stats().reserved_slots == 1  # slot 0 is a slot, and still held


def test_shares_shrink_so_that_all_of_them_together_are_no_more_than_the_arena(
    bench: Bench,
) -> None:
    workers = [Worker(bench.store) for _ in range(5)]
    for number, each in enumerate(workers):
        answers = each.reserve(chain(100 * number, 4))
        assert [answer.reason for answer in answers] == ["", "", "", "share"], (
            "16 slots, 5 sessions"
        )
    assert bench.store.stats().reserved_slots == 15
    for each in workers[1:]:
        each.close()
    bench.store.tick()
    # Alone again it has half of the arena, as the settings say.
    assert [each.reason for each in workers[0].reserve(chain(900, 6))] == [""] * 5 + ["share"]
    workers[0].close()


def test_what_goes_over_a_share_that_has_shrunk_is_stored_in_smaller_batches(
    bench: Bench,
) -> None:
    client = attached(StoreControl(bench.store), namespace())
    for _ in range(4):
        bench.worker()
    prompt = Prompt(1, 10)
    result = client.store(prompt.items)
    assert (result.stored, result.dropped) == (10, {})
    assert client.rpc_calls == 1 + 2 * 4, "16 slots, 5 sessions: 3, 3, 3 and 1 blocks"
    client.close()


def test_second_reserve_of_a_block_is_answered_present(bench: Bench, worker: Worker) -> None:
    other = bench.worker()
    block = chain(0, 1)
    assert worker.reserve(block)[0].outcome == "reserved"
    assert worker.reserve(block)[0].outcome == "present"
    assert other.reserve(block)[0].outcome == "present"


def test_block_on_top_of_what_another_session_reserved_is_refused(
    bench: Bench, worker: Worker
) -> None:
    other = bench.worker()
    blocks = chain(0, 3)
    worker.reserve(blocks[:1])
    assert [answer.reason or answer.outcome for answer in other.reserve(blocks)] == [
        "present",
        "no_parent",
        "no_parent",
    ]


def test_slot_of_another_session_is_not_committed_or_given_back(
    bench: Bench, worker: Worker
) -> None:
    other = bench.worker()
    slot = worker.reserve(chain(0, 1))[0].slot
    assert slot is not None
    assert other.commit([slot, 999]) == [False, False]
    other.store.abort(other.info.session, [slot])
    worker.fill(slot, chain(0, 1)[0])
    assert worker.commit([slot, slot]) == [True, False]
    check(bench)


def test_closed_session_answers_no_call(store: Store) -> None:
    info = store.attach("gone", 1, NAMESPACE, "test", SHAPE)
    store.session_closed(info.session)
    for call in (store.reserve, store.commit, store.abort):
        with pytest.raises(SessionUnknown):
            call(info.session, [])
    store.session_closed("never heard of")


def test_slots_of_a_killed_process_come_back_and_its_counters_stay(
    bench: Bench, store: Store
) -> None:
    with running(store) as (process, session):
        assert None not in reserve(store, session, 0, 4)
        store.session_closed(session)
        store.tick()
        assert store.stats().reserved_slots == 4, "the process may still write"
        assert store.stats().counters["lookups"] == 5
        process.kill()
        process.wait()
        assert store.tick() is False
    stats = store.stats()
    assert (stats.reserved_slots, stats.sessions) == (0, 0)
    assert stats.counters["lookups"] == 5
    assert list(bench.config.shm_dir.glob("ring-*")) == []
    check(bench)


def test_slots_of_a_stopped_process_stay_its_own_however_long(bench: Bench, store: Store) -> None:
    with running(store) as (process, session):
        assert None not in reserve(store, session, 0, 8)
        os.kill(process.pid, signal.SIGSTOP)
        store.session_closed(session)
        worker = bench.worker()
        for hours in range(3):
            bench.clock_s += 3600
            store.tick()
            # All the rest of the arena is in use, but never what the stopped one may write.
            assert worker.put(chain(100 + 100 * hours, 8)) == ["stored"] * 8
            assert set(worker.put(chain(900, 9)[8:])) == {"no_parent"}
        assert store.stats().reserved_slots == 8
        process.kill()
        process.wait()
    store.tick()
    assert store.stats().reserved_slots == 0
    check(bench)


def test_blocks_that_a_dead_session_had_reserved_can_be_stored_by_others(
    bench: Bench, worker: Worker
) -> None:
    blocks = chain(0, 3)
    doomed = Worker(bench.store)
    assert [answer.outcome for answer in doomed.reserve(blocks)] == ["reserved"] * 3
    assert worker.put(blocks) == ["present"] * 3
    assert bench.tiers(blocks) == []
    doomed.close()
    bench.store.tick()
    assert worker.put(blocks) == ["stored"] * 3
    assert bench.tiers(blocks) == ["dram"] * 3


def test_session_names_differ_from_life_to_life(bench: Bench, store: Store) -> None:
    first = store.attach("a", 1, NAMESPACE, "test", SHAPE).session
    second = store.attach("b", 1, NAMESPACE, "test", SHAPE).session
    bench.close()
    third = bench.open().attach("c", 1, NAMESPACE, "test", SHAPE).session
    assert len({first, second, third}) == 3
    with pytest.raises(SessionUnknown):
        bench.store.commit(first, [])


def test_every_counter_of_every_session_is_in_the_totals(bench: Bench, worker: Worker) -> None:
    other = bench.worker()
    for ring in (worker.ring, other.ring):
        ring.add_for("", 100, {"hit_tokens.dram": 60, "miss_tokens.never_stored": 40})
    stats = bench.store.stats()
    assert stats.requested_tokens == 200
    assert stats.hit_tokens["dram"] == 120
    assert stats.miss_tokens["never_stored"] == 80
    assert stats.requested_tokens == sum(stats.hit_tokens.values()) + sum(
        stats.miss_tokens.values()
    )


def test_ring_of_a_worker_is_heeded(bench: Bench, worker: Worker) -> None:
    old, new = chain(0, 4), chain(100, 4)
    worker.put(old)
    worker.put(new)
    assert worker.ring.push(1, 4, keys_of(old)[-1])
    assert bench.store.tick()
    assert not bench.store.tick()
    worker.put(chain(200, 8))
    worker.put(chain(300, 4))
    assert bench.tiers(old) == ["dram"] * 4
    assert bench.tiers(new) == []
