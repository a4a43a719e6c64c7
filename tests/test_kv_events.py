"""What a router hears from a real kvistd and a real engine is what their tiers hold."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim.core_thread import CoreThread
from sim.models import tiny_llama
from sim.router import Copy, Router
from sim.sidecar import BLOCK_TOKENS, Prompt, Sidecar, namespace

from kvist.cachesvc.catalog.index import IndexReader
from kvist.cachesvc.client import CacheClient, StoreItem
from kvist.cachesvc.log import Log
from kvist.engine.config import EngineConfig
from kvist.engine.opening import open_parts
from kvist.proto import cache_pb2, cache_pb2_grpc
from kvist.proto.keys import NO_KEY, BlockKey, block_keys
from kvist.proto.kv_events import CPU, GPU, STORAGE, hash_of, space_name

FLASH = ("--flash-bytes", "4MiB", "--flash-admission", "always")


class Told:
    """A sidecar with events, and all that was ever stored in it.

    Attributes:
        items: by key.
    """

    def __init__(self, folder: Path, *flags: str, **config: Any) -> None:
        self.endpoint, self.replay = f"ipc://{folder}/pub", f"ipc://{folder}/replay"
        given = {"endpoint": self.endpoint, "replay_endpoint": self.replay, **config}
        events = ("--kv-events-config", json.dumps(given))
        flash = ("--flash-path", str(folder / "flash")) if "--flash-bytes" in flags else ()
        small = ("--dram-bytes", "1MiB", "--reservation-share", "1")
        self.sidecar = Sidecar(folder, [*small, *events, *flash, *flags])
        self.items: dict[BlockKey, StoreItem] = {}
        self.routers: list[Router] = []

    def router(self) -> Router:
        router = Router(self.endpoint, self.replay)
        self.routers.append(router)
        return router

    def put(self, client: CacheClient, items: list[StoreItem]) -> None:
        self.items.update({item.key: item for item in items})
        for start in range(0, len(items), 8):
            client.store(items[start : start + 8])

    def copies(self) -> set[Copy]:
        """What the index says is where."""
        (path,) = (self.sidecar.folder / "shm").glob("*/index")
        index = IndexReader(path)
        found: set[Copy] = set()
        for key in self.items:
            location = index.find(key)
            if location is not None and location.dram is not None:
                found.add((hash_of(key), CPU))
            if location is not None and location.flash is not None:
                found.add((hash_of(key), STORAGE))
        index.close()
        return found

    def metric(self, name: str) -> float:
        """Of the sidecar's /metrics; 0 when it is not there."""
        lines = self.sidecar.get("metrics").splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)

    def rise(self, client: CacheClient) -> int:
        """Wish a prompt into DRAM whose last block is on flash only; that block's hash."""
        copies = self.copies()
        end = next(
            key
            for key in self.items
            if (hash_of(key), STORAGE) in copies and (hash_of(key), CPU) not in copies
        )
        chain = [end]
        while self.items[chain[0]].parent != NO_KEY:
            chain.insert(0, self.items[chain[0]].parent)
        client.prefetch(chain, len(chain))
        return hash_of(end)

    def agrees(self, router: Router) -> None:
        """Listen until the router knows what is where."""
        router.listen(lambda: router.copies == self.copies())
        assert not router.strays
        by_hash = {hash_of(item.key): item for item in self.items.values()}
        for each, tokens in router.tokens.items():
            assert np.array_equal(np.frombuffer(by_hash[each].tokens, "<u4"), tokens)
        for each, parent in router.parents.items():
            above = by_hash[each].parent
            assert parent == (None if above == NO_KEY else hash_of(above))

    def close(self) -> None:
        for router in self.routers:
            router.close()
        self.sidecar.close()


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Told]]:
    made: list[Told] = []

    def make(*flags: str, **config: Any) -> Told:
        made.append(Told(tmp_path, *flags, **config))
        made[-1].sidecar.start()
        return made[-1]

    yield make
    for each in made:
        each.close()


