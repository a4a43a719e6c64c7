"""Blocks between the arena and pages of a device, whose copies happen behind the host's back.

Without a GPU a stand-in makes every copy late, and the mistakes that it is there to show are
planted here: a wait that is left out gives wrong bytes, every time.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sim.blocks import SHAPE, SLOT_BYTES, Block, empty, make_block
from sim.core_thread import CoreThread, make_parts
from sim.device import interpreted, on_gpu
from sim.fake_model import BLOCK_TOKENS, FORMAT, FakeDeviceModel, config, continuation

from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.embedded import DirectControl, StoreConfig
from kvist.cachesvc.log import Log
from kvist.engine.trial_page import PoolPage
from kvist.engine.weighing import Weigher
from kvist.proto.errors import BlockCorrupt, BlockTorn
from kvist.proto.keys import Namespace
from kvist.proto.record import Bytes
from kvist.tiers.dram import DramTier
from kvist.transfer import delayed, pages
from kvist.transfer.cuda import CudaCopies
from kvist.transfer.delayed import DelayedCopies
from kvist.transfer.pages import DevicePages, DeviceSource, DeviceTarget, Pins
from kvist.transfer.pipeline import LayerStream
from kvist.transfer.shm import ArenaMap

SLOTS, PAGES = 6, 8
PAYLOAD = SHAPE.payload_bytes
LAYERS = 6
LATE_S = 0.02


def _nothing(*_: object) -> None:
    """No wait, or one that was forgotten."""


class Bench:
    """An arena, pages of a device, and what moves blocks between them."""

    def __init__(self, folder: Path, kind: str, pinned: bool) -> None:
        self.tier = DramTier(folder / "arena", SLOTS, SLOT_BYTES)
        self.arena = ArenaMap(self.tier.path, SLOT_BYTES, SLOTS)
        device = "cuda" if kind == "cuda" else "cpu"
        self.pool = torch.zeros(PAGES, PAYLOAD, dtype=torch.uint8, device=device)
        self.copies: Any = CudaCopies(self.pool) if kind == "cuda" else self._late()
        self.sync = torch.cuda.synchronize if kind == "cuda" else _nothing
        self.told: list[tuple[int, int, str]] = []
        self.pages = DevicePages(self.copies, PAYLOAD, lambda *one: self.told.append(one))
        if pinned:
            self.arena.prefault(Event(), self.pages)

    def _late(self) -> DelayedCopies:
        return DelayedCopies(self.pool, LATE_S)

    def put(self, number: int) -> tuple[int, Block]:
        """A block in a slot."""
        slot, block = self.tier.allocate(), make_block(number)
        self.tier.write(slot, block.header, block.payload)
        return slot, block

    def page(self, page: int) -> Bytes:
        """What is in a page now."""
        return self.pool[page].cpu().numpy()

    def close(self) -> None:
        self.arena.unpin(self.pages)
        if isinstance(self.copies, DelayedCopies):
            self.copies.close()
        self.arena.close()
        self.tier.close()


KINDS = ["stand-in", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["pinned", "staged"])
def bench(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    # Several parts to a block, and more than there are.
    monkeypatch.setattr(pages, "STAGING_BYTES", PAYLOAD // 5 + 1)
    # A device cannot pin every file, but those of /dev/shm.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        made = Bench(Path(folder), kind, request.param)
        if request.param:
            assert made.told[-1] == (SLOTS * SLOT_BYTES, SLOTS * SLOT_BYTES, "")
        yield made
        made.close()


def test_a_block_is_in_its_page_when_the_read_returns(bench: Bench) -> None:
    slot, block = bench.put(1)
    bench.arena.read(slot, block.wanted, bench.pages.target(3))
    assert np.array_equal(bench.page(3), block.payload)
    assert not bench.page(2).any()
    assert not bench.page(4).any()


def test_a_copy_is_late_and_reads_a_pinned_source_when_it_happens(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "stand-in", pinned=True)
    slot, block = bench.put(1)
    reader = bench.arena.reader(slot, block.wanted)
    target = bench.pages.target(0)
    assert not target.take(reader.payload, 0, None), "the source is to be summed"
    assert not bench.page(0).any()
    reader.payload[0] ^= 1
    target.settle()
    assert np.array_equal(bench.page(0), reader.payload)
    bench.close()


def test_what_is_staged_may_change_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "stand-in", pinned=False)
    source = np.arange(PAYLOAD).astype(np.uint8)
    target, kept = bench.pages.target(0), source.copy()
    assert target.take(source, 0, None)
    source[:] = 0
    assert not bench.page(0).any()
    target.settle()
    assert np.array_equal(bench.page(0), kept)
    bench.close()


def test_a_flipped_bit_is_found_before_the_read_returns(bench: Bench) -> None:
    slot, block = bench.put(1)
    bench.arena.reader(slot, block.wanted).payload[77] ^= 1
    with pytest.raises(BlockCorrupt):
        bench.arena.read(slot, block.wanted, bench.pages.target(3))


def streamed(bench: Bench, count: int) -> tuple[LayerStream, list[tuple[int, Block]]]:
    """A load of blocks into pages from 0 on, layer by layer."""
    there = [bench.put(number) for number in range(count)]
    readers = [bench.arena.reader(slot, block.wanted) for slot, block in there]
    outs = [bench.pages.target(page) for page in range(count)]
    return LayerStream(readers, outs, [True] * count, lambda: False), there


def test_when_a_mark_is_passed_the_layers_before_it_are_there_of_all_blocks(bench: Bench) -> None:
    stream, there = streamed(bench, 3)
    marks = [(layers, bench.pages.mark()) for layers in stream.copy((1, 4, 6), lambda _count: None)]
    for layers, mark in marks:
        mark.wait()
        end = layers * PAYLOAD // LAYERS
        for page, (_, block) in enumerate(there):
            assert np.array_equal(bench.page(page)[:end], block.payload[:end])
    assert stream.verdict() == (3, None)


def test_a_slot_that_is_rewritten_while_a_device_copies_is_torn(bench: Bench) -> None:
    stream, there = streamed(bench, 3)
    list(stream.copy((1, 6), lambda _count: None))
    slot = there[1][0]
    # As a writer does it that got the slot for another block.
    bench.arena._slot(slot).cast("Q")[0] += 2
    blocks, error = stream.verdict()
    assert blocks == 1
    assert isinstance(error, BlockTorn)


def test_a_page_goes_into_a_reserved_slot_and_comes_back(bench: Bench) -> None:
    block, slot = make_block(5), bench.tier.allocate()
    bench.pool[2] = torch.from_numpy(block.payload.copy()).to(bench.pool.device)
    bench.sync()  # a store begins when the step has landed
    source = bench.pages.source(2)
    place = bench.arena.begin_fill(slot, len(block.header.tokens), source)
    source.settle()
    assert np.array_equal(place, block.payload)
    bench.arena.end_fill(slot, block.header)
    bench.tier.publish(slot)
    out = empty(block)
    bench.arena.read(slot, block.wanted, out)
    assert np.array_equal(out, block.payload)


def test_the_arena_is_pinned_in_chunks_of_whole_slots_and_unpinned_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "PIN_BYTES", 2 * SLOT_BYTES + 5)
    bench = Bench(tmp_path, "stand-in", pinned=True)
    assert list(bench.copies.registered.values()) == [2 * SLOT_BYTES] * 3
    assert bench.told == [(n * SLOT_BYTES, SLOTS * SLOT_BYTES, "") for n in (2, 4, 6)]
    bench.close()
    assert bench.copies.registered == {}


def test_memory_that_cannot_be_pinned_is_told_of_once_and_copied_through_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_copies: DelayedCopies, _address: int, _count: int) -> None:
        raise OSError("no more")

    monkeypatch.setattr(DelayedCopies, "register", refuse)
    bench = Bench(tmp_path, "stand-in", pinned=True)
    assert bench.told == [(0, SLOTS * SLOT_BYTES, "no more")]
    slot, block = bench.put(1)
    bench.arena.read(slot, block.wanted, bench.pages.target(3))
    assert np.array_equal(bench.page(3), block.payload)
    bench.close()


def test_what_cuda_says_against_pinning_is_told_in_its_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(code: int) -> None:
        raise RuntimeError(f"part or all of the requested memory range is already mapped ({code})")

    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 712)
    for name, stand_in in (
        ("cudart", lambda: runtime),
        ("check_error", refuse),
        ("device", lambda _device: contextlib.nullcontext()),
        ("synchronize", _nothing),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    copies = CudaCopies(torch.zeros(2, 16))
    with pytest.raises(OSError, match=r"cudaHostRegister of 64 bytes: .* already mapped \(712\)"):
        copies.register(4096, 64)


def test_where_the_order_of_accesses_is_not_kept_what_is_copied_is_what_is_summed(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, "stand-in", pinned=True)
    slot, block = bench.put(1)
    payload = bench.arena.reader(slot, block.wanted).payload
    for machine, reached in (("x86_64", True), ("aarch64", False)):
        ends = DevicePages(bench.copies, PAYLOAD, lambda *_: None, machine)
        ends.pins = bench.pages.pins
        assert ends.reads(payload) == reached
    bench.close()


def test_a_copy_across_two_pinned_ranges_is_not_taken_for_pinned() -> None:
    memory = np.zeros(100, np.uint8)
    start, pins = memory.ctypes.data, Pins()
    pins.add(start, 40)
    pins.add(start + 40, 40)
    assert pins.covers(memory[:40])
    assert pins.covers(memory[40:80])
    for outside in (memory[30:50], memory[70:90], memory[80:]):
        assert not pins.covers(outside)
    assert pins.remove(start + 40, 40) == [start + 40]
    assert not pins.covers(memory[40:41])


# An engine, with the real cache in its process.

NAMESPACE = Namespace("fake", FORMAT, "none", "float32")
LENGTH, COUNT = 58, 3
Outcome = tuple[bool, int, dict[str, int]]


def prompt(seed: int) -> list[int]:
    return [(seed + 7 * i) % 251 for i in range(LENGTH)]


def outcome(folder: Path, by_layers: bool, delay_s: float = 0.001) -> Outcome:
    """Ask, push the prompt's pages out of the pool, ask again: whether all answers were right,
    tokens that came from DRAM, misses of the whole run."""
    store = StoreConfig(folder, folder, 4 << 20, None, 0, None)
    client = CacheClient(
        DirectControl(store, Log(io.StringIO())), NAMESPACE, "w", Log(io.StringIO())
    )
    model = FakeDeviceModel(config())
    parts = make_parts(model, NAMESPACE, 64, client, delay_s)
    ends = parts.connector._copies
    assert isinstance(ends, DevicePages)
    client.trial = PoolPage(FORMAT, pinner=ends)
    client.start()
    assert client.wait_attached(10.0)
    parts.connector.weigher = Weigher(1, FORMAT.payload_bytes, BLOCK_TOKENS)
    parts.connector.weigher.by_layers = by_layers
    right = True
    with CoreThread(folder, parts, async_scheduling=True) as core:
        for seed in (1, 2, 3, 4, 5, 6, 1):
            right &= core.generate(prompt(seed), COUNT) == continuation(prompt(seed), COUNT)
            core.settle()
        ways = core.stats.loads.ways
        assert (ways["layers"] > 0) == by_layers or not right
        return right, core.stats.hits_tokens.get("dram", 0), core.stats.misses_tokens


@interpreted
@pytest.mark.parametrize("by_layers", [True, False], ids=["by layers", "whole blocks"])
def test_a_prefix_comes_back_from_dram_and_the_answer_is_the_same(
    tmp_path: Path, by_layers: bool
) -> None:
    right, dram, misses = outcome(tmp_path, by_layers)
    assert right
    assert dram == 56
    assert set(misses) == {"never_stored", "tail"}


FORGOTTEN: list[tuple[str, bool, Callable[[pytest.MonkeyPatch], None]]] = [
    ("a layer", True, lambda patch: patch.setattr(delayed.DelayedMark, "hold", _nothing)),
    ("a load", False, lambda patch: patch.setattr(DeviceTarget, "settle", _nothing)),
    ("a store", False, lambda patch: patch.setattr(DeviceSource, "settle", _nothing)),
]


@interpreted
@pytest.mark.parametrize(
    ("by_layers", "forget"), [one[1:] for one in FORGOTTEN], ids=[one[0] for one in FORGOTTEN]
)
def test_a_wait_that_is_forgotten_is_found_out(
    tmp_path: Path,
    by_layers: bool,
    forget: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget(monkeypatch)
    right, dram, misses = outcome(tmp_path, by_layers, LATE_S)
    assert not right or dram < 56 or "corrupt" in misses
    time.sleep(LATE_S)
