"""One contract, every tier. A new tier adds one line to TIERS and writes no test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sim.blocks import SHAPE, SLOT_BYTES, Block, empty, make_block

from kvist.proto.errors import BlockCorrupt, BlockMissing, TierFull
from kvist.proto.layout import BlockFormat
from kvist.tiers.base import Tier
from kvist.tiers.dram import DramTier
from kvist.tiers.flash import FlashTier
from kvist.tiers.hbm import HbmTier, PagePool

SLOTS = 5
FORMAT = BlockFormat(layers=1, kv_heads=1, head_dim=300, dtype="bfloat16", block_tokens=4)


@dataclass(frozen=True, slots=True)
class Made:
    """A tier, and a way to flip a byte of a slot's payload behind its back."""

    tier: Tier
    damage: Callable[[int], None]


def make_dram(folder: Path) -> Made:
    tier = DramTier(folder / "arena", SLOTS, SLOT_BYTES)

    def damage(slot: int) -> None:
        tier.slot_view(slot)[SHAPE.header_bytes + 7] ^= 1

    return Made(tier, damage)


def make_flash(folder: Path) -> Made:
    tier = FlashTier.open(folder / "flash", SLOTS * SLOT_BYTES, SLOT_BYTES)

    def damage(slot: int) -> None:
        with (folder / "flash" / "segment-00000").open("r+b") as file:
            file.seek(slot * SLOT_BYTES + SHAPE.header_bytes + 7)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    return Made(tier, damage)


def make_hbm(_folder: Path) -> Made:
    pool = PagePool(FORMAT, SLOTS)

    def damage(slot: int) -> None:
        pool.page_bytes(slot)[7] ^= 1

    return Made(HbmTier(pool), damage)


TIERS = [make_hbm, make_dram, make_flash]


@pytest.fixture(params=TIERS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Made]:
    made: Made = request.param(tmp_path)
    yield made
    made.tier.close()


def put(tier: Tier, block: Block) -> int:
    slot = tier.allocate()
    tier.write(slot, block.header, block.payload)
    return slot


def served(tier: Tier, slot: int, block: Block) -> bool:
    """Whether the slot serves the block; what is served must be right."""
    out = empty(block)
    try:
        tier.read(slot, block.wanted, out)
    except (BlockMissing, BlockCorrupt):
        return False
    assert np.array_equal(out, block.payload), "wrong bytes were served"
    return True


def test_the_helper_format_is_a_block_of_the_helper_shape() -> None:
    assert FORMAT.payload_bytes == SHAPE.payload_bytes


def test_a_block_comes_out_as_it_went_in(made: Made) -> None:
    blocks = {put(made.tier, block): block for block in map(make_block, range(SLOTS))}
    assert all(served(made.tier, slot, block) for slot, block in blocks.items())


def test_a_payload_that_must_not_be_written_to_can_be_stored(made: Made) -> None:
    block = make_block(1)
    block.payload.flags.writeable = False
    assert served(made.tier, put(made.tier, block), block)


def test_a_slot_never_given_out_and_one_not_yet_written_hold_no_block(made: Made) -> None:
    block = make_block(1)
    slot = made.tier.allocate()
    for which in (slot, SLOTS - 1):
        with pytest.raises(BlockMissing):
            made.tier.read(which, block.wanted, empty(block))


def test_a_freed_slot_holds_no_block_not_even_after_it_is_given_out_again(made: Made) -> None:
    block = make_block(1)
    slot = put(made.tier, block)
    made.tier.free(slot)
    with pytest.raises(BlockMissing):
        made.tier.read(slot, block.wanted, empty(block))
    while made.tier.free_slots:
        made.tier.allocate()
    with pytest.raises(BlockMissing):
        made.tier.read(slot, block.wanted, empty(block))


def test_a_slot_that_is_used_again_serves_the_new_block_only(made: Made) -> None:
    old, new = make_block(1), make_block(2)
    slot = put(made.tier, old)
    made.tier.free(slot)
    assert put(made.tier, new) == slot
    assert served(made.tier, slot, new)
    with pytest.raises(BlockCorrupt):
        made.tier.read(slot, old.wanted, empty(old))


@pytest.mark.parametrize(
    "change", [{"key": b"k" * 16}, {"namespace": b"n" * 32}, {"tokens": bytes(16)}]
)
def test_another_block_than_the_one_asked_for_is_not_served(
    made: Made, change: dict[str, bytes]
) -> None:
    block = make_block(1)
    slot = put(made.tier, block)
    with pytest.raises(BlockCorrupt, match=next(iter(change))):
        made.tier.read(slot, block.wanted_but(**change), empty(block))


