"""verify = always, sampled, off: what is checked, what is never served, what becomes of slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sim.blocks import SLOT_BYTES, Block, empty, make_block
from sim.flash import open_tier, store
from sim.sidecar import Prompt, Sidecar, load_all, wait_until
from sim.stores import Bench, Worker, chain, check, keys_of, store_settled, tree_block

from kvist.proto.errors import BlockCorrupt, ConfigInvalid, FormatRefused
from kvist.proto.record import NOT_SUMMED, checksum, unpack_header
from kvist.proto.shm import CORRUPT
from kvist.proto.verify import SAMPLE_EVERY, VERIFY, Verifier, Verify, checked_dram_verify
from kvist.tiers.slots import FreeSlots


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=16, flash_slots=48)
    yield made
    check(made)
    made.close()


def unsummed(block: Block) -> Block:
    return Block(replace(block.header, checksum=NOT_SUMMED), block.payload)


def flip_in_dram(bench: Bench, block: Block) -> int:
    location = bench.parts.index.find(block.header.key)
    assert location is not None
    assert location.dram is not None
    bench.parts.dram.slot_view(location.dram)[5000] ^= 0xFF
    return location.dram


def wrong_reads(worker: Worker, block: Block, mode: Verify, reads: int) -> int:
    """How many reads of a damaged block are not served."""
    verify, caught = Verifier(mode), 0
    location = worker.index.find(block.header.key)
    assert location is not None
    assert location.dram is not None
    for _ in range(reads):
        try:
            worker.arena.read(location.dram, block.wanted, empty(block), verify.wanted())
        except BlockCorrupt:
            caught += 1
    return caught


@pytest.mark.parametrize(("mode", "caught"), [("always", 64), ("sampled", 4), ("off", 0)])
def test_a_damaged_payload_is_caught_as_often_as_the_setting_says(
    bench: Bench, mode: Verify, caught: int
) -> None:
    bench.open(dram_verify=mode)
    worker, block = bench.worker(), tree_block(1)
    assert worker.index.dram_verify == mode
    worker.put([block])
    bench.settle()
    flip_in_dram(bench, block)
    assert SAMPLE_EVERY == 16
    assert wrong_reads(worker, block, mode, 64) == caught


@pytest.mark.parametrize("mode", VERIFY)
def test_another_block_is_never_served_whatever_the_setting(bench: Bench, mode: Verify) -> None:
    bench.open(dram_verify=mode)
    worker, block = bench.worker(), tree_block(1)
    worker.put([block])
    slot = bench.parts.index.find(block.header.key)
    assert slot is not None
    assert slot.dram is not None
    for wanted in (
        block.wanted_but(key=make_block(2).header.key),
        block.wanted_but(namespace=bytes(32)),
        block.wanted_but(tokens=bytes(len(block.header.tokens))),
    ):
        with pytest.raises(BlockCorrupt):
            worker.arena.read(slot.dram, wanted, empty(block), False)
    bench.parts.dram.slot_view(slot.dram)[90] ^= 1  # depth, covered by the header's own check
    with pytest.raises(BlockCorrupt, match="header checksum"):
        worker.arena.read(slot.dram, block.wanted, empty(block), False)
    bench.parts.dram.slot_view(slot.dram)[90] ^= 1


def test_a_block_without_a_sum_gets_one_on_flash_and_is_checked_when_it_rises(
    bench: Bench,
) -> None:
    bench.open(dram_verify="off")
    worker = bench.worker()
    blocks = chain(0, 4)
    assert worker.put([unsummed(block) for block in blocks]) == ["stored"] * 4
    bench.settle()
    assert bench.parts.placement.counts.flash_written == 4
    for first in (100, 200):  # push them out of DRAM
        store_settled(bench, worker, first, 8)
    assert bench.tiers(blocks) == ["flash"] * 4
    bench.store.prefetch(keys_of(blocks))
    bench.run_until(lambda: bench.tiers(blocks) == ["dram"] * 4)
    for block in blocks:
        assert worker.reads(block)  # compares the sum, which can only have been made on the way
    bench.settle()


def test_a_stream_gets_a_sum_too(bench: Bench) -> None:
    bench.open(dram_verify="off")
    worker, block = bench.worker(), tree_block(1)
    worker.put([unsummed(block)])
    future = bench.parts.moves.read(block.header.key)
    bench.settle()
    header = unpack_header(future.result(1.0))
    assert header.checksum == checksum(block.payload)


def test_a_sound_block_without_a_sum_survives_a_report_and_a_damaged_header_does_not(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, dram_slots=8)
    bench.open(dram_verify="off")
    worker = bench.worker()
    blocks = chain(0, 3)
    worker.put([unsummed(block) for block in blocks])
    worker.ring.push(CORRUPT, 1, blocks[1].header.key)
    bench.store.tick()
    assert bench.tiers(blocks) == ["dram"] * 3
    location = bench.parts.index.find(blocks[1].header.key)
    assert location is not None
    assert location.dram is not None
    bench.parts.dram.slot_view(location.dram)[90] ^= 1
    worker.ring.push(CORRUPT, 1, blocks[1].header.key)
    bench.store.tick()
    assert bench.tiers(blocks) == ["dram"]
    check(bench)
    bench.close()


@pytest.mark.parametrize(("mode", "caught"), [("always", 32), ("sampled", 2), ("off", 0)])
def test_flash_checks_payloads_as_often_as_its_setting_says(
    tmp_path: Path, mode: Verify, caught: int
) -> None:
    tier, block = open_tier(tmp_path), make_block(1)
    tier.set_verify(mode)
    slot = store(tier, block)
    with (tmp_path / "segment-00000").open("r+b") as file:
        file.seek(slot * SLOT_BYTES + 5000)
        file.write(b"\xff\x00\xff")
    wrong = 0
    for _ in range(32):
        try:
            tier.read(slot, block.wanted, empty(block))
        except BlockCorrupt:
            wrong += 1
    assert wrong == caught

    tier.close()


# Quarantine.


def test_the_slot_of_a_damaged_block_is_not_used_again_and_counted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dram_slots=8)
    bench.open()
    worker = bench.worker()
    blocks = chain(0, 4)
    worker.put(blocks)
    slot = flip_in_dram(bench, blocks[1])
    worker.ring.push(CORRUPT, 1, blocks[1].header.key)
    bench.store.tick()
    assert bench.tiers(blocks) == ["dram"]  # and what stood on it went with it
    (dram,) = bench.store.stats().tiers
    assert (dram.quarantined_slots, dram.used_slots) == (1, 1)
    taken = [answer.slot for answer in worker.reserve(chain(100, 8))]
    assert None in taken
    assert slot not in taken
    bench.close()


def test_a_damaged_flash_slot_is_not_used_again(bench: Bench) -> None:
    bench.open()
    worker = bench.worker()
    store_settled(bench, worker, 0, 8)
    store_settled(bench, worker, 100, 8)
    store_settled(bench, worker, 200, 8)
    blocks = chain(0, 2)
    location = bench.parts.index.find(blocks[0].header.key)
    assert location is not None
    assert location.flash is not None
    segment = bench.config.flash_path / "segment-00000"  # type: ignore[operator]
    with segment.open("r+b") as file:
        file.seek(location.flash * SLOT_BYTES + 5000)
        file.write(b"\xff\x00\xff")
    bench.store.prefetch(keys_of(blocks))
    bench.run_until(lambda: bench.parts.placement.counts.flash_corrupt == 1)
    bench.settle()
    flash = bench.store.stats().tiers[1]
    assert flash.quarantined_slots == 1
    store_settled(bench, worker, 300, 48)
    held = {bench.parts.index.flash(row) for row in range(bench.parts.index.rows)}
    assert location.flash not in held


def test_quarantine_is_bounded_so_that_damage_cannot_use_up_a_tier() -> None:
    free = FreeSlots(64)
    slots = [free.pop() for _ in range(64)]
    assert [free.doom(slot) for slot in slots[:6]] == [True] * 4 + [False] * 2
    for slot in slots:
        free.push(slot)
    assert free.count == 60
    assert not {free.pop() for _ in range(60)} & free.doomed


# Where less than always is allowed.


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_x86_may_check_less(machine: str) -> None:
    assert [checked_dram_verify(mode, machine) for mode in VERIFY] == list(VERIFY)


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64", "ppc64le", ""])
def test_a_processor_that_reorders_must_check_always(machine: str) -> None:
    assert checked_dram_verify("always", machine) == "always"
    for mode in ("sampled", "off"):
        with pytest.raises(ConfigInvalid, match=r"dram_verify.*set always"):
            checked_dram_verify(mode, machine)  # type: ignore[arg-type]


def test_a_setting_that_no_version_knows_is_refused(bench: Bench) -> None:
    bench.open()
    worker = bench.worker()
    bench.parts.index._map[80:84] = (9).to_bytes(4, "little")
    with pytest.raises(FormatRefused, match="dram_verify 9"):
        _ = worker.index.dram_verify


@pytest.mark.parametrize("mode", VERIFY)
def test_a_worker_takes_the_setting_from_its_sidecar(tmp_path: Path, mode: Verify) -> None:
    sidecar = Sidecar(tmp_path, ["--dram-verify", mode])
    sidecar.start()
    try:
        client, prompt = sidecar.client(), Prompt(3, 8)
        assert client.store(prompt.items).stored == 8
        assert load_all(client, prompt) == [None] * 8
        assert client._life is not None
        assert client._life.verify.mode == mode
        location = client._life.index.find(prompt.keys[0])
        assert location is not None
        assert location.dram is not None
        header = unpack_header(client._life.arena._slot(location.dram))
        assert (header.checksum == NOT_SUMMED) == (mode == "off")
        assert f"dram_verify={mode}" in sidecar.text()
        wait_until(lambda: "arena populated pages=" in sidecar.text(), "the arena")
    finally:
        sidecar.close()
