"""The SGLang plugin without SGLang: a real sidecar, real threads, host pools as SGLang lays them
out, and stand-ins for the few of its classes that it is written against (pinned in under_sglang/).
"""

from __future__ import annotations

import mmap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sim import sglang_fixtures as fixtures
from sim.sglang_memory import (
    PAGE,
    PAGES,
    HiCacheStorageExtraInfo,
    HostPool,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    at,
    chain,
    filled,
    make_storage,
    page,
)
from sim.sidecar import Sidecar, wait_until

from kvist.proto.errors import Detached

FLAGS = fixtures.FLAGS
FIRST = HiCacheStorageExtraInfo([])


# Fixtures, and the stand-ins for SGLang around the whole module.
sglang, sidecar, pool, store = fixtures.sglang, fixtures.sidecar, fixtures.pool, fixtures.store


def test_a_page_that_was_flipped_in_the_arena_is_not_there_and_those_before_it_are(
    sidecar: Sidecar, pool: HostPool, store: Any
) -> None:
    keys = chain("flip", 4)
    first = page(pool, 0)
    assert all(store.batch_set_v1(keys, at(0, 1, 2, 3), FIRST))
    flip(sidecar, page(pool, 2))
    before = sidecar_tokens(sidecar, "corrupt")
    assert store.batch_get_v1(keys, at(4, 5, 6, 7), FIRST)[:3] == [True, True, False]
    assert torch.equal(page(pool, 4), first)
    assert sidecar_tokens(sidecar, "corrupt") - before == 2 * PAGE
    wait_until(lambda: store.batch_exists(keys) == 2, "the damaged page to be dropped")
    # What SGLang computes again is stored again.
    assert all(store.batch_set_v1(keys[2:], at(2, 3), HiCacheStorageExtraInfo(keys[:2])))
    assert store.batch_get_v1(keys, at(4, 5, 6, 7), FIRST) == [True] * 4
    assert torch.equal(page(pool, 6), page(pool, 2))


