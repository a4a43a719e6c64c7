"""A prefix that computes while it rises from flash: a real model, a real cache, a disk that is slow
and fails.

Whatever becomes of the rise, the answer is that of a full computation.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from sim.cached_core import BLOCK_TOKENS, BLOCKS, Cached, prompt
from sim.models import tiny_llama
from sim.sidecar import Sidecar

from kvist.cachesvc.placing import moves
from kvist.cachesvc.worker.cost import Choice
from kvist.cachesvc.worker.loading import LayerLoad
from kvist.proto.record import PAGE_BYTES
from kvist.tiers.segment import DiskIo

SLOT_BYTES = 3 * PAGE_BYTES  # 16 tokens of 512 bytes, and the header
TOKENS = BLOCKS * BLOCK_TOKENS


class SlowDisk:
    """Reads of records take a while, wait or fail.

    Attributes:
        read_s: how long one takes.
        reads: how many there were.
        before: done before each.
    """

    def __init__(self) -> None:
        self.read_s = 0.0
        self.reads = 0
        self.before: Callable[[], object] = int
        self._real = DiskIo.pread

    def __call__(self, disk: DiskIo, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """See DiskIo.pread."""
        if self.read_s:
            self.reads += 1
            self.before()
            time.sleep(self.read_s)
        return self._real(disk, fd, buffers, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    made = SlowDisk()
    monkeypatch.setattr(DiskIo, "pread", lambda *arguments: made(*arguments))
    monkeypatch.setattr(moves, "PART_BYTES", PAGE_BYTES)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture
def sunk(model: str, tmp_path: Path, disk: SlowDisk) -> Iterator[Cached]:
    """Its prompt's blocks are on flash only, and rise slowly."""
    room = 5 * BLOCKS * SLOT_BYTES
    made = Cached(
        model, tmp_path, cache_dram_bytes=room, cache_flash_bytes=64 << 20,
        cache_flash_path=str(tmp_path / "flash"),
    )  # fmt: skip
    push_out(made)
    disk.read_s = 0.0005
    yield made
    disk.read_s = 0.0
    made.core.stop()


def push_out(made: Cached) -> None:
    """Ask for other prompts until the blocks of prompt(1) are nowhere but on flash."""
    weigher = made.core.parts.connector.weigher
    assert weigher is not None
    # A second to rise and one to compute: it goes in as soon as the first parts have come.
    weigher.cost.choose = lambda _first, tiers, *_more: Choice(len(tiers), 0, 1.0, 1.0)  # type: ignore[method-assign]
    for seed in range(10, 40):
        if made.client.tiers(made.keys) == ("flash",) * BLOCKS:
            return
        made.core.generate(prompt(seed), 4, ignore_eos=True)
        made.core.settle()
    raise AssertionError("the blocks stay in DRAM")


def rising(made: Cached) -> int:
    """Loads that followed a rise."""
    made.core.settle()
    return made.core.stats.loads.ways["rising"]


def test_the_first_layers_compute_while_the_later_ones_rise(sunk: Cached, disk: SlowDisk) -> None:
    forward = sunk.core.parts.runner._model.forward
    begun_at: list[int] = []

    def noting(*arguments: object) -> object:
        begun_at.append(disk.reads)
        return forward(*arguments)

    sunk.core.parts.runner._model.forward = noting  # type: ignore[method-assign]
    assert sunk.ask() == (sunk.expected, TOKENS)
    assert rising(sunk) == 1
    assert sunk.core.stats.loads.undone == 0
    assert begun_at[0] < BLOCKS * SLOT_BYTES // PAGE_BYTES, "the step began before all had risen"
    assert sunk.client.tiers(sunk.keys) == ("dram",) * BLOCKS


def test_damage_that_is_found_with_the_last_part_reaches_no_answer(
    sunk: Cached, tmp_path: Path
) -> None:
    slot = sunk.place(17).flash
    assert slot is not None
    (segment,) = (tmp_path / "flash").glob("*/segment-00000")
    with segment.open("r+b") as file:
        file.seek(slot * SLOT_BYTES + 2 * PAGE_BYTES + 40)
        file.write(b"\x7f\xff" * 8)
    assert sunk.ask() == (sunk.expected, 17 * BLOCK_TOKENS)
    assert rising(sunk) == 1
    assert sunk.core.stats.loads.undone == 1
    sunk.core.settle()
    assert sunk.core.stats.misses_tokens["corrupt"] > 0
    # Neither the pool nor the cache has kept anything of it.
    assert sunk.ask()[0] == sunk.expected


