"""Browsing: what people ask of the store, each in pieces that hold nobody up.

page     at most LIST_ROWS rows are scanned (0.4 ms), and RUNS_MAX runs or, with the last of
         them, LIST_BLOCKS blocks are walked (1 to 2 ms; a single run of 10,000 blocks, 640,000
         tokens, takes 5); benchmarks/browse.py measures it
show     one block; its payload in DRAM is summed once, 60 us for 1 MiB
evict    at most EVICT_BLOCKS blocks (2 ms), leaves first, so that at every moment what is
         stored hangs together
"""

from __future__ import annotations

import asyncio
import mmap
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.catalog.scan import Scan
from kvist.cachesvc.core.parts import Parts
from kvist.cachesvc.policy.eviction import TICK_MASK, TICKS_PER_S
from kvist.proto.errors import BlockCorrupt, BlockMissing, ConfigInvalid, KvistError
from kvist.proto.keys import NO_KEY, TRIAL_PREFIX, BlockKey
from kvist.proto.record import NOT_SUMMED, BlockHeader, checksum
from kvist.proto.slot import payload_of
from kvist.tiers.flash import FlashTier

RUNS_MAX = 128
LIST_ROWS = 1 << 16
LIST_BLOCKS = 1 << 11
NAMESPACES_MAX = 1024
CHILDREN_MAX = 1000
EVICT_BLOCKS = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """Which runs are wanted; the fields of ListRequest in cache.proto."""

    start: int = 0
    limit: int = RUNS_MAX
    namespace: str = ""
    tenant: str = ""
    key: str = ""
    min_uses: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """As in cache.proto."""

    key: BlockKey
    namespace: bytes
    depth: int
    blocks: int
    dram_blocks: int
    flash_blocks: int
    pinned_blocks: int
    uses: int
    idle_s: float
    branches: int


@dataclass(frozen=True, slots=True)
class Space:
    """NamespaceInfo of cache.proto."""

    namespace: bytes
    tenant: str
    block_tokens: int
    blocks: int
    dram_blocks: int
    flash_blocks: int


@dataclass(frozen=True, slots=True)
class Page:
    """ListReply of cache.proto; next is 0 on the last page."""

    runs: list[Run]
    next: int
    rows: int
    spaces: list[Space]
    slot_bytes: int


@dataclass(slots=True)
class Copy:
    """As in cache.proto; generation is None on flash, where it is none of the record's."""

    tier: str
    slot: int
    state: str
    generation: int | None = None
    checksum: str = "not read"


@dataclass(slots=True)
class Shown:
    """ShowReply of cache.proto, but for the chain; header is None when no copy was read."""

    key: BlockKey
    parent: BlockKey
    space: Space
    depth: int
    uses: int
    idle_s: float
    children: int
    pinned_s: float
    pin_lives: dict[str, int]
    expires_s: float | None
    chain: list[BlockKey]
    copies: list[Copy] = field(default_factory=list)
    header: BlockHeader | None = None


