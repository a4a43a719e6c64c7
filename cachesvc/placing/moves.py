"""Moves: what sinks from DRAM to flash and what rises again, and what happens when flash fails.

    sink    a block that is admitted (placing/admission) is queued at once (write-through),
            after the block before it; so the copy is there when DRAM needs the room, and an
            eviction costs no write. What found no room in the queue gets another chance when it or
            a later block of its conversation is used; what flash was away for, when it is back.
    rise    when somebody wishes it, first block first. A block rises only into free slots and
            those of blocks that were used before it: somebody waits for it. Those that somebody
            follows rise part by part, side by side, and the index shows into which slot.

When the device fails, all moves end and copies on flash are offered to nobody until it is back
(cachesvc/flash/watch.py). Everything else goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.catalog.trees import sinking_from
from kvist.cachesvc.core.host import Threads
from kvist.cachesvc.flash.flashio import FlashIo, Post, Record, Rise, Sink, give, refuse
from kvist.cachesvc.flash.watch import FlashState, Watch
from kvist.cachesvc.log import Log
from kvist.cachesvc.placing.clearing import Clearing
from kvist.cachesvc.placing.placement import Placement
from kvist.cachesvc.placing.risen import check_risen
from kvist.proto.errors import BlockMissing, KvistError, TierFull, TierOffline
from kvist.proto.hints import NO_HINT, Hint
from kvist.proto.keys import BlockKey

# Each holds a DRAM slot that nobody can read yet; 8 a thread keep two threads busy.
_RISES_MAX = 16
# Those that are followed: all blocks of a prompt are needed before its first layer computes.
_FOLLOWED_MAX = 1024
# 32 blocks of 1.4 MiB rise whole in 22 to 26 ms, in parts of 480 KiB in 28 to 32, of 352 KiB in 25
# to 31, of 256 KiB in 29 to 40. Who follows shorter ones begins earlier.
PART_BYTES = 320 << 10


class Moves:
    """Moves blocks between the tiers. One thread; see flashio.FlashIo for the others.

    Attributes:
        clearing: what was cleared and is not dropped yet. sinks_max: blocks that may be sinking.

    Args:
        placement: the blocks. Without a flash tier nothing moves.
        threads: starts those of flash I/O; io_threads: how many.
        queue_blocks: how many may wait to sink.
        post: runs a callable on this thread.
        log: where the flash tier's changes of state are told.
    """

    def __init__(
        self,
        placement: Placement,
        threads: Threads,
        io_threads: int,
        queue_blocks: int,
        post: Post,
        log: Log,
    ) -> None:
        self._placement = placement
        self._log = log
        self._flash = placement.flash
        # A small arena must not be all taken by blocks that wait.
        self.sinks_max = min(queue_blocks, max(1, placement.dram.slots // 2))
        share = max(1, placement.dram.slots // 4)
        self._rises_max = min(_RISES_MAX, share)
        self._followed_max = min(_FOLLOWED_MAX, share)
        self._sinking: set[Sink] = set()
        self._rising = 0
        self._wishes: dict[BlockKey, list[Record]] = {}
        self._followed: dict[BlockKey, int] = {}
        self._turn, self._closed = 0, False
        self.clearing = Clearing(placement)
        self._unlisted_at = 0
        self._io: FlashIo | None = None
        self._watch: Watch | None = None
        if self._flash is not None:
            self._io = FlashIo(placement.dram, self._flash, threads, io_threads, post, self)
            self._watch = Watch(placement, self._flash, self._io, threads, post, log)

    @property
    def state(self) -> FlashState:
        """What workers are told about flash."""
        return self._watch.state if self._watch is not None else "off"

    @property
    def queued(self) -> dict[str, int]:
        """Blocks that wait or are under way, "read" from flash and "write" to it."""
        return {"read": len(self._wishes) + self._rising, "write": len(self._sinking)}

    @property
    def busy(self) -> bool:
        """Whether something is to be done at the next tick, most likely."""
        return bool(self._placement.jobs) or self.clearing.busy

    def clock(self) -> float:
        """See flashio.Owner."""
        return self._placement.now()

    def start(self, opened: Callable[[], None]) -> None:
        """Take over what the last life left on flash, now or when its folder can be opened.

        Args:
            opened: called when that was later.
        """
        if self._watch is not None:
            self._watch.opened = opened
            self._watch.start()

    def close(self) -> None:
        """Write what waits to sink, forget the wishes, end the threads."""
        self._closed = True
        closing = TierOffline("the service is closing")
        self._refuse_wishes(closing)
        for job in self._placement.jobs.values():
            if isinstance(job, Rise):
                refuse(job.waiters, closing)
        if self._watch is not None:
            self._watch.close()
        if self._io is not None and self._flash is not None:
            self._unlist()
            self._io.close()
            # A batch may have named what was dropped while it was written; nobody tells us now.
            dropped = [job.key for job in self._sinking if job.cancelled]
            with suppress(TierOffline):
                self._flash.index_delete([key for key in dropped if not self._reaches_flash(key)])
        self.clearing.tell()

    def _reaches_flash(self, key: BlockKey) -> bool:
        row = self._placement.index.locate(key)
        return row is not None and self._placement.blocks.reaches_flash(row)

    def poll(self, now_s: float) -> None:
        """Every few milliseconds: clearing and wishes go on, the device is looked after."""
        self.clearing.step()
        self._tell_cleared()
        if self._watch is None or self._flash is None:
            return
        self._unlist()
        if self.state == "ready" and self._flash.failure:
            self._fail(self._flash.failure)
        if self.state == "failed":
            self._watch.poll(now_s, idle=not (self._sinking or self._rising or self.clearing.busy))
        if self._wishes:
            self._pump()

    # Sinking.

    def sink(self, row: int) -> bool:
        """Queue a block to sink, and what before it is not on flash, from the top.

        Returns: whether the block is queued or there already.
        """
        blocks = self._placement.blocks
        missing = []
        if self.state == "ready" and len(self._sinking) < self.sinks_max:
            above = row
            while above != NO_ROW and not blocks.reaches_flash(above):
                missing.append(above)
                above = blocks.parent[above]
        for each in reversed(missing):
            if len(self._sinking) >= self.sinks_max or not self._begin_sink(each):
                break
        return blocks.reaches_flash(row)

    def _begin_sink(self, row: int) -> bool:
        placement, index = self._placement, self._placement.index
        dram_slot = index.dram(row)
        assert self._io is not None
        assert dram_slot is not None
        placement.blocks.begin_sink(row)  # first, so that its parent is not what is evicted
        try:
            flash_slot = placement.allocate_flash(placement.group(row))
        except (TierFull, TierOffline):
            placement.blocks.cancel_sink(row)
            placement.offer(placement.blocks.parent[row])
            return False
        job = Sink(row, index.key(row), dram_slot, flash_slot)
        placement.jobs[row] = job
        self._sinking.add(job)
        self._unlist()
        self._io.sink(job)
        return True

    def sunk(self, jobs: list[Sink], offline: str) -> None:
        """See flashio.Owner."""
        if self._closed:
            return
        placement = self._placement
        self._sinking.difference_update(jobs)
        for job in jobs:
            if offline or job.problem is not None:
                placement.counts.sinks_failed += 1
            if offline or job.problem is not None or job.cancelled:
                self._undo_sink(job)
            else:
                del placement.jobs[job.row]
                placement.blocks.finish_sink(job.row, job.flash_slot)
                placement.counts.flash_written += 1
                placement.measures.sunk(job, self.clock())
                placement.offer(job.row)
                placement.offer(placement.blocks.parent[job.row])
        if offline:
            self._fail(offline)

    def _undo_sink(self, job: Sink) -> None:
        assert self._flash is not None
        placement, blocks = self._placement, self._placement.blocks
        self._flash.free(job.flash_slot)
        if not job.cancelled:
            parent = blocks.parent[job.row]
            if job.problem is not None:
                placement.counts.dram_corrupt += 1
                placement.dram.quarantine(job.dram_slot)
                self._log.warning("block corrupt", tier="dram", reason=str(job.problem))
                placement.drop_tree(job.row, "corrupt")
            else:
                for each in sinking_from(blocks, job.row):
                    placement.cancel_job(each)
                    placement.offer(each)
            placement.offer(parent)
        if not self._reaches_flash(job.key):
            placement.unlisted.append(job.key)  # the batch may have named it

    def _unlist(self) -> None:
        assert self._io is not None
        for key in self._placement.unlisted:
            self._io.delete(key)
        self._placement.unlisted.clear()

    # Rising.

    def rise_chain(self, row: int, followed: bool = False) -> int:
        """Wish a block and all before it into DRAM, followed or not; how many are not there."""
        index = self._placement.index
        if self.state != "ready":
            return 0
        wished = 0
        self._turn += 1
        for each in reversed(self._placement.blocks.chain(row)):
            # More than fit into DRAM cannot rise together.
            if index.dram(each) is None and len(self._wishes) < self._placement.dram.slots:
                self._wishes.setdefault(index.key(each), [])
                if followed:
                    self._followed.setdefault(index.key(each), self._turn)
                wished += 1
        self._pump()
        return wished

    def read(self, key: BlockKey, hint: Hint = NO_HINT) -> Record:
        """A copy of a block's record, from DRAM or as soon as it has risen there; counts as a use.

        The future gets BlockMissing when no tier holds the block, TierFull when there is no room
        to rise into, TierOffline or BlockCorrupt as flash says.
        """
        waiter: Record = Record()
        row = self._placement.index.locate(key)
        if row is not None:
            self._placement.uses.used(row, hint)
        self._wishes.setdefault(key, []).append(waiter)
        self._pump()
        return waiter

    def _pump(self) -> None:
        while self._wishes:
            key = next(iter(self._wishes))
            if self._rising >= (self._followed_max if key in self._followed else self._rises_max):
                return
            waiters = self._wishes.pop(key)
            try:
                self._begin_rise(key, waiters)
            except KvistError as error:
                refuse(waiters, error)

    def _begin_rise(self, key: BlockKey, waiters: list[Record]) -> None:
        """Raises: BlockMissing, TierFull, TierOffline."""
        placement, index = self._placement, self._placement.index
        row, turn = index.locate(key), self._followed.pop(key, 0)
        if row is None:
            raise BlockMissing("the block is not stored")
        dram_slot, job = index.dram(row), placement.jobs.get(row)
        if dram_slot is not None:
            self._give(dram_slot, waiters)
        elif isinstance(job, Rise):
            job.waiters += waiters
        else:
            self._queue_rise(row, key, waiters, turn)

    def _queue_rise(self, row: int, key: BlockKey, waiters: list[Record], turn: int) -> None:
        """turn: of those that are followed, else 0. Raises: TierFull, TierOffline."""
        placement = self._placement
        flash_slot = placement.index.flash(row)
        assert flash_slot is not None
        if self.state != "ready" or self._io is None:
            raise TierOffline("flash is not ready")
        try:
            dram_slot = placement.allocate_dram(placement.group(row), than=row)
        except TierFull:
            placement.counts.rises_refused += 1
            raise
        job = placement.jobs[row] = Rise(row, key, flash_slot, dram_slot, waiters)
        job.part_bytes, job.turn = PART_BYTES if turn else 0, turn or self._turn
        self._rising += 1
        if turn:
            placement.index.show_rise(row, dram_slot)
        self._io.rise(job)

    def risen(self, job: Rise) -> None:
        """See flashio.Owner."""
        if self._closed:
            return
        self._rising -= 1
        try:
            if job.cancelled:
                raise BlockMissing("the block was dropped meanwhile")
            del self._placement.jobs[job.row]
            check_risen(job, self._placement)
            self._land(job)
        except KvistError as error:
            if not job.cancelled:
                self._placement.index.show_rise(job.row, None)
                self._undo_rise(job, error)
            self._placement.dram.free(job.dram_slot)  # last: who follows then asks the index why
            refuse(job.waiters, error)
        self._pump()

    def _land(self, job: Rise) -> None:
        placement = self._placement
        slot = placement.index.dram(job.row)
        if slot is not None:  # a worker has stored it anew, while flash was away
            placement.dram.free(job.dram_slot)
        else:
            slot = job.dram_slot
            placement.dram.publish(slot)
            placement.gain_dram(job.row, slot)
            placement.counts.dram_written += 1
        placement.counts.flash_read += 1
        placement.measures.risen(job, self.clock())
        placement.offer(job.row)
        self._give(slot, job.waiters)

    def _undo_rise(self, job: Rise, error: KvistError) -> None:
        placement = self._placement
        placement.counts.rises_failed += 1
        if isinstance(error, TierOffline):
            placement.offer(job.row)
            self._fail(str(error))
            return
        placement.counts.flash_corrupt += 1
        lost, why = placement.drop_flash_tree(job.row), str(error)
        self._log.warning(
            "block corrupt", tier="flash", reason=why, slot=job.flash_slot, dropped_blocks=lost
        )

    def _give(self, slot: int, waiters: list[Record]) -> None:
        if waiters:
            self._placement.counts.dram_read += 1
            give(waiters, self._placement.dram, slot)

    def _refuse_wishes(self, error: KvistError) -> None:
        wishes, self._wishes = self._wishes, {}
        self._followed.clear()
        for waiters in wishes.values():
            refuse(waiters, error)

    # The device.

    def clear(self, namespace: bytes | None) -> int:
        """Have no block, or none of a namespace, found any more; how many. See placing/clearing."""
        if self._watch is not None:
            self._watch.clear(namespace)
        blocks = self.clearing.cut(namespace)
        self.clearing.step()
        if self._io is not None:
            self._unlist()
            self._unlisted_at = self._io.deletes_asked
        return blocks

    def cleared(self) -> Future[None]:
        """Done when all that was cleared is dropped, and out of the flash index if flash works."""
        waiter = self.clearing.waiter()
        self._tell_cleared()
        return waiter

    def _tell_cleared(self) -> None:
        # What is on a tier that is away is unlisted when it is back.
        listed = self._io is not None and self._io.deletes_done < self._unlisted_at
        if not self.clearing.busy and not (listed and self.state == "ready"):
            self.clearing.tell()

    def _fail(self, reason: str) -> None:
        assert self._watch is not None
        self._watch.fail(reason)
        self._refuse_wishes(TierOffline(reason))