def flip(sidecar: Sidecar, wanted: torch.Tensor) -> None:
    """Change a bit of a page where it lies in the sidecar's memory."""
    content = wanted.view(torch.uint8).numpy().tobytes()
    (path,) = (sidecar.folder / "shm").rglob("arena*")
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        found = mapped.find(content)
        assert found > 0
        mapped[found + len(content) // 2] ^= 1


def sidecar_tokens(sidecar: Sidecar, reason: str) -> float:
    name = f'kvist_miss_tokens_total{{reason="{reason}"}}'
    lines = sidecar.get("metrics").splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_sidecar_that_comes_late_is_taken_up_and_one_that_goes_is_a_miss(tmp_path: Path) -> None:
    late = Sidecar(tmp_path / "late", FLAGS)
    pool = filled(HostPool())
    made = make_storage(late, pool)
    keys = chain("late", 3)
    assert made.batch_exists(keys) == 0
    assert made.batch_set_v1(keys, at(0, 1, 2), FIRST) == [False] * 3
    assert made.batch_get_v1(keys, at(3, 4, 5), FIRST) == [False] * 3
    with pytest.raises(Detached):
        made.clear()
    late.start()
    wait_until(lambda: all(made.batch_set_v1(keys, at(0, 1, 2), FIRST)), "to be attached")
    assert made.batch_get_v1(keys, at(3, 4, 5), FIRST) == [True] * 3
    late.kill()
    wait_until(lambda: made.batch_exists(keys) == 0, "the end to be seen")
    assert made.batch_get_v1(keys, at(6, 7, 8), FIRST) == [False] * 3
    made.close()
    late.close()


def test_killed_amid_gets_and_sets_nothing_wrong_comes_and_nothing_hangs(tmp_path: Path) -> None:
    victim = Sidecar(tmp_path / "victim", FLAGS)
    victim.start()
    pool, done, came, sets = filled(HostPool()), threading.Event(), 0, 0
    made = make_storage(victim, pool)
    wanted = [page(pool, number) for number in range(5)]

    def sets_forever() -> None:
        nonlocal sets
        while not done.is_set():
            sets += sum(made.batch_set_v1(chain(f"kill{sets}", 5), at(0, 1, 2, 3, 4), FIRST))

    thread = threading.Thread(target=sets_forever)
    thread.start()
    for _ in range(4):
        ended = time.monotonic() + 0.25
        while time.monotonic() < ended:
            keys = chain(f"kill{max(0, sets // 5 * 5 - 5)}", 5)
            for number, has in enumerate(made.batch_get_v1(keys, at(5, 6, 7, 8, 9), FIRST)):
                came += has
                assert not has or torch.equal(page(pool, 5 + number), wanted[number])
        victim.kill()
        victim.start()
    done.set()
    thread.join(10.0)
    assert not thread.is_alive()
    assert came > 50
    made.close()
    victim.close()


def test_what_does_not_fit_is_said_not_to_be_stored(tmp_path: Path) -> None:
    small = Sidecar(tmp_path / "small", [*FLAGS, "--dram-bytes", "1MiB"])  # 64 pages
    small.start()
    pool = filled(HostPool())
    made = make_storage(small, pool)
    for prompt in range(6):
        keys = chain(f"full{prompt}", 20)
        numbers = [number % 4 for number in range(20)]
        stored = made.batch_set_v1(keys, at(*numbers), FIRST)
        found = made.batch_exists(keys)
        assert stored == [number < found for number in range(20)]
        assert found == 20  # what is older went
    keys = chain("huge", 100)
    stored = made.batch_set_v1(keys, at(*[number % 4 for number in range(100)]), FIRST)
    assert 0 < sum(stored) <= 64
    assert stored == sorted(stored, reverse=True)
    got = made.batch_get_v1(keys, at(*[4 + number % 4 for number in range(100)]), FIRST)
    assert got == stored
    made.close()
    small.close()


def test_pages_on_flash_begin_to_rise_when_they_are_looked_up(tmp_path: Path) -> None:
    flash = ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "8MiB"]
    slow = Sidecar(tmp_path / "slow", [*FLAGS, *flash, "--flash-admission", "always"])
    slow.start()
    pool = filled(HostPool())
    made = make_storage(slow, pool)
    keys = chain("flash", 6)
    assert all(made.batch_set_v1(keys, at(*range(6)), FIRST))
    slow.stop()  # writes what is in DRAM only to flash
    slow.start()
    wait_until(lambda: made.batch_exists(keys) == 6, "pages on flash to be found")
    wait_until(lambda: gauge(slow, 'kvist_tier_used_slots{tier="dram"}') == 6, "them to rise")
    assert made.batch_get_v1(keys, at(*range(6, 11), 5), FIRST) == [True] * 6
    assert torch.equal(page(pool, 6), page(pool, 0))
    assert gauge(slow, 'kvist_hit_tokens_total{tier="flash"}') == 6 * PAGE
    # And when SGLang asks for them without a look-up before.
    slow.stop()
    slow.start()
    wait_until(lambda: made.batch_get_v1(keys, at(*range(6)), FIRST) == [True] * 6, "pages to rise")
    made.close()
    slow.close()


def gauge(sidecar: Sidecar, name: str) -> float:
    lines = sidecar.get("metrics").splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_page_whose_predecessor_is_gone_begins_a_chain_of_its_own(
    sidecar: Sidecar, pool: HostPool, store: Any
) -> None:
    keys = chain("gone", 8)
    # SGLang has the first three itself and stores what comes behind them, more than once.
    assert all(store.batch_set_v1(keys[3:5], at(3, 4), HiCacheStorageExtraInfo(keys[:3])))
    assert all(store.batch_set_v1(keys[5:6], at(5), HiCacheStorageExtraInfo(keys[:5])))
    assert store.batch_exists(keys[3:]) == 3
    assert store.batch_exists(keys) == 0
    # Another process, which knows nothing of that, has computed all of it.
    other = make_storage(sidecar, pool)
    assert all(other.batch_set_v1(keys, at(*range(8)), FIRST))
    assert other.batch_exists(keys) == 8
    assert all(other.batch_get_v1(keys[:4], at(8, 9, 10, 11), FIRST))
    assert torch.equal(page(pool, 11), page(pool, 3))
    other.close()


def test_without_prefix_keys_pages_are_stored_all_the_same(store: Any) -> None:
    keys = chain("unsaid", 4)
    assert all(store.batch_set_v1(keys[:2], at(0, 1), None))
    assert all(store.batch_set_v1(keys[2:], at(2, 3), HiCacheStorageExtraInfo(None)))
    assert store.batch_exists(keys) == 4