class Browser:
    """Looks at a store's parts, on its thread. Nothing counts as a use.

    Args:
        parts: made.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._placement = parts.placement
        self._blocks = parts.placement.blocks
        self._scan = Scan(parts.index.path, parts.index.rows)

    # List.

    def page(self, asked: Asked) -> Page:
        """A page of runs."""
        index = self._parts.index
        stop = min(asked.start + LIST_ROWS, index.rows)
        tails: list[int] = []
        rows: list[int] = []
        starts: list[int] = []
        after = stop
        for tail in self._tails(asked, stop).tolist():
            if len(tails) >= asked.limit or len(rows) >= LIST_BLOCKS:
                after = tail
                break
            if not index.key(tail).startswith(TRIAL_PREFIX):
                tails.append(tail)
                starts.append(len(rows))
                rows += (tail,) if asked.key else self._blocks.run(tail)
        return Page(
            self._runs(tails, starts, np.array(rows, np.int64)),
            after if after < index.rows else 0,
            index.rows,
            self._spaces() if not asked.start else [],
            self._parts.dram.slot_bytes,
        )

    def _tails(self, asked: Asked, stop: int) -> NDArray[np.int64]:
        if asked.key:
            tails = self._scan.beginning_with(asked.key, asked.start, stop)
            tails = tails[(tails >= asked.start) & (tails < stop)]
            tails = tails[~self._parts.index.hidden.are(tails)]
        else:
            tails = self._blocks.tails(asked.start, stop)
        if asked.min_uses:
            tails = tails[self._placement.hottest.uses(tails) >= asked.min_uses]
        if asked.namespace or asked.tenant:
            tails = tails[np.isin(self._blocks.spaces_of(tails), self._wanted_spaces(asked))]
        return tails

    def _wanted_spaces(self, asked: Asked) -> list[int]:
        tenancy = self._placement.tenancy
        return [
            number
            for number, namespace in self._blocks.spaces.items()
            if namespace.hex().startswith(asked.namespace)
            and (not asked.tenant or tenancy.tenant(namespace) == asked.tenant)
        ]

    def _runs(self, tails: list[int], starts: list[int], rows: NDArray[np.int64]) -> list[Run]:
        """Of the rows of all of them, one after the other; looked up at once, 10 us a run."""
        if not tails:
            return []
        placement, blocks, last = self._placement, self._blocks, np.array(tails, np.int64)
        in_dram, on_flash = self._scan.copies(rows)
        pinned = placement.pins.are_pinned(rows)
        dram, flash, pins = (
            np.add.reduceat(each.astype(np.int64), starts).tolist()
            for each in (in_dram, on_flash, pinned)
        )
        lengths = np.diff([*starts, len(rows)]).tolist()
        uses = placement.hottest.uses(last).tolist()
        return [
            Run(
                placement.index.key(tail), blocks.namespace(tail), blocks.depth[tail] + 1,
                lengths[at], dram[at], flash[at], pins[at], uses[at], self._idle_s(tail),
                self._children(tail),
            )
            for at, tail in enumerate(tails)
        ]  # fmt: skip

    def _idle_s(self, row: int) -> float:
        at = self._placement.history.at_of[row]
        return ((self._placement.uses.clock() - at) & TICK_MASK) / TICKS_PER_S

    def _children(self, row: int) -> int:
        count, child = 0, self._blocks.first_child[row]
        while child != NO_ROW and count < CHILDREN_MAX:
            count += 1
            child = self._blocks.next_sibling[child]
        return count

    def _spaces(self) -> list[Space]:
        """Of the namespaces with most blocks."""
        blocks = self._blocks
        numbers = sorted(blocks.spaces, key=lambda number: -blocks.space_blocks(number))
        return [self._space(number) for number in numbers[:NAMESPACES_MAX]]

    def _space(self, number: int) -> Space:
        blocks = self._blocks
        namespace = blocks.spaces[number]
        return Space(
            namespace,
            self._placement.tenancy.tenant(namespace),
            blocks.block_tokens.get(number, 0),
            blocks.space_blocks(number),
            blocks.copies["dram"].get(number, 0),
            blocks.copies["flash"].get(number, 0),
        )

    # Show.

    def _row(self, key: BlockKey) -> int:
        """Raises: BlockMissing."""
        row = self._parts.index.locate(key)
        if row is None:
            why = self._parts.index.miss_reason(key)
            raise BlockMissing(f"no tier holds the block {key.hex()} ({why})")
        return row

    async def show(self, key: BlockKey, verify: bool) -> Shown:
        """One block.

        Args:
            verify: read its copy on flash, too.

        Raises: BlockMissing.
        """
        row = self._row(key)
        placement, blocks = self._placement, self._blocks
        pinned_s, lives = placement.pins.pin_of(row)
        chain = [placement.index.key(each) for each in blocks.chain(row)[::-1]]
        shown = Shown(
            key=key,
            parent=chain[-2] if len(chain) > 1 else NO_KEY,
            space=self._space(blocks.space(row)),
            depth=blocks.depth[row],
            uses=int(placement.hottest.uses(np.array([row]))[0]),
            idle_s=self._idle_s(row),
            children=self._children(row),
            pinned_s=pinned_s,
            pin_lives=lives,
            expires_s=self._parts.expiry.left_s(row),
            chain=chain,
        )
        self._add_dram(shown, row)
        await self._add_flash(shown, row, verify)
        return shown

    def _add_dram(self, shown: Shown, row: int) -> None:
        dram, job = self._parts.dram, self._placement.jobs.get(row)
        slot = self._parts.index.dram(row)
        if slot is None:
            if job is not None:
                shown.copies.append(Copy("dram", job.dram_slot, "rising"))
            return
        view = dram.slot_view(slot)
        copy = Copy("dram", slot, "ready", int(view.cast("Q")[0]))
        shown.copies.append(copy)
        try:
            shown.header = header = dram.header(slot)
            copy.checksum = _sum_state(header, view, shown.key)
        except KvistError:
            copy.checksum = "wrong"

    async def _add_flash(self, shown: Shown, row: int, verify: bool) -> None:
        flash, job = self._parts.flash, self._placement.jobs.get(row)
        slot = self._parts.index.flash(row)
        if flash is None or slot is None:
            if job is not None and shown.copies[0].state != "rising":
                shown.copies.append(Copy("flash", job.flash_slot, "sinking"))
            return
        copy = Copy("flash", slot, self._parts.moves.state)
        shown.copies.append(copy)
        if not verify or copy.state != "ready":
            return
        with mmap.mmap(-1, flash.slot_bytes) as memory:
            view = memoryview(memory)
            try:
                header, is_right = await asyncio.to_thread(_read, flash, slot, view)
                copy.checksum = "right" if is_right and header.key == shown.key else "wrong"
                shown.header = shown.header or header
            except BlockCorrupt:
                copy.checksum = "wrong"
            except KvistError:
                copy.state = "gone"  # evicted, or the device failed, while it was read
            finally:
                view.release()

    # Evict.

    def evict(self, key: BlockKey, descendants: bool) -> tuple[int, bool]:
        """Drop a block, from all tiers.

        Returns: how many blocks went, and whether some of them are still there.

        Raises: BlockMissing. ConfigInvalid: others stand on it and are not to go.
        """
        row = self._row(key)
        if not descendants and self._blocks.first_child[row] != NO_ROW:
            raise ConfigInvalid(
                f"descendants: other blocks stand on {key.hex()} and cannot be reached without it; "
                "to drop them, too, give --descendants"
            )
        rows = self._leaves_first(row)
        self._placement.drop_all(np.array(rows, np.int64), "cleared")
        more = rows[-1] != row
        self._parts.log.info("evicted by hand", key=key.hex(), blocks=len(rows), more=more)
        return len(rows), more

    def _leaves_first(self, row: int) -> list[int]:
        """A block and what stands on it, children before their parents; EVICT_BLOCKS at most."""
        blocks, rows, at = self._blocks, list[int](), row
        while len(rows) < EVICT_BLOCKS:
            while blocks.first_child[at] != NO_ROW and (not rows or blocks.parent[rows[-1]] != at):
                at = blocks.first_child[at]
            rows.append(at)
            if at == row:
                break
            sibling = blocks.next_sibling[at]
            at = blocks.parent[at] if sibling == NO_ROW else sibling
        return rows


def _sum_state(header: BlockHeader, view: memoryview, key: BlockKey) -> str:
    if header.checksum == NOT_SUMMED:
        return "not summed"
    is_right = header.key == key and checksum(payload_of(view, header)) == header.checksum
    return "right" if is_right else "wrong"


def _read(flash: FlashTier, slot: int, view: memoryview) -> tuple[BlockHeader, bool]:
    """A record on flash, and whether its payload is right. For any thread. Raises: KvistError."""
    header = flash.read_record(slot, view)
    return header, checksum(payload_of(view, header)) == header.checksum