def random_run(told: Told, client: CacheClient, seed: int, turns: int) -> None:
    """Prompts that share beginnings, look-ups that let blocks rise, now and then a clear."""
    draw = random.Random(seed)
    prompts: list[np.ndarray[Any, np.dtype[np.uint32]]] = []
    digest = namespace().digest()
    for _ in range(turns):
        base = draw.choice(prompts) if prompts and draw.random() < 0.6 else np.empty(0, "<u4")
        cut = draw.randrange(len(base) // BLOCK_TOKENS + 1) * BLOCK_TOKENS
        fresh = [draw.randrange(50000) for _ in range(draw.randrange(1, 12) * BLOCK_TOKENS)]
        tokens = np.concatenate([base[:cut], np.array(fresh, "<u4")])
        prompts.append(tokens)
        keys = block_keys(digest, tokens, BLOCK_TOKENS)
        found = client.lookup(keys).blocks
        client.touch(keys, found)
        if draw.random() < 0.5:
            client.prefetch(keys, found)
        payload = np.full(namespace().format.payload_bytes, draw.randrange(256), np.uint8)
        items = [
            StoreItem(
                key, keys[i - 1] if i else NO_KEY, digest, i,
                tokens[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS].tobytes(), payload,
            )
            for i, key in enumerate(keys)
        ]  # fmt: skip
        told.put(client, items[found:])


def test_a_router_knows_the_tiers_after_evictions_sinks_rises_a_crash_and_a_clear(
    begin: Callable[..., Told],
) -> None:
    told = begin(*FLASH)
    router = told.router()
    router.snapshot()
    client = told.sidecar.client()
    random_run(told, client, 1, 60)
    told.agrees(router)
    media = {medium for _, medium in router.copies}
    assert media == {CPU, STORAGE}
    stored, removed = router.heard["BlockStored", CPU], router.heard["BlockRemoved", CPU]
    assert stored > removed > 20, "nothing was evicted"
    risen = told.rise(client)
    router.listen(lambda: (risen, CPU) in router.copies)
    told.agrees(router)
    assert router.gaps == 0

    told.sidecar.kill()
    told.sidecar.start()
    router.listen(lambda: router.gaps == 1)  # replayed: cleared, and what was found on flash
    assert client.wait_attached(10.0)
    told.agrees(router)
    assert {medium for _, medium in router.copies} == {STORAGE}
    fresh = told.router()  # has never heard of these blocks, and hears their tokens
    fresh.snapshot()
    fresh.listen(lambda: {each for each, _ in fresh.copies} <= fresh.tokens.keys())
    told.agrees(fresh)
    random_run(told, client, 2, 30)
    told.agrees(router)

    with told.sidecar.channel() as channel:
        cache_pb2_grpc.CacheStub(channel).Clear(cache_pb2.ClearRequest())
    told.agrees(router)
    assert not router.copies


def test_a_late_subscriber_gets_everything_by_a_snapshot_or_by_a_replay_from_before_the_buffer(
    begin: Callable[..., Told],
) -> None:
    told = begin(*FLASH, buffer_steps=3)
    client = told.sidecar.client()
    random_run(told, client, 3, 40)
    early = told.router()
    early.snapshot()
    told.agrees(early)

    late = told.router()
    late.snapshot()
    assert late.copies == early.copies
    vllms = told.router()  # knows replay only
    numbers = vllms.replay(0)
    assert numbers == sorted(set(numbers)), "a subscriber drops what does not come in order"
    assert vllms.copies == early.copies
    for router in (late, vllms):
        random_run(told, client, 4, 5)
        told.agrees(router)
    assert told.router().replay(1 << 62) == []
    assert told.sidecar.stop() == 0
    early.listen(lambda: not early.copies)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """A sidecar that several tests use, each with other prompts."""
    told = Told(tmp_path_factory.mktemp("told"))
    told.sidecar.start()
    yield told
    told.close()


def test_a_gap_is_seen_and_replayed(told: Told) -> None:
    router = told.router()
    router.snapshot()
    client = told.sidecar.client()
    random_run(told, client, 5, 10)
    told.agrees(router)
    for lost in (2, 1):
        gaps, router.lose = router.gaps, lost
        random_run(told, client, 5 + lost, 10)
        router.listen(lambda gaps=gaps: router.gaps > gaps)  # type: ignore[misc]
        told.agrees(router)
    assert router.lose == 0
    gaps, router.lose = router.gaps, 1  # the last one for now: an empty batch tells of it
    told.put(client, Prompt(1, 1).items)
    router.listen(lambda: router.gaps > gaps)
    told.agrees(router)


def test_a_tenants_blocks_do_not_look_like_everybodys(told: Told) -> None:
    router = told.router()
    router.snapshot()
    client = told.sidecar.client()
    common, own = Prompt(2, 2), Prompt(2, 2, namespace("acme:secret"))
    told.put(client, common.items)
    told.put(client, own.items)
    told.agrees(router)
    name = space_name(namespace("acme:secret").digest())
    assert router.spaces == {hash_of(key): name for key in own.keys}
    assert "acme" not in name


def test_the_metrics_say_what_was_told(told: Told) -> None:
    router = told.router()
    router.snapshot()
    name = 'kvist_kv_event_blocks_total{event="stored",medium="CPU"}'
    before = told.metric(name)
    told.put(told.sidecar.client(), Prompt(3, 3).items)
    told.agrees(router)
    assert told.metric(name) == before + 3
    assert told.metric('kvist_kv_event_answers_total{kind="snapshot"}') >= 1
    assert told.metric("kvist_kv_event_pending") == 0


def test_the_subscriber_in_the_docs_counts_what_is_there(told: Told) -> None:
    told.put(told.sidecar.client(), Prompt(4, 3).items)
    docs = (Path(__file__).parent.parent / "docs" / "events.md").read_text()
    code = docs.split("```python")[1].split("```")[0]
    for address, ours in (("5557", told.endpoint), ("5558", told.replay)):
        assert f"tcp://127.0.0.1:{address}" in code
        code = code.replace(f"tcp://127.0.0.1:{address}", ours)
    reader = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert reader.stdout is not None
        wanted = f"{len(told.copies())} copies of blocks"
        assert any(line.strip() == wanted for line in islice(reader.stdout, 20))
    finally:
        reader.kill()
        reader.communicate()


def test_an_engine_tells_its_pool_and_the_tiers_inside_it(
    tmp_path: Path, start_core: Callable[..., CoreThread]
) -> None:
    config = {"endpoint": f"ipc://{tmp_path}/pub", "replay_endpoint": f"ipc://{tmp_path}/replay"}
    core = start_core(kv_cache_bytes=1 << 20, kv_events_config=json.dumps(config))
    router = Router(config["endpoint"], config["replay_endpoint"])
    router.snapshot()
    try:
        draw = random.Random(1)
        for turn in range(30):
            prompt = [draw.randrange(3, 250) for _ in range(100)]
            core.generate(prompt, 2, salt="acme" if turn == 0 else "")
        core.settle()
        pages = core.parts.pages
        held = {(hash_of(key), GPU) for key in pages._by_key}
        router.listen(lambda: {copy for copy in router.copies if copy[1] == GPU} == held)
        assert pages.registered < 30 * 6, "the pool was large enough for all of it"
        assert not router.strays
        assert {medium for _, medium in router.copies} == {GPU, CPU}
        ids = [router.tokens[each] for each in _chain(router, prompt)]
        assert [t for own in ids for t in own] == prompt[:96]
        assert len(router.spaces) == 6
        assert all(name.startswith("kvist:") for name in router.spaces.values())
    finally:
        router.close()


def _chain(router: Router, prompt: list[int]) -> list[int]:
    """Hashes of a prompt's blocks, found by their tokens alone, as a router does it."""
    chain: list[int] = []
    for start in range(0, 96, 16):
        own = tuple(prompt[start : start + 16])
        above = chain[-1] if chain else None
        (each,) = [h for h, t in router.tokens.items() if t == own and router.parents[h] == above]
        chain.append(each)
    return chain


@pytest.fixture
def start_core(tmp_path: Path) -> Iterator[Callable[..., CoreThread]]:
    running: list[CoreThread] = []

    def make(**more: Any) -> CoreThread:
        given = {
            "model": str(tiny_llama(tmp_path)), "dtype": "float32", "block_tokens": 16,
            "max_num_batched_tokens": 256, "threads": 1, "cache_dram_bytes": 16 << 20,
            "cache_flash_bytes": 0, **more,
        }  # fmt: skip
        parts = open_parts(EngineConfig(**given), Log(io.StringIO()), time.monotonic)
        running.append(CoreThread(tmp_path, parts).start())
        return running[-1]

    yield make
    for core in running:
        core.stop()