def test_a_flipped_byte_is_noticed_and_spoils_no_other_slot(made: Made) -> None:
    blocks = {put(made.tier, block): block for block in map(make_block, range(3))}
    made.damage(1)
    with pytest.raises(BlockCorrupt, match="checksum"):
        made.tier.read(1, blocks[1].wanted, empty(blocks[1]))
    assert [served(made.tier, *item) for item in blocks.items()] == [True, False, True]


def test_each_slot_is_given_out_once(made: Made) -> None:
    assert {made.tier.allocate() for _ in range(SLOTS)} == set(range(SLOTS))
    assert made.tier.free_slots == 0


def test_a_full_tier_says_so_and_keeps_what_it_had(made: Made) -> None:
    blocks = {put(made.tier, block): block for block in map(make_block, range(SLOTS))}
    with pytest.raises(TierFull):
        made.tier.allocate()
    assert all(served(made.tier, slot, block) for slot, block in blocks.items())
    made.tier.free(2)
    assert made.tier.free_slots == 1
    assert made.tier.allocate() == 2


def test_freeing_a_free_slot_is_a_broken_invariant(made: Made) -> None:
    slot = made.tier.allocate()
    made.tier.free(slot)
    with pytest.raises(AssertionError):
        made.tier.free(slot)


def test_a_tier_says_what_it_is(made: Made) -> None:
    assert made.tier.name in ("hbm", "dram", "flash")
    assert (made.tier.slots, made.tier.free_slots) == (SLOTS, SLOTS)


@pytest.mark.parametrize("make", TIERS)
def test_closing_gives_descriptors_back(make: Callable[[Path], Made], tmp_path: Path) -> None:
    make(tmp_path).tier.close()  # whatever the first use of a library opens for good
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        made = make(tmp_path)
        served(made.tier, put(made.tier, make_block(1)), make_block(1))
        made.tier.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


class TierAgainstDict(RuleBasedStateMachine):
    """Any order of allocate, write, damage and free gives what a dict gives."""

    make: ClassVar[Any]  # a line of TIERS, as a static method

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.made: Made = self.make(self.folder)
        self.tier = self.made.tier
        self.reserved: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.damaged: set[int] = set()

    @rule()
    def allocate(self) -> None:
        if len(self.reserved) + len(self.blocks) == SLOTS:
            with pytest.raises(TierFull):
                self.tier.allocate()
        else:
            slot = self.tier.allocate()
            assert slot not in self.reserved
            assert slot not in self.blocks
            self.reserved.append(slot)

    @rule(number=st.integers(0, 20))
    def write(self, number: int) -> None:
        if self.reserved:
            slot, block = self.reserved.pop(0), make_block(number)
            self.tier.write(slot, block.header, block.payload)
            self.blocks[slot] = block

    @rule(pick=st.integers(0, SLOTS - 1))
    def damage(self, pick: int) -> None:
        if pick in self.blocks and pick not in self.damaged:
            self.made.damage(pick)
            self.damaged.add(pick)

    @rule(pick=st.integers(0, SLOTS - 1))
    def free(self, pick: int) -> None:
        if pick in self.blocks or pick in self.reserved:
            self.tier.free(pick)
            self.blocks.pop(pick, None)
            self.damaged.discard(pick)
            self.reserved = [slot for slot in self.reserved if slot != pick]

    @rule(slot=st.integers(0, SLOTS - 1), number=st.integers(0, 20))
    def read(self, slot: int, number: int) -> None:
        asked = make_block(number)
        there = self.blocks.get(slot)
        is_it = there is not None and there.header == asked.header and slot not in self.damaged
        assert served(self.tier, slot, asked) == is_it

    @invariant()
    def all_blocks_are_served(self) -> None:
        for slot, block in self.blocks.items():
            assert served(self.tier, slot, block) == (slot not in self.damaged)

    @invariant()
    def free_slots_are_those_not_given_out(self) -> None:
        assert self.tier.free_slots == SLOTS - len(self.reserved) - len(self.blocks)

    def teardown(self) -> None:
        self.tier.close()
        shutil.rmtree(self.folder)


@pytest.mark.parametrize("make", TIERS)
def test_a_tier_behaves_like_a_dict(make: Callable[[Path], Made]) -> None:
    run_state_machine_as_test(
        type("ThisTierAgainstDict", (TierAgainstDict,), {"make": staticmethod(make)}),
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, database=None, derandomize=True
        ),
    )
