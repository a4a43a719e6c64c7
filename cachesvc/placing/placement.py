"""Placement: which blocks stay, which go, and what else goes with them.

Every slot of both tiers is given out and taken back here. How a block moves between tiers is in
cachesvc/placing/moves.py, how it comes in from a worker in cachesvc/core/intake.py.

    a block loses its DRAM copy    to make room, if nothing in DRAM stands on it: the block goes
                                   altogether if it has no copy on flash
    ... its flash copy             to make room, if nothing on flash stands on it, and nothing at
                                   all unless it has a copy in DRAM
    ... its last copy, by force    (damage, TTL, clear): everything that stands on it goes too,
                                   at once for all who look (placing/clearing)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np

from kvist.cachesvc.catalog.blocks import NO_ROW, Blocks
from kvist.cachesvc.catalog.index import IndexWriter, Location
from kvist.cachesvc.catalog.trees import Rows, tree, trees
from kvist.cachesvc.flash.flashio import Rise, Sink
from kvist.cachesvc.placing.counts import Counts
from kvist.cachesvc.placing.measures import Measures
from kvist.cachesvc.placing.tenancy import Group
from kvist.cachesvc.placing.wards import Rules, Wards
from kvist.cachesvc.policy.eviction import History, Policy, Tree
from kvist.cachesvc.policy.shadow import Shadow
from kvist.cachesvc.policy.uses import Uses
from kvist.cachesvc.study.hottest import Hottest
from kvist.cachesvc.study.whatif import Estimate, WhatIf
from kvist.proto.errors import KvistError, TierFull
from kvist.proto.keys import BlockKey
from kvist.proto.record import NOT_SUMMED, checksum
from kvist.proto.slot import payload_of
from kvist.tiers.dram import DramTier
from kvist.tiers.flash import FlashTier


class Placement:
    """The tiers' slots and the blocks in them. One thread.

    Attributes:
        index, blocks, dram, flash: what it manages; flash is None without a flash tier.
        policy: says which block goes first.
        uses: what is told to the policy. hottest: what is used most. history: last uses, by row.
        jobs: moves under way by row; such a block is not evicted.
        unlisted: keys that left flash, to be taken out of the flash index; see FlashIo.delete.
        reclaim: called where a slot is wanted and none is free, before a block is evicted for it.
        drop_trees: drops blocks and all that stand on them, children first, for a reason; Clearing
            has many of them dropped later and found by nobody meanwhile.
        counts, measures: what happened, and how long it took.
        now: seconds, of a clock that does not jump.
        passed_over: by row, 1 when flash did not take a block that was offered to it.

    Args:
        make_policy: gets the blocks, who used them last, and how many fit.
        is_awaited: whether somebody has reserved a child of the block.
        now: seconds, of a clock that does not jump.
        rules: whose blocks are limited, and which are passed over.
    """

    def __init__(  # noqa: PLR0913 - it joins what these are
        self,
        index: IndexWriter,
        dram: DramTier,
        flash: FlashTier | None,
        make_policy: Callable[[Tree, History, int], Policy],
        is_awaited: Callable[[BlockKey], bool],
        now: Callable[[], float],
        rules: Rules,
    ) -> None:
        self.index = index
        self.blocks = Blocks(index)
        self.dram = dram
        self.flash = flash
        history = self.history = History(index.rows)
        # Every block sinks, so the larger tier holds all there is, but for what is on its way.
        flash_slots = flash.slots if flash else 0
        capacity = max(dram.slots, flash_slots)
        self.policy = make_policy(self.blocks, history, capacity)
        sizes = [dram.slots, capacity] if flash else [dram.slots]
        self._what_if = WhatIf(self.blocks, index.rows, sizes)
        self.now = now
        self.measures = Measures(history, index.rows)
        self.hottest = Hottest(self.blocks, index.rows)
        learners = (self.policy, self._what_if, self.measures, self.hottest)
        self.uses = Uses(self.blocks, history, learners, now)
        self.jobs: dict[int, Sink | Rise] = {}
        self.unlisted: list[bytes] = []
        self.reclaim: Callable[[], None] = lambda: None
        self.drop_trees: Callable[[Rows, str], None] = self.drop_all
        self.counts = Counts()
        self.tenancy, self.pins = rules.tenancy, rules.pins
        self.passed_over = bytearray(index.rows)
        self._is_awaited = is_awaited
        self._dram_leaves = self.policy.order(self.may_leave_dram, index.count_dram, dram.slots)
        self._flash_leaves = (
            self.policy.order(self.may_leave_flash, len, capacity) if flash else None
        )
        wards = partial(
            Wards, blocks=self.blocks, rules=rules, slot_bytes=dram.slot_bytes,
            last_use=lambda rows: history.request[rows],
        )  # fmt: skip
        self._dram_wards = wards("dram", slots=dram.slots, may_go=self.may_leave_dram)
        self._flash_wards = wards("flash", slots=flash_slots, may_go=self.may_leave_flash)

    def may_leave_dram(self, row: int) -> bool:
        """Whether a block's copy in DRAM may be dropped to make room."""
        blocks, index = self.blocks, self.index
        if blocks.dram_children[row] or row in self.jobs or index.dram(row) is None:
            return False
        return index.flash(row) is not None or self._is_last(row)

    def may_leave_flash(self, row: int) -> bool:
        """Whether a block's copy on flash may be dropped to make room."""
        blocks, index = self.blocks, self.index
        if blocks.flash_children[row] or row in self.jobs or index.flash(row) is None:
            return False
        return index.dram(row) is not None or self._is_last(row)

    def _is_last(self, row: int) -> bool:
        childless = self.blocks.first_child[row] == NO_ROW
        return childless and not self._is_awaited(self.index.key(row))

    @property
    def shadows(self) -> dict[str, Shadow]:
        """How the policy fares against leaf-LRU, by tier; empty if it is leaf-LRU."""
        return dict(zip(("dram", "flash"), self.policy.shadows, strict=False))

    @property
    def what_if(self) -> dict[str, tuple[Estimate, ...]]:
        """What other sizes of a tier would hit, by tier."""
        curves = zip(("dram", "flash"), self._what_if.curves, strict=False)
        return {tier: curve.estimates() for tier, curve in curves}

    def offer(self, row: int) -> None:
        """A block's children, jobs or awaited children have changed: it may go now, perhaps."""
        if row != NO_ROW:
            self._dram_leaves.offer(row)
            if self._flash_leaves is not None:
                self._flash_leaves.offer(row)

    @property
    def spared(self) -> int:
        """How often a pinned block was passed over."""
        return self._dram_wards.spared + self._flash_wards.spared

    # Slots.

    def allocate_dram(self, group: Group | None, than: int = NO_ROW) -> int:
        """A free DRAM slot, made by eviction if need be.

        Args:
            group: what limits the owner of the block that it is for.
            than: a row that is to have the slot; evict no block used after it, see Order.take.

        Raises: TierFull when nothing may go.
        """
        if not self.dram.free_slots:
            self.reclaim()
        while True:
            if self.dram.free_slots and not self._dram_wards.is_full(group):
                # It may lack memory, when others fill /dev/shm; one just evicted has it.
                with suppress(TierFull):
                    return self.dram.allocate()
            take = partial(self._dram_leaves.take, self.uses.clock(), than)
            row = self._dram_wards.take(group, take, self._dram_leaves.offer)
            if row == NO_ROW:
                raise TierFull("nothing in DRAM may go")
            self.counts.dram_evicted += 1
            self.measures.evicted("dram", row, self.uses.clock())
            self.drop_dram(row, "not_admitted" if self.passed_over[row] else "evicted")

    def allocate_flash(self, group: Group | None) -> int:
        """A free flash slot, made by eviction if need be; group as in allocate_dram.

        Raises: TierFull when nothing may go. TierOffline.
        """
        assert self.flash is not None
        assert self._flash_leaves is not None
        if not self.flash.free_slots:
            self.reclaim()
        while not self.flash.free_slots or self._flash_wards.is_full(group):
            take = partial(self._flash_leaves.take, self.uses.clock())
            row = self._flash_wards.take(group, take, self._flash_leaves.offer)
            if row == NO_ROW:
                raise TierFull("nothing on flash may go")
            self.counts.flash_evicted += 1
            self.measures.evicted("flash", row, self.uses.clock())
            self.drop_flash(row)
        return self.flash.allocate()

    # Copies.

    def insert(self, key: BlockKey, parent: int, namespace: bytes, location: Location) -> int:
        """Store a new block. The caller tells uses of it, and offers it when its batch is over.

        Raises: TierFull when the index has no room; the slots stay the caller's.
        """
        try:
            row = self.blocks.add(key, parent, namespace, location)
        except TierFull:
            self.counts.index_refused += 1
            raise
        self.passed_over[row] = 0
        self.offer(parent)
        return row

    def gain_dram(self, row: int, slot: int) -> None:
        """A stored block has a copy in DRAM now."""
        self.blocks.gain_dram(row, slot)
        self.offer(row)

    def drop_dram(self, row: int, why: str = "evicted") -> None:
        """Drop a DRAM copy. If it is the last one, nothing stands on the block.

        Args:
            why: one of proto.shm.DEPARTURES, what misses of the block will say; "" says nothing.
        """
        parent, key = self.blocks.parent[row], self.index.key(row)
        group, why = self.group(row), self._reason(row, why)
        if self.index.flash(row) is None:
            self.uses.removed(row)
        slot = self.blocks.lose_dram(row)
        self.free_dram(slot, group)
        self._settle(row, parent, key, why)

    def group(self, row: int) -> Group | None:
        """What limits a block's owner; None when nothing does."""
        return self.tenancy.group(self.blocks.namespace(row)) if self.tenancy.rules else None

    def free_dram(self, slot: int, group: Group | None) -> None:
        """Give a slot back; what was in it is overwritten if its owner's blocks have a TTL."""
        self.dram.free(slot)
        if group is not None and group.limits.ttl is not None:
            self.dram.wipe(slot)
            self.counts.slots_wiped += 1

    def drop_flash(self, row: int, why: str = "evicted") -> None:
        """Drop a flash copy with no child on flash. If it is the last one, nothing stands on it."""
        assert self.flash is not None
        parent, key = self.blocks.parent[row], self.index.key(row)
        why = self._reason(row, why)
        if self.index.dram(row) is None:
            self.uses.removed(row)
        if not self.index.hidden.of[row]:  # or else it was unlisted as it was hidden
            self.unlisted.append(key)
        self.flash.free(self.blocks.lose_flash(row))
        self._settle(row, parent, key, why)

    def _reason(self, row: int, why: str) -> str:
        return why and (self.index.hidden.why(row) or why)

    def _settle(self, row: int, parent: int, key: BlockKey, why: str) -> None:
        if self.index.is_free(row):
            self.pins.forget(row)
            if why:
                self.index.departed.note(key, why)
        self.offer(row)
        self.offer(parent)

    def cancel_job(self, row: int) -> None:
        """A move of a block is not wanted any more; its result will be thrown away."""
        job = self.jobs.pop(row, None)
        if job is not None:
            job.cancelled = True
            if isinstance(job, Sink):
                self.blocks.cancel_sink(row)
            else:
                self.index.show_rise(row, None)

    # By force.

    def drop_tree(self, row: int, why: str) -> int:
        """Drop a block and all that stand on it, from both tiers; how many that were."""
        rows = tree(self.blocks, row)
        self.drop_trees(rows, why)
        return len(rows)

    def check_dram(self, row: int) -> bool:
        """Look whether a block's copy in DRAM is sound; drop it and quarantine its slot if not.

        A worker's report alone drops nothing, so that no broken worker can empty the cache.
        About 60 us for 1 MiB.
        """
        slot = self.index.dram(row)
        if slot is None or self._is_sound(row, slot):
            return True
        self.counts.dram_corrupt += 1
        self.dram.quarantine(slot)
        if self.index.flash(row) is not None:
            self.drop_dram(row)
        else:
            self.drop_tree(row, "corrupt")
        return False

    def _is_sound(self, row: int, slot: int) -> bool:
        try:
            header = self.dram.header(slot)
            payload = payload_of(self.dram.slot_view(slot), header)
            if header.key != self.index.key(row):
                return False
            return header.checksum in (NOT_SUMMED, checksum(payload))
        except KvistError:
            return False

    def drop_all(self, rows: Rows, why: str) -> None:
        """Drop blocks altogether, now: children before their parents, and all children."""
        for row in rows.tolist():
            self.cancel_job(row)
            if self.index.flash(row) is not None:
                has_dram = self.index.dram(row) is not None
                self.drop_flash(row, why)
                if not has_dram:
                    continue
            self.drop_dram(row, why)

    def drop_flash_tree(self, row: int) -> int:
        """Drop the flash copies of a block, which is damaged, and of all that stand on it; its
        slot is quarantined.

        Blocks that lose their last copy go, and whatever stands on these; the others stay. These
        are few or none: the block itself was not in DRAM when it was read.

        Returns: how many went.
        """
        slot = self.index.flash(row)
        if self.flash is not None and slot is not None:
            self.flash.quarantine(slot)
        rows = tree(self.blocks, row)
        in_dram, _ = self.index.copies(rows)
        if not in_dram[-1]:
            self.drop_trees(rows, "corrupt")
            return len(rows)
        doomed = rows[~in_dram]
        if len(doomed):
            doomed = trees(self.blocks, doomed)
            self.drop_trees(doomed, "corrupt")
        for each in rows[~np.isin(rows, doomed)].tolist():
            if self.blocks.reaches_flash(each):
                self._leave_flash(each)
        return len(doomed)

    def forget_flash(self, row: int) -> None:
        """Forget that a block, and what stands on it, is on flash; without a trace, for it may be
        found there again. A block without a copy in DRAM goes with all that stands on it.

        No move is under way and nothing is about to begin.
        """
        rows = tree(self.blocks, row)[::-1].tolist()
        doomed: set[int] = set()
        for each in rows:
            if self.index.dram(each) is None or self.blocks.parent[each] in doomed:
                doomed.add(each)
        self.counts.flash_let_go += len(doomed)
        for each in reversed(rows):
            if self.index.flash(each) is not None:
                parent, key = self.blocks.parent[each], self.index.key(each)
                if self.index.dram(each) is None:
                    self.uses.removed(each)
                self.blocks.lose_flash(each)
                self._settle(each, parent, key, "")
            if each in doomed and not self.index.is_free(each):
                self.drop_dram(each, "")

    def _leave_flash(self, row: int) -> None:
        self.cancel_job(row)
        if self.index.flash(row) is not None:
            self.drop_flash(row)
        else:
            self.offer(row)
