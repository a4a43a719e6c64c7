"""The engine's door to a real kvistd: no call on the hot path, and every crash is only a miss."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sim.sidecar import QUIET, Prompt, Sidecar, load_all, namespace, wait_until

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.proto import cache_pb2
from kvist.proto.cache_pb2_grpc import CacheStub
from kvist.proto.errors import ConfigInvalid
from kvist.proto.keys import NO_KEY, BlockKey

HERE = Path(__file__).resolve().parent

# A second worker, in a process of its own: does what its first argument says.
WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from sim.sidecar import QUIET, Prompt, load_all, namespace
from kvist.cachesvc.client import open_cache
from kvist.cachesvc.worker.control import GrpcControl

what, address = sys.argv[2:4]
if what == "hang-in-commit":
    def commit(self, request):
        print("filled", len(request.slots), flush=True)
        time.sleep(60)
    GrpcControl.commit = commit
client = open_cache(address, namespace(), "worker", QUIET)
assert client.wait_attached(10)
prompt = Prompt(7, 6)
if what == "load":
    print(client.tiers(prompt.keys), load_all(client, prompt), flush=True)
else:
    print(client.store(prompt.items), flush=True)
client.close()
"""


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path)
    made.start()
    yield made
    made.close()


def worker(sidecar: Sidecar, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", WORKER, str(HERE), what, sidecar.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=sidecar.folder)


def stats(sidecar: Sidecar) -> cache_pb2.StatsReply:
    with sidecar.channel() as channel:
        return CacheStub(channel).Stats(cache_pb2.StatsRequest(), timeout=5.0)


def test_what_one_process_stores_another_loads(sidecar: Sidecar) -> None:
    client = sidecar.client()
    prompt = Prompt(7, 6)
    result = client.store(prompt.items)
    assert (result.stored, result.present, result.dropped) == (6, 0, {})
    with worker(sidecar, "load") as other:
        out, _ = other.communicate(timeout=30)
    assert out.strip() == f"{('dram',) * 6} {[None] * 6}"


def test_nothing_but_a_store_makes_a_call_and_a_batch_makes_two(sidecar: Sidecar) -> None:
    client = sidecar.client()
    prompt = Prompt(1, 8)
    assert client.rpc_calls == 1  # Attach
    client.store(prompt.items)
    assert client.rpc_calls == 3
    assert client.tiers(prompt.keys) == ("dram",) * 8
    assert load_all(client, prompt) == [None] * 8
    client.touch(prompt.keys, 8)
    client.prefetch(prompt.keys, 8)
    client.count(10, {"dram": 8}, {"tail": 2})
    assert client.store(prompt.items).present == 8
    assert client.rpc_calls == 3
    assert client.bell_failures == 0


def test_lookup_gives_the_longest_prefix_and_why_it_ends(sidecar: Sidecar) -> None:
    client = sidecar.client()
    prompt = Prompt(2, 10)
    client.store(prompt.items[:4])
    found = client.lookup(prompt.keys)
    assert (found.blocks, found.reason) == (4, "never_stored")
    assert client.tiers(prompt.keys) == ("dram",) * 4
    assert client.lookup(prompt.keys[:4]).reason == ""
    assert client.tiers([]) == ()
    assert len(found.epoch) == 16


def test_without_a_sidecar_everything_is_a_miss_and_nothing_raises(tmp_path: Path) -> None:
    client = open_cache(str(tmp_path / "none.sock"), namespace(), "test", QUIET)
    prompt = Prompt(1, 3)
    assert not client.wait_attached(0.3)
    assert client.state == "detached"
    assert client.lookup(prompt.keys).reason == "detached"
    assert load_all(client, prompt) == ["detached"] * 3
    client.touch(prompt.keys, 3)
    client.prefetch(prompt.keys, 3)
    assert client.store(prompt.items).dropped == {"detached": 3}
    client.close()


def test_client_attaches_when_the_sidecar_comes_and_brings_what_it_counted(
    tmp_path: Path,
) -> None:
    sidecar = Sidecar(tmp_path)
    client = open_cache(sidecar.address, namespace(), "early", QUIET)
    client.count(50, {}, {"detached": 50})
    sidecar.start()
    try:
        assert client.wait_attached(2.0)
        wait_until(lambda: stats(sidecar).requested_tokens == 50, "the counts to arrive")
        assert stats(sidecar).miss_tokens["detached"] == 50
    finally:
        client.close()
        sidecar.close()


def test_killed_sidecar_is_noticed_and_the_client_is_back_within_1_s(sidecar: Sidecar) -> None:
    client = sidecar.client()
    prompt = Prompt(3, 4)
    client.store(prompt.items)
    epoch = client.lookup(prompt.keys).epoch

    sidecar.kill()
    wait_until(lambda: client.state == "detached", "the client to notice", 2.0)
    assert client.lookup(prompt.keys).reason == "detached"
    assert load_all(client, prompt) == ["detached"] * 4
    assert client.store(prompt.items).dropped == {"detached": 4}

    # Long enough for every back-off to have grown to its longest.
    time.sleep(1.5)
    sidecar.start()
    assert wait_until(lambda: client.state == "attached", "the client to be back") < 1.0
    assert client.reattaches == 1
    found = client.lookup(prompt.keys)
    assert found.blocks == 0
    assert found.reason == "never_stored"
    assert found.epoch != epoch
    assert client.store(prompt.items).stored == 4
    assert load_all(client, prompt) == [None] * 4


def test_sidecar_that_stops_cleanly_is_noticed_too(sidecar: Sidecar) -> None:
    client = sidecar.client()
    assert sidecar.stop() == 0
    wait_until(lambda: client.state == "detached", "the client to notice", 2.0)


def test_sidecar_killed_amid_loads_and_stores_gives_misses_and_no_wrong_byte(
    sidecar: Sidecar,
) -> None:
    client = sidecar.client()
    shared = Prompt(4, 8)
    client.store(shared.items)
    stop = threading.Event()
    loads: list[str | None] = []
    outcomes: set[str] = set()

    def load() -> None:
        while not stop.is_set():
            loads.extend(load_all(client, shared, wait_s=0.1))  # asserts the bytes

    def store() -> None:
        seed = 100
        while not stop.is_set():
            seed += 1
            outcomes.update(client.store(Prompt(seed, 4).items).dropped)

    threads = [threading.Thread(target=work) for work in (load, load, store)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    sidecar.kill()
    wait_until(lambda: client.state == "detached", "the client to notice", 2.0)
    sidecar.start()
    assert client.wait_attached(5.0)
    stop.set()
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()
    assert None in loads
    assert set(loads) <= {None, "detached", "never_stored", "torn"}
    assert outcomes <= {"detached", "full", "share", "no_parent"}


def test_slots_of_a_worker_killed_between_reserve_and_commit_come_back(
    sidecar: Sidecar,
) -> None:
    client = sidecar.client()
    with worker(sidecar, "hang-in-commit") as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "filled 6"
        assert stats(sidecar).reserved_slots == 6
        assert client.tiers(Prompt(7, 6).keys) == ()
        other.send_signal(signal.SIGKILL)
        other.wait(10.0)
    took = wait_until(lambda: stats(sidecar).reserved_slots == 0, "the slots to come back")
    assert took < 1.0
    assert stats(sidecar).sessions == 1
    assert client.store(Prompt(7, 6).items).stored == 6


def test_damaged_block_is_a_corrupt_miss_and_the_sidecar_drops_it(sidecar: Sidecar) -> None:
    client = sidecar.client()
    prompt = Prompt(5, 3)
    client.store(prompt.items)
    payload = prompt.items[2].payload.tobytes()
    (arena,) = (p for p in (sidecar.folder / "shm").rglob("*") if p.stat().st_size > 1 << 20)
    memory = np.memmap(arena, np.uint8, "r+")
    at = memory.tobytes().index(payload)
    memory[at + 17] ^= 4
    assert load_all(client, prompt) == [None, None, "corrupt"]
    wait_until(lambda: len(client.tiers(prompt.keys)) == 2, "the block to be dropped")
    assert client.store(prompt.items).stored == 1
    assert load_all(client, prompt) == [None] * 3


def test_block_without_its_parent_is_dropped_and_so_are_its_children(sidecar: Sidecar) -> None:
    client = sidecar.client()
    prompt = Prompt(6, 4)
    assert client.store(prompt.items[1:]).dropped == {"no_parent": 3}
    assert client.tiers(prompt.keys) == ()


def test_a_worker_is_told_when_the_index_has_no_room_where_a_key_belongs(sidecar: Sidecar) -> None:
    client = sidecar.client()
    assert client._life is not None
    buckets = client._life.index.buckets
    items = []
    for number in range(1, 13):
        halves = (number * buckets, (number + 99) * buckets)  # both name the first bucket
        key = BlockKey(b"".join(half.to_bytes(8, "little") for half in halves))
        items.append(replace(Prompt(number, 1).items[0], key=key))
    result = client.store(items)
    assert (result.stored, dict(result.dropped)) == (8, {"index_full": 4})


def test_tenants_with_different_salts_never_see_each_others_blocks(sidecar: Sidecar) -> None:
    client = sidecar.client()
    one, two = Prompt(8, 3, namespace("one")), Prompt(8, 3, namespace("two"))
    client.store(one.items)
    assert client.tiers(two.keys) == ()
    mixed = [key for pair in zip(one.keys, two.keys, strict=True) for key in pair]
    assert len(set(mixed)) == 6


def test_more_than_fits_is_stored_or_dropped_with_a_reason_and_what_is_there_is_right(
    sidecar: Sidecar,
) -> None:
    client = sidecar.client()
    prompts = [Prompt(seed, 40) for seed in range(20, 50)]
    for prompt in prompts:
        result = client.store(prompt.items)
        assert result.stored + result.present + sum(result.dropped.values()) == 40
        assert set(result.dropped) <= {"full", "share", "no_parent"}
    seen = [len(client.tiers(prompt.keys)) for prompt in prompts]
    assert seen[-1] == 40
    assert sum(seen) <= stats(sidecar).tiers[0].slots
    assert load_all(client, prompts[-1]) == [None] * 40


def test_blocks_rise_from_flash_after_a_restart_and_load_waits_for_them(tmp_path: Path) -> None:
    flash = ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "8MiB"]
    sidecar = Sidecar(tmp_path, flash)
    sidecar.start()
    try:
        client = sidecar.client()
        prompt = Prompt(9, 6)
        client.store(prompt.items)
        wait_until(lambda: stats(sidecar).tiers[1].used_slots == 6, "the blocks to sink")
        sidecar.stop()
        wait_until(lambda: client.state == "detached", "the client to notice")
        sidecar.start()
        assert client.wait_attached(5.0)
        assert client.tiers(prompt.keys) == ("flash",) * 6
        calls = client.rpc_calls
        client.prefetch(prompt.keys, 6)
        assert load_all(client, prompt) == [None] * 6
        assert client.tiers(prompt.keys) == ("dram",) * 6
        assert client.rpc_calls == calls
    finally:
        sidecar.close()


def test_block_that_nobody_asked_to_rise_is_late(tmp_path: Path) -> None:
    flash = ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "8MiB"]
    sidecar = Sidecar(tmp_path, flash)
    sidecar.start()
    try:
        client = sidecar.client()
        prompt = Prompt(10, 1)
        client.store(prompt.items)
        wait_until(lambda: stats(sidecar).tiers[1].used_slots == 1, "the block to sink")
        sidecar.stop()
        sidecar.start()
        wait_until(lambda: client.reattaches == 1 and client.state == "attached", "the client")
        assert load_all(client, prompt, wait_s=0.05) == ["flash_late"]
    finally:
        sidecar.close()


def test_address_of_another_host_or_of_nothing_is_refused() -> None:
    for address, hint in (("10.0.0.1:9400", "own host"), ("kvist.sock", "absolute path")):
        with pytest.raises(ConfigInvalid, match=hint):
            open_cache(address, namespace(), "test", QUIET)


def test_close_releases_the_session_at_once(sidecar: Sidecar) -> None:
    client: CacheClient = sidecar.client()
    assert stats(sidecar).sessions == 1
    client.close()
    wait_until(lambda: stats(sidecar).sessions == 0, "the session to end", 2.0)
    assert client.lookup([NO_KEY]).reason == "detached"
