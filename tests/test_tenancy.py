"""Tenants: rules as people write them, whose a block is, and TTL with overwriting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sim.blocks import NAMESPACE
from sim.direct import StoreControl, attached
from sim.sidecar import Prompt, namespace
from sim.stores import Bench, chain, check, keys_of

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.core.sessions import First
from kvist.cachesvc.placing.tenancy import Limits, Tenancy, check_floors, parse_tenants
from kvist.proto.errors import ConfigInvalid
from kvist.proto.keys import tenant_of


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, 16, 16)
    yield made
    made.close()


def test_rules_are_read_as_people_write_them() -> None:
    assert parse_tenants(" \n; ") == {}
    rules = parse_tenants(
        "acme quota=4GiB floor=1GiB ttl=24h; ns:0123abcd flash_quota=1MiB\n* ttl=7d"
    )
    assert rules == {
        "acme": Limits(quota=4 << 30, floor=1 << 30, ttl=86400),
        "ns:0123abcd": Limits(flash_quota=1 << 20),
        "*": Limits(ttl=7 * 86400),
    }


@pytest.mark.parametrize(
    "text",
    [
        "acme",
        "ac/me quota=1",
        "acme quota=1 quota=2",
        "acme size=1",
        "acme quota",
        "acme quota=much",
        "acme ttl=0s",
        "acme ttl=1.5h",
        "acme quota=1MiB floor=2MiB",
        "acme quota=1; acme floor=1",
        "ns:xyz quota=1",
    ],
)
def test_a_rule_that_is_none_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"acme|ac/me|ns:xyz|much"):
        parse_tenants(text)


def test_floors_that_do_not_fit_together_are_refused() -> None:
    rules = parse_tenants("a floor=3MiB; b floor=3MiB flash_floor=1MiB")
    check_floors(rules, 6 << 20, 1 << 20)
    with pytest.raises(ConfigInvalid, match="6MiB together, more than dram_bytes, 5MiB"):
        check_floors(rules, 5 << 20, 1 << 20)
    with pytest.raises(ValueError, match="a floor for everybody"):
        parse_tenants("* floor=1MiB")


def test_the_name_of_a_tenant_tells_nothing_of_its_secret() -> None:
    assert tenant_of("") == ""
    assert tenant_of("acme:secret") == tenant_of("acme:other") == "acme"
    assert tenant_of("secret") != tenant_of("secret2")
    for salt in ("secret", "not a name:secret"):
        assert "secret" not in tenant_of(salt)
        assert tenant_of(salt).startswith("salt-")


def test_a_namespace_rule_goes_before_the_tenants_and_everybody_else_is_by_itself() -> None:
    tenancy = Tenancy(parse_tenants("acme quota=2; ns:00010203 quota=1; * quota=3"))
    known = {tenant: bytes([number]) * 32 for number, tenant in enumerate(("acme", "b", "c"), 10)}
    assert tenancy.group(known["acme"]) is None, "nobody has said whose it is"
    for tenant, digest in known.items():
        tenancy.introduce(digest, tenant)
    tenancy.introduce(NAMESPACE, "acme")
    groups = [tenancy.group(digest) for digest in (NAMESPACE, *known.values())]
    assert [group and group.limits.quota for group in groups] == [1, 2, 3, 3]
    assert len({id(group) for group in groups}) == 4


def test_blocks_go_when_their_time_is_over_and_their_slots_are_overwritten(bench: Bench) -> None:
    bench.open(tenants={f"ns:{NAMESPACE.hex()[:8]}": Limits(ttl=60)})
    worker = bench.worker()
    old, young = chain(0, 3), chain(100, 2)
    worker.put(old)
    slots = [_slot(bench, key) for key in keys_of(old)]
    bench.clock_s += 40
    worker.put(young)
    bench.store.tick()
    assert bench.tiers(old) == ["dram"] * 3, "and never on flash"
    bench.clock_s += 21
    bench.store.tick()
    assert bench.tiers(old) == []
    assert bench.tiers(young) == ["dram"] * 2
    for slot in slots:
        assert not np.frombuffer(bench.parts.dram.slot_view(slot), np.uint8)[8:].any()
    index = bench.parts.index
    assert {index.miss_reason(key) for key in keys_of(old)} == {"expired"}
    counts = bench.parts.placement.counts
    assert (counts.expired, counts.slots_wiped, counts.flash_written) == (3, 3, 0)
    check(bench)


def test_what_stands_on_an_expired_block_goes_with_it(bench: Bench) -> None:
    bench.open(tenants={f"ns:{NAMESPACE.hex()[:8]}": Limits(ttl=60)})
    worker = bench.worker()
    blocks = chain(0, 4)
    worker.put(blocks[:2])
    bench.clock_s += 50
    worker.put(blocks[2:])
    bench.clock_s += 11
    bench.store.tick()
    assert bench.tiers(blocks) == []
    assert bench.parts.placement.counts.expired == 4
    check(bench)


def test_a_slot_that_was_filled_and_never_committed_is_overwritten_too(bench: Bench) -> None:
    bench.open(tenants={"acme": Limits(ttl=60)})
    worker = bench.worker()
    (block,) = chain(0, 1)
    first = First(b"", NAMESPACE, "acme")
    names = [(block.header.key, block.header.parent)]
    (answer,) = bench.store.reserve(worker.info.session, names, {block.header.key: first})
    assert answer.slot is not None
    worker.fill(answer.slot, block)
    bench.store.abort(worker.info.session, [answer.slot])
    assert not np.frombuffer(bench.parts.dram.slot_view(answer.slot), np.uint8)[8:].any()


def test_evicted_and_cleared_blocks_are_overwritten_as_well(bench: Bench) -> None:
    bench.open(tenants={f"ns:{NAMESPACE.hex()[:8]}": Limits(ttl=3600)})
    worker = bench.worker()
    worker.put(chain(0, 16))
    worker.put(chain(100, 2))
    counts = bench.parts.placement.counts
    assert (counts.dram_evicted, counts.slots_wiped) == (2, 2)
    assert bench.store.clear(NAMESPACE) == 16
    assert counts.slots_wiped == 18
    check(bench)


def test_clear_takes_one_namespace_and_leaves_the_others(bench: Bench) -> None:
    bench.open()
    client: CacheClient = attached(StoreControl(bench.store), namespace())
    mine, theirs = Prompt(1, 3), Prompt(1, 3, namespace("other"))
    client.store([*mine.items, *theirs.items])
    bench.settle()
    assert bench.store.clear(namespace("other").digest()) == 3
    assert client.lookup(mine.keys).blocks == 3
    assert client.lookup(theirs.keys).reason == "cleared"
    client.close()


def _slot(bench: Bench, key: object) -> int:
    location = bench.parts.index.find(key)  # type: ignore[arg-type]
    assert location is not None
    assert location.dram is not None
    return location.dram
