"""Accounts by tenant: whoever comes, the sum is the whole, and there are no more than a few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim.blocks import NAMESPACE
from sim.stores import Bench, Worker, chain, store_settled, tree_block, worker_of

from kvist.cachesvc.core.accounts import (
    ACCOUNTS_MAX,
    COMMON,
    NAMESPACES_MAX,
    OTHER,
    Accounts,
    TenantUse,
    namespace_label,
    worth_of_tiers,
    worth_s,
)
from kvist.cachesvc.core.sessions import First
from kvist.cachesvc.core.store import StoreStats
from kvist.cachesvc.worker.ring import RingReader, RingWriter, make_ring
from kvist.cachesvc.worker.tenants import FIRST_COME, OTHERS_ROW, TOKENS_MIN, TenantRows
from kvist.proto.shm import MISS_REASONS, TENANT_COUNTERS, TENANT_ROWS, TENANTS_OFFSET, TIERS

HIT = TENANT_COUNTERS.index("hit_tokens.dram")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=8, flash_slots=24)
    yield made
    made.close()


@pytest.fixture
def worker(bench: Bench) -> Worker:
    return worker_of(bench)


def count(worker: Worker, tenant: str | None, tokens: int) -> None:
    worker.ring.add_for(tenant, tokens, {"lookups": 1, "hit_tokens.dram": tokens})


def by_tenant(stats: StoreStats) -> dict[str, TenantUse]:
    return {use.tenant: use for use in stats.tenants}


# A worker's rows.


def test_the_first_tenants_get_rows_and_small_ones_after_them_share_one() -> None:
    rows = TenantRows()
    first = [rows.row_of(f"t{number}", 100) for number in range(FIRST_COME)]
    assert first == [(number, True) for number in range(1, FIRST_COME + 1)]
    assert rows.row_of("small", 10) == (OTHERS_ROW, False)
    assert rows.row_of("t0", 100) == (1, False)


def test_a_large_tenant_that_comes_late_is_counted_by_itself_from_then_on() -> None:
    rows = TenantRows()
    for number in range(10 * TENANT_ROWS):
        rows.row_of(f"t{number}", 2000)
    seen = [rows.row_of("large", 2000)[0] for _ in range(1000)]
    assert seen[0] == OTHERS_ROW
    assert seen[-1] > FIRST_COME
    assert seen.index(seen[-1]) == TOKENS_MIN // 2000 - 1


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 1000)), max_size=400))
def test_rows_are_never_given_twice_and_never_more_than_there_are(
    asked: list[tuple[int, int]],
) -> None:
    rows, owners = TenantRows(), dict[int, str]()
    for number, tokens in asked:
        row, is_new = rows.row_of(f"t{number}", tokens)
        assert 0 <= row < TENANT_ROWS
        assert is_new == (row != OTHERS_ROW and row not in owners)
        if row != OTHERS_ROW:
            assert owners.setdefault(row, f"t{number}") == f"t{number}"


def test_a_ring_tells_names_and_totals_and_what_has_no_row(tmp_path: Path) -> None:
    make_ring(tmp_path / "ring", 8)
    writer, reader = RingWriter(tmp_path / "ring"), RingReader(tmp_path / "ring")
    writer.add_for("acme", 5, {"hit_tokens.dram": 5})
    writer.add_for("", 7, {"hit_tokens.dram": 7})
    writer.add_for("acme", 1, {"hit_tokens.dram": 1})
    writer.add_for(None, 2, {"hit_tokens.dram": 2})
    writer.add_for("ü" * 100, 3, {"hit_tokens.dram": 3})
    found = [(name, totals[HIT]) for name, totals in reader.tenants()]
    assert found == [(None, 2), ("acme", 6), ("", 7), ("ü" * 64, 3)]
    writer.close()
    reader.close()


def test_rows_that_make_no_sense_hurt_nobody(bench: Bench, worker: Worker) -> None:
    with worker.info.ring_path.open("r+b") as file:
        file.seek(TENANTS_OFFSET)
        file.write(bytes(range(256)) * 2 * TENANT_ROWS)
    stats = bench.store.stats()
    assert len(stats.tenants) <= ACCOUNTS_MAX + 1
    assert all(use.tenant == OTHER or use.tenant.isprintable() for use in stats.tenants)


# The sidecar's accounts.


def test_each_tenants_tokens_add_up_to_the_whole_also_when_its_worker_has_gone(
    bench: Bench, worker: Worker
) -> None:
    other = bench.worker()
    for each, tenant, tokens in ((worker, "acme", 10), (other, "acme", 20), (other, "", 5)):
        count(each, tenant, tokens)
    worker.ring.add_for("acme", 0, {"miss_tokens.tail": 4, "saved_us.dram": 1500})
    for _ in range(2):
        stats = bench.store.stats()
        tenants = by_tenant(stats)
        assert (tenants["acme"].requested_tokens, tenants[COMMON].requested_tokens) == (34, 5)
        assert tenants["acme"].saved_s["dram"] == 0.0015
        assert stats.requested_tokens == 39
        assert stats.hit_tokens["dram"] == 35
        assert stats.miss_tokens["tail"] == 4
        assert stats.counters["lookups"] == 3
        if stats.sessions == 2:
            other.close()
            bench._workers = [worker]
            bench.store.tick()
    assert stats.sessions == 1


def test_what_a_worker_is_just_adding_is_in_no_sum_yet(bench: Bench, worker: Worker) -> None:
    worker.ring.add_for("acme", 100, {"hit_tokens.dram": 60})  # its misses are still to come
    stats = bench.store.stats()
    assert stats.requested_tokens == sum(stats.hit_tokens.values()) == 60


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60), st.integers(1, 9)), max_size=60))
def test_accounts_are_bounded_only_grow_and_add_up(asked: list[tuple[int, int, int]]) -> None:
    accounts, whole = Accounts(), 0
    before: dict[object, int] = {}
    for namespace, first, tokens in asked:
        row = [0] * len(TENANT_COUNTERS)
        row[HIT] = tokens
        names = [None if not number % 7 else f"t{number}" for number in range(first, first + 9)]
        accounts.end(f"m-{namespace}", [(name, list(row)) for name in names])
        whole += tokens * len(names)
        totals = {owner: counts[HIT] for owner, counts in accounts.totals([]).items()}
        assert sum(totals.values()) == whole
        assert all(totals[owner] >= tokens for owner, tokens in before.items())
        before = dict(totals)
    namespaces = {owner.namespace for owner in before}
    assert len(namespaces - {OTHER}) <= NAMESPACES_MAX
    assert len(before) <= ACCOUNTS_MAX + NAMESPACES_MAX + 1


def test_copies_are_their_owners_and_nobodys_where_no_tenant_was_told(
    bench: Bench, worker: Worker
) -> None:
    theirs = NAMESPACE[::-1]
    own = [tree_block(200, namespace=theirs)]
    first = own[0].header.key
    firsts = {first: First(b"", theirs, "acme")}
    (slot,) = bench.store.reserve(worker.info.session, [(first, bytes(16))], firsts)  # type: ignore[list-item]
    assert slot.slot is not None
    worker.fill(slot.slot, own[0])
    assert worker.commit([slot.slot]) == [True]
    store_settled(bench, worker, 0, 3)
    worker.put([tree_block(300, namespace=bytes(32))])
    bench.settle()
    count(worker, "acme", 1)
    count(worker, "", 1)
    held = {use.tenant: use.held_blocks for use in bench.store.stats().tenants}
    assert held["acme"] == {"dram": 1, "flash": 1}
    assert held[COMMON] == {"dram": 3, "flash": 3}
    assert held[OTHER] == {"dram": 1, "flash": 1}
    copies = bench.parts.placement.blocks.copies
    for tier, by_space in copies.items():
        assert sum(one[tier] for one in held.values()) == sum(by_space.values())


def test_what_is_held_is_added_up_anew_only_after_a_while(bench: Bench, worker: Worker) -> None:
    count(worker, "", 1)
    assert worker.put(chain(0, 2)) == ["stored"] * 2
    assert by_tenant(bench.store.stats())[COMMON].held_blocks["dram"] == 2
    assert worker.put(chain(10, 2)) == ["stored"] * 2
    assert by_tenant(bench.store.stats())[COMMON].held_blocks["dram"] == 2
    bench.clock_s += 1.0
    assert by_tenant(bench.store.stats())[COMMON].held_blocks["dram"] == 4


def test_a_namespaces_name_is_short_and_readable() -> None:
    digest = bytes(range(32))
    assert namespace_label("HuggingFaceTB/SmolLM2-135M", digest) == "SmolLM2-135M-00010203"
    assert namespace_label("", digest) == "kv-00010203"
    assert namespace_label("a b\n\"c'" * 40, digest).startswith("a-b-c-a-b-c")
    assert len(namespace_label("x" * 1000, digest)) < 64


def test_a_tenants_worth_is_that_of_the_sidecars_tiers(bench: Bench, worker: Worker) -> None:
    seconds = {"saved_us.hbm": 11_000_000, "saved_us.flash": 400, "load_us.dram": 528}
    worker.ring.add_for("acme", 0, {"hit_tokens.hbm": 9, **seconds})
    (acme,) = bench.store.stats().tenants
    assert acme.saved_s["hbm"] == 11.0
    assert acme.net_s == pytest.approx(-128e-6)


def test_worth_is_saved_less_loaded_less_stored() -> None:
    assert worth_s(10.0, 2.5, 1.0) == 6.5
    use = TenantUse(
        "m", "acme", 1, 30, {"hbm": 5, "dram": 10, "flash": 15}, dict.fromkeys(MISS_REASONS, 0),
        {"hbm": 1.0, "dram": 2.0, "flash": 3.0}, {"dram": 0.5, "flash": 1.0}, {}, 0.25, 4, 0.0, {},
    )  # fmt: skip
    worths = worth_of_tiers([use, replace(use, tenant=COMMON)], written_s=0.75)
    shown = {one.tier: (one.saved_tokens, one.saved_s, one.net_s) for one in worths}
    assert list(shown) == list(TIERS)
    assert shown == {"hbm": (10, 2.0, 2.0), "dram": (20, 4.0, 2.5), "flash": (30, 6.0, 3.25)}


def test_offered_blocks_are_counted_by_what_became_of_them(bench: Bench, worker: Worker) -> None:
    blocks = chain(0, 4)
    worker.put(blocks)
    worker.put(blocks)
    worker.reserve([chain(50, 3)[-1]])
    events = Counter(bench.store.stats().events)
    assert events["offers_reserved"] == events["offers_present"] == 4
    assert events["offers_no_parent"] == 1
