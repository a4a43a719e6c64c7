"""List, Show and Evict: over gRPC from a real kvistd, and in pieces on a store driven by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from sim.blocks import make_block
from sim.sidecar import BLOCK_TOKENS, Prompt, Sidecar, load_all, namespace, wait_until
from sim.stores import Bench, chain, check, keys_of, worker_of

from kvist.cachesvc.core import browse
from kvist.cachesvc.core.browse import Asked, Browser, Run
from kvist.proto import cache_pb2
from kvist.proto.cache_pb2_grpc import CacheStub
from kvist.proto.errors import BlockMissing, ConfigInvalid

SLOTS = 64


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, SLOTS)
    yield made
    made.close()


def browser_of(bench: Bench) -> Browser:
    assert bench.store.parts is not None
    return Browser(bench.store.parts)


def every_run(browser: Browser, **asked: object) -> list[Run]:
    """By as many pages as it takes."""
    runs, start = [], 0
    while True:
        page = browser.page(Asked(start=start, **asked))  # type: ignore[arg-type]
        runs += page.runs
        start = page.next
        if not start:
            return runs


def test_prompts_that_part_are_listed_as_the_runs_between_the_forks(bench: Bench) -> None:
    worker = worker_of(bench)
    system = chain(0, 4)
    first, second = chain(100, 3, system[-1]), chain(200, 2, system[-1])
    worker.put([*system, *first])
    worker.put(second)
    lone = chain(300, 1)
    worker.put(lone)
    runs = {run.key: run for run in every_run(browser_of(bench))}
    assert set(runs) == {keys_of(each)[-1] for each in (system, first, second, lone)}
    shape = {key: (run.depth, run.blocks, run.branches) for key, run in runs.items()}
    assert shape[keys_of(system)[-1]] == (4, 4, 2)
    assert shape[keys_of(first)[-1]] == (7, 3, 0)
    assert shape[keys_of(second)[-1]] == (6, 2, 0)
    assert shape[keys_of(lone)[-1]] == (1, 1, 0)
    assert all(run.dram_blocks == run.blocks for run in runs.values())


def test_pages_of_any_size_list_each_run_once_and_look_at_few_blocks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(bench)
    for first in range(0, 1200, 100):
        worker.put(chain(first, 4))
    browser = browser_of(bench)
    whole = {run.key for run in every_run(browser)}
    assert len(whole) == 12
    monkeypatch.setattr(browse, "LIST_ROWS", 16)
    monkeypatch.setattr(browse, "LIST_BLOCKS", 8)
    for limit in (1, 2, 5):
        page = browser.page(Asked(limit=limit))
        assert sum(run.blocks for run in page.runs) <= 8
        assert page.next <= 16
        found = every_run(browser, limit=limit)
        assert len(found) == 12
        assert {run.key for run in found} == whole


def test_a_key_is_found_by_the_digits_that_it_begins_with(bench: Bench) -> None:
    worker = worker_of(bench)
    worker.put(chain(0, 8))
    browser = browser_of(bench)
    key = keys_of(chain(0, 8))[3]
    assert [run.key for run in every_run(browser, key=key.hex())] == [key]
    for digits in (1, 2, 3, 15, 32):
        wanted = {
            each for each in keys_of(chain(0, 8)) if each.hex().startswith(key.hex()[:digits])
        }
        assert {run.key for run in every_run(browser, key=key.hex()[:digits])} == wanted


def test_uses_are_counted_by_request_and_the_hottest_can_be_asked_for(bench: Bench) -> None:
    worker = worker_of(bench)
    hot, cold = chain(0, 3), chain(100, 3)
    worker.put(hot)
    worker.put(cold)
    for _ in range(4):
        bench.clock_s += 61  # sooner it would be the same request
        bench.store.prefetch(keys_of(hot))
    (run,) = every_run(browser_of(bench), min_uses=1)
    assert run.key == keys_of(hot)[-1]
    assert run.uses == 4
    bench.clock_s += 30
    assert browser_of(bench).page(Asked(min_uses=4)).runs[0].idle_s == pytest.approx(30, abs=1)


def test_a_tree_is_evicted_leaves_first_a_bounded_number_at_a_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(bench)
    system = chain(0, 3)
    worker.put(system)
    for first in (100, 200, 300):
        worker.put(chain(first, 4, system[-1]))
    kept = chain(400, 2)
    worker.put(kept)
    monkeypatch.setattr(browse, "EVICT_BLOCKS", 4)
    browser, root = browser_of(bench), keys_of(system)[0]
    with pytest.raises(ConfigInvalid, match="descendants"):
        browser.evict(root, False)
    counts = []
    more = True
    while more:
        dropped, more = browser.evict(root, True)
        counts.append(dropped)
        check(bench)
    assert counts == [4, 4, 4, 3]
    assert bench.tiers(kept) == ["dram"] * 2
    assert bench.tiers(system) == []
    with pytest.raises(BlockMissing, match="cleared"):
        browser.evict(root, True)


def test_a_block_is_shown_with_its_chain_and_a_wrong_checksum_is_told(bench: Bench) -> None:
    worker = worker_of(bench)
    blocks = chain(0, 3)
    worker.put(blocks)
    browser = browser_of(bench)
    shown = asyncio.run(browser.show(keys_of(blocks)[2], verify=False))
    assert shown.chain == keys_of(blocks)
    assert (shown.depth, shown.uses, shown.children) == (2, 0, 0)
    assert [(copy.tier, copy.checksum) for copy in shown.copies] == [("dram", "right")]
    assert shown.header is not None
    assert shown.header.tokens == blocks[2].header.tokens
    assert bench.store.parts is not None
    slot = shown.copies[0].slot
    bench.store.parts.dram.slot_view(slot)[blocks[2].header.shape.header_bytes] ^= 1
    assert asyncio.run(browser.show(keys_of(blocks)[2], False)).copies[0].checksum == "wrong"
    with pytest.raises(BlockMissing, match="never_stored"):
        asyncio.run(browser.show(make_block(77).header.key, False))


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    folder = tmp_path_factory.mktemp("sidecar")
    flags = ("--flash-path", str(folder / "flash"), "--flash-bytes", "8MiB")
    made = Sidecar(folder, (*flags, "--tenants", "acme ttl=1h"))
    made.start()
    yield made
    made.close()


def test_over_grpc_a_prompt_is_listed_shown_with_flash_verified_and_evicted(
    sidecar: Sidecar,
) -> None:
    client = sidecar.client("worker-a")
    prompt = Prompt(1, 5)
    client.store(prompt.items)
    assert load_all(client, prompt) == [None] * 5
    with sidecar.channel() as channel:
        stub = CacheStub(channel)

        def listed() -> cache_pb2.ListReply:
            return stub.List(cache_pb2.ListRequest())

        wait_until(lambda: listed().runs[0].flash_blocks == 5, "the blocks to sink")
        (run,) = listed().runs
        assert (run.key, run.depth, run.blocks, run.dram_blocks) == (prompt.keys[-1], 5, 5, 5)
        (space,) = listed().namespaces
        assert space.namespace == namespace().digest()
        assert (space.block_tokens, space.blocks, space.flash_blocks) == (BLOCK_TOKENS, 5, 5)
        shown = stub.Show(cache_pb2.ShowRequest(key=prompt.keys[4], tokens=True, verify=True))
        assert [(copy.tier, copy.checksum) for copy in shown.copies] == [
            ("dram", "right"),
            ("flash", "right"),
        ]
        assert list(shown.chain) == prompt.keys
        assert len(shown.tokens) == BLOCK_TOKENS
        assert stub.Pin(cache_pb2.PinRequest(keys=prompt.keys)).pinned == 5
        pinned = stub.Show(cache_pb2.ShowRequest(key=prompt.keys[0]))
        assert 3500 < pinned.pinned_s <= 3601
        assert not pinned.HasField("expires_s")
        assert dict(pinned.pin_lives) == {"dram": 4, "flash": 4}
        assert listed().runs[0].pinned_blocks == 5
        gone = stub.Evict(cache_pb2.EvictRequest(key=prompt.keys[3], descendants=True))
        assert (gone.dropped_blocks, gone.more) == (2, False)
        assert stub.Lookup(cache_pb2.LookupRequest(keys=prompt.keys)).blocks == 3
    assert "evicted by hand" in sidecar.text()


def test_the_record_of_a_block_of_a_tenant_with_a_ttl_says_when_it_ends(sidecar: Sidecar) -> None:
    of = namespace(salt="acme:secret")
    client = sidecar.client("worker-b", of)
    prompt = Prompt(2, 2, of)
    client.store([replace(prompt.items[0], origin=b"origin-1", tenant="acme"), prompt.items[1]])
    with sidecar.channel() as channel:
        stub = CacheStub(channel)
        shown = stub.Show(cache_pb2.ShowRequest(key=prompt.keys[0]))
        assert shown.namespace.tenant == "acme"
        assert 3500 < shown.expires_s <= 3600
        runs = stub.List(cache_pb2.ListRequest(tenant="acme")).runs
        assert [run.key for run in runs] == [prompt.keys[-1]]


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("List", cache_pb2.ListRequest(limit=129), "limit"),
        ("List", cache_pb2.ListRequest(page_token=(1 << 64) - 1), "page_token"),
        ("List", cache_pb2.ListRequest(key="xyz"), "key"),
        ("List", cache_pb2.ListRequest(namespace="0" * 65), "namespace"),
        ("List", cache_pb2.ListRequest(tenant="x" * 129), "tenant"),
        ("Show", cache_pb2.ShowRequest(key=b"short"), "key"),
        ("Evict", cache_pb2.EvictRequest(key=b""), "key"),
    ],
)
def test_a_field_out_of_its_limits_is_named(
    sidecar: Sidecar, method: str, request_: object, field: str
) -> None:
    with sidecar.channel() as channel, pytest.raises(grpc.RpcError) as refused:
        getattr(CacheStub(channel), method)(request_)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(f"{field}:")


def test_what_is_not_there_is_not_found_and_a_page_past_the_end_is_empty(sidecar: Sidecar) -> None:
    with sidecar.channel() as channel:
        stub = CacheStub(channel)
        for method, request in (
            (stub.Show, cache_pb2.ShowRequest(key=bytes(16))),
            (stub.Evict, cache_pb2.EvictRequest(key=bytes(16))),
        ):
            with pytest.raises(grpc.RpcError) as missing:
                method(request)
            assert missing.value.code() is grpc.StatusCode.NOT_FOUND
        reply = stub.List(cache_pb2.ListRequest(page_token=1 << 48))
        assert (len(reply.runs), reply.next_page_token) == (0, 0)