def at_first_layers(made: Cached, act: Callable[[], object]) -> None:
    """Do something when the first layers of all blocks have come."""
    stream = made.client.stream

    def reached(load: LayerLoad, layers: int) -> None:
        if layers == load.cuts[0]:
            act()
        load.reached(layers)

    def acting(load: LayerLoad) -> tuple[int, str]:
        return stream(dataclasses.replace(load, reached=functools.partial(reached, load)))

    made.client.stream = acting  # type: ignore[method-assign]


def test_a_disk_that_fails_amid_the_rise_costs_a_computation(sunk: Cached, disk: SlowDisk) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "the test was asked to fail")

    at_first_layers(sunk, lambda: setattr(disk, "before", fail))
    answer, cached = sunk.ask()
    assert answer == sunk.expected
    assert cached < TOKENS
    assert rising(sunk) == 1
    assert sunk.core.stats.loads.undone == 1
    sunk.core.parts.pages.check({})


def test_a_disk_that_hangs_amid_the_rise_holds_the_step_up_for_a_bounded_time(
    sunk: Cached, disk: SlowDisk
) -> None:
    go = threading.Event()
    weigher = sunk.core.parts.connector.weigher
    assert weigher is not None
    weigher.cost.choose = lambda _first, tiers, *_more: Choice(len(tiers), 0, 0.05, 1.0)  # type: ignore[method-assign]
    at_first_layers(sunk, lambda: setattr(disk, "before", lambda: go.wait(30)))
    answer, cached = sunk.ask()
    go.set()
    assert answer == sunk.expected
    assert cached < TOKENS
    assert rising(sunk) == 1
    assert sunk.core.stats.misses_tokens["flash_late"] > 0


def test_a_clear_amid_the_rise_costs_a_computation(sunk: Cached) -> None:
    at_first_layers(sunk, sunk.client.clear)
    answer, cached = sunk.ask()
    assert answer == sunk.expected
    assert cached < TOKENS
    assert sunk.ask()[0] == sunk.expected
    sunk.core.parts.pages.check({})


def test_an_abort_amid_the_rise_frees_the_pages_and_the_next_one_is_served(sunk: Cached) -> None:
    began, go = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        assert go.wait(30)

    at_first_layers(sunk, hold)
    request = sunk.submit()
    assert began.wait(30)
    sunk.core.send_abort(request)
    go.set()
    assert sunk.core.last(request).finish_reason == "abort"
    sunk.core.settle()
    sunk.core.parts.pages.check({})
    assert sunk.ask()[0] == sunk.expected


def test_an_abort_while_its_blocks_are_waited_for_leaves_nothing(
    sunk: Cached, disk: SlowDisk
) -> None:
    go = threading.Event()
    disk.before = lambda: go.wait(30)
    request = sunk.submit()
    # It waits in the queue, and as nobody else computes soon at its gate.
    sunk.core.wait(lambda: sunk.core.stats.waiting_deferred + sunk.core.stats.running == 1)
    sunk.core.send_abort(request)
    assert sunk.core.last(request).finish_reason == "abort"
    go.set()
    sunk.core.settle()
    sunk.core.parts.pages.check({})
    assert sunk.core.stats.waiting_deferred == 0
    assert sunk.ask()[0] == sunk.expected


def test_told_not_to_overlap_it_waits_for_whole_blocks(sunk: Cached) -> None:
    weigher = sunk.core.parts.connector.weigher
    assert weigher is not None
    weigher.by_layers = False
    assert sunk.ask() == (sunk.expected, TOKENS)
    assert rising(sunk) == 0


SLOW = """
import sys, time
from kvist.cachesvc.__main__ import main
from kvist.cachesvc.placing import moves
from kvist.tiers.segment import DiskIo

read = DiskIo.pread

def slow(*arguments):
    time.sleep(0.002)
    return read(*arguments)

moves.PART_BYTES, DiskIo.pread = 4096, slow
sys.exit(main())
"""


def test_a_sidecar_that_is_killed_amid_a_rise_costs_a_computation(
    model: str, tmp_path: Path
) -> None:
    room = str(5 * BLOCKS * SLOT_BYTES)
    flags = ["--flash-bytes", "64MiB", "--flash-path", str(tmp_path / "flash"), "--dram-bytes"]
    sidecar = Sidecar(tmp_path / "sidecar", [*flags, room], (sys.executable, "-P", "-c", SLOW))
    sidecar.start()
    made = Cached(model, tmp_path, sidecar.address)
    push_out(made)
    at_first_layers(made, sidecar.kill)
    answer, cached = made.ask()
    assert answer == made.expected
    assert cached < TOKENS
    assert rising(made) == 1
    misses = made.core.stats.misses_tokens
    assert misses.get("detached", 0) + misses.get("flash_late", 0) >= TOKENS - cached
    made.core.parts.pages.check({})
    made.core.stop()
    sidecar.close()