def test_pools_beside_kv_are_found_by_their_policy(sidecar: Sidecar, pool: HostPool) -> None:
    made = make_storage(sidecar, pool)
    side = filled(HostPool("page_head"))
    for _ in range(2):  # SGLang names the pool of KV twice
        made.register_mem_host_pool_v2(pool, PoolName.KV)
    made.register_mem_host_pool_v2(side, PoolName.INDEXER)
    keys = chain("pools", 5)

    def transfer(pages: list[int], keys: list[str]) -> PoolTransfer:
        return PoolTransfer(PoolName.INDEXER, at(*pages), keys)

    assert made.batch_set_v2([PoolTransfer(PoolName.KV, at(0, 1, 2, 3), keys[:4])], FIRST) == {
        PoolName.KV: [True] * 4
    }
    assert made.batch_set_v2([transfer([0, 2], [keys[0], keys[2]])], FIRST) == {
        PoolName.INDEXER: [True] * 2
    }
    everywhere = made.batch_exists_v2(keys, [PoolTransfer(PoolName.INDEXER)], FIRST)
    assert (everywhere.kv_hit_pages, everywhere.restorable_prefix_pages) == (1, [1])
    policy = PoolHitPolicy.TRAILING_PAGES
    tail = PoolTransfer(PoolName.INDEXER, keys=keys[:1], hit_policy=policy)
    trailing = made.batch_exists_v2(keys, [tail], FIRST)
    assert (trailing.kv_hit_pages, trailing.restorable_prefix_pages) == (3, [1, 3])
    assert trailing.extra_pool_hit_pages == {PoolName.KV: 4, PoolName.INDEXER: 3}
    assert made.batch_get_v2([transfer([5, 6], [keys[2], keys[1]])], FIRST) == {
        PoolName.INDEXER: [True, False]
    }
    assert torch.equal(page(side, 5), page(side, 2))
    groups = PoolTransfer(PoolName.INDEXER, hit_policy=PoolHitPolicy.BLOCK_GROUPS)
    with pytest.raises(ValueError, match="BLOCK_GROUPS"):
        made.batch_exists_v2(keys, [groups], FIRST)
    made.close()


def test_single_pages_are_the_same_pages(pool: HostPool, store: Any) -> None:
    keys, target = chain("single", 3), torch.zeros_like(page(pool, 0))
    assert store.batch_set(keys[:2], [page(pool, 3), page(pool, 4)])
    assert store.set(keys[2], page(pool, 5))
    assert [store.exists(key) for key in [*keys, "nobody's"]] == [True] * 3 + [False]
    assert store.get(keys[1], target) is target
    assert torch.equal(target, page(pool, 4))
    assert all(store.batch_get_v1(keys, at(6, 7, 8), FIRST))
    assert torch.equal(page(pool, 8), page(pool, 5))
    assert store.get("nobody's", target) is None
    with pytest.raises(ValueError, match="bytes"):
        store.set(keys[0], target[:5])


def test_clear_drops_what_others_stored_and_nothing_of_another_model(
    sidecar: Sidecar, pool: HostPool, store: Any
) -> None:
    extra = {"kvist.cache": str(sidecar.socket), "kvist.model": "else", "interface_v1": 1}
    other, keys = make_storage(sidecar, pool, extra_config=extra), chain("clear", 3)
    assert all(store.batch_set_v1(keys, at(0, 1, 2), FIRST))
    assert other.batch_exists(keys) == 0
    assert all(other.batch_set_v1(keys, at(0, 1, 2), FIRST))
    twin = make_storage(sidecar, pool)
    twin.clear()
    assert store.batch_exists(keys) == 0
    assert other.batch_exists(keys) == 3
    for one in (other, twin):
        one.close()


def test_what_came_and_went_is_in_sglangs_metrics(store: Any) -> None:
    keys = chain("stats", 3)
    store.batch_set_v1(keys, at(0, 1, 2), FIRST)
    store.batch_get_v1(keys, at(3, 4, 5), FIRST)
    stats = store.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [3])
    assert stats.prefetch_bandwidth[0] > 0
    assert store.get_stats().prefetch_pgs == []


def test_indices_that_are_no_pages_are_refused_and_nothing_is_written(
    pool: HostPool, store: Any
) -> None:
    keys, before = chain("indices", 2), pool.kv_buffer.clone()
    assert all(store.batch_set_v1(keys, at(0, 1), FIRST))
    wrong = [at(3), at(3, 4) + 1, at(3, PAGES), torch.arange(0, 4 * PAGE, 2), at(3, 4).flip(0)]
    for indices in wrong:
        assert store.batch_get_v1(keys, indices, FIRST) == [False, False]
    assert torch.equal(pool.kv_buffer, before)
