"""The trial before the first hit: what passes, what does not, and that nothing is left of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sim.direct import WAIT_S, StoreControl
from sim.sidecar import Prompt, Sidecar, load_all, namespace, wait_until
from sim.stores import Bench

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.log import Log
from kvist.engine.trial_page import PoolPage
from kvist.proto.keys import Namespace
from kvist.proto.layout import BlockFormat, pattern
from kvist.proto.record import Bytes
from kvist.transfer.shm import ArenaMap

FORMATS = [
    BlockFormat(3, 2, 8, "bfloat16", 4),
    BlockFormat(1, 1, 1, "float32", 1),
    BlockFormat(5, 3, 64, "float16", 16, first_layer=7, first_head=2),
    BlockFormat(2, 2, 16, "float32", 16),
    BlockFormat(3, 2, 64, "float8_e4m3fn", 16, first_layer=1),
]


class TurnedPage(PoolPage):
    """A worker whose pages have token and head the other way round."""

    def written(self) -> Bytes:
        """Made by the wrong indices."""
        format = self._format
        right = (
            super()
            .written()
            .view("<i4")
            .reshape(format.layers, 2, format.kv_heads, format.block_tokens, format.head_dim)
        )
        return np.ascontiguousarray(right.swapaxes(2, 3)).reshape(-1).view(np.uint8)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=16, flash_slots=24)
    made.open()
    yield made
    made.close()


def client_of(
    bench: Bench, page: PoolPage, of: Namespace, log: io.StringIO
) -> tuple[CacheClient, StoreControl]:
    control = StoreControl(bench.store)
    client = CacheClient(control, of, "trial", Log(log, "info"))
    client.trial = page
    client.start()
    return client, control


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_page_made_by_the_models_indices_is_the_pattern_of_its_format(
    format: BlockFormat,
) -> None:
    page = PoolPage(format)
    payload = pattern(format)
    assert np.array_equal(page.written(), payload)
    assert page.reads(payload)
    for at in (0, payload.size // 2, payload.size - 1):
        other = payload.copy()
        other[at] ^= 1
        assert not page.reads(other)


def test_formats_that_differ_in_one_thing_have_patterns_that_differ() -> None:
    base = {"layers": 2, "kv_heads": 4, "head_dim": 4, "dtype": "float16", "block_tokens": 4}
    narrow = {**base, "head_dim": 8, "dtype": "float8_e4m3fn"}
    same_size = [
        BlockFormat(**base),  # type: ignore[arg-type]
        BlockFormat(**{**base, "layers": 4, "kv_heads": 2}),  # type: ignore[arg-type]
        BlockFormat(**{**base, "head_dim": 8, "block_tokens": 2}),  # type: ignore[arg-type]
        BlockFormat(**{**base, "head_dim": 2, "dtype": "float32"}),  # type: ignore[arg-type]
        BlockFormat(**narrow),  # type: ignore[arg-type]
        BlockFormat(**{**narrow, "kv_heads": 2, "block_tokens": 8}),  # type: ignore[arg-type]
        BlockFormat(**{**narrow, "layers": 4, "block_tokens": 2}),  # type: ignore[arg-type]
        BlockFormat(**base, first_layer=2),  # type: ignore[arg-type]
        BlockFormat(**base, first_head=4),  # type: ignore[arg-type]
    ]
    assert len({pattern(format).tobytes() for format in same_size}) == len(same_size)


def test_a_worker_that_passes_is_attached_and_nothing_is_left(bench: Bench) -> None:
    log, of = io.StringIO(), namespace()
    client, control = client_of(bench, PoolPage(of.format), of, log)
    assert client.wait_attached(WAIT_S)
    assert control.calls == 1 + 3, "Attach; Reserve, Commit, Clear"
    bench.settle()
    stats = bench.store.stats()
    assert (stats.blocks, stats.reserved_slots) == (0, 0)
    assert [use.used_slots for use in stats.tiers] == [0, 0]
    assert bench.parts.placement.counts.flash_written == 0
    assert stats.tiers[0].written_blocks == stats.events["offers_reserved"] == 0, "no traffic"
    assert stats.counters["stored_bytes"] == 0
    client.close()


def test_a_worker_with_other_pages_than_it_says_runs_without_the_cache(bench: Bench) -> None:
    log, of = io.StringIO(), namespace()
    client, _ = client_of(bench, TurnedPage(of.format), of, log)
    wait_until(lambda: "cache not used" in log.getvalue(), "the trial")
    assert log.getvalue().count("cache not used") == 1
    assert "do not lie as its namespace says" in log.getvalue()
    prompt = Prompt(1, 4, of)
    assert client.state == "detached"
    assert client.lookup(prompt.keys).reason == "self_test"
    assert client.store(prompt.items).dropped == {"detached": 4}
    assert bench.store.stats().blocks == 0
    client.close()


def test_bytes_that_come_back_otherwise_are_a_failed_trial(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ArenaMap.read

    def wrong(*arguments: object) -> None:
        read(*arguments)  # type: ignore[arg-type]
        out = arguments[3]
        assert isinstance(out, np.ndarray)
        out[7] ^= 1

    monkeypatch.setattr(ArenaMap, "read", wrong)
    log, of = io.StringIO(), namespace()
    client, _ = client_of(bench, PoolPage(of.format), of, log)
    wait_until(lambda: "cache not used" in log.getvalue(), "the trial")
    assert "came back with other bytes" in log.getvalue()
    assert bench.store.stats().blocks == 0
    client.close()


def test_a_trial_for_which_there_is_no_slot_is_made_again_later(bench: Bench) -> None:
    log, of = io.StringIO(), namespace()
    bench.store._made.placement.dram._free.count, free = 0, 16
    client, _ = client_of(bench, PoolPage(of.format), of, log)
    wait_until(lambda: "no block could be stored for a trial" in log.getvalue(), "a try")
    assert client.lookup(Prompt(1, 1, of).keys).reason == "detached"
    bench.store._made.placement.dram._free.count = free
    assert client.wait_attached(WAIT_S)
    client.close()


def test_workers_of_a_real_sidecar_pass_one_beside_the_other(tmp_path: Path) -> None:
    sidecar, log = Sidecar(tmp_path), io.StringIO()
    sidecar.start()
    try:
        of = namespace()
        clients = [
            open_cache(sidecar.address, of, f"w{number}", Log(log, "info"), PoolPage(of.format))
            for number in range(4)
        ]
        assert all(client.wait_attached(10.0) for client in clients), log.getvalue()
        prompt = Prompt(3, 6)
        assert clients[0].store(prompt.items).stored == 6
        assert load_all(clients[3], prompt) == [None] * 6
        assert "cleared" not in sidecar.text(), "a self test is no incident"
        for client in clients:
            client.close()
    finally:
        sidecar.close()
