"""Counts: what happened to blocks in this life of the sidecar."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """What happened to blocks in this life; each only grows.

    Attributes:
        dram_written: committed or risen into DRAM.
        dram_read: read from DRAM by the sidecar itself; workers' reads are in their counters.
        dram_evicted: copies dropped to make room; flash_evicted likewise.
        flash_written, flash_read: sunk and risen.
        offers_reserved, offers_present, offers_full, offers_share, offers_no_parent: blocks that
            workers offered, by what became of them: a slot was reserved, they were there or on
            their way, or were refused, see intake.
        sinks_begun: queued to sink.
        sinks_dropped: not queued to sink: no room in the queue or on flash.
        sinks_first_use: not queued, used once only; sinks_over_budget: over the write budget.
        sinks_failed, rises_failed: begun, but not ended well; or not queued to sink, because flash
            was not ready.
        rises_refused: no room in DRAM but that of blocks used after it.
        dram_corrupt, flash_corrupt: copies found damaged and dropped.
        flash_let_go: forgotten with a flash folder that stayed failed; it is read again later.
        orphans_dropped: found on flash at the start without the block before them.
        index_refused: no room in the index.
        flash_rebuilds: times that the flash index was missing or wrong and was made anew.
        expired: blocks dropped because their time was over; slots_wiped: overwritten when freed.
        commits_refused: for other reasons: the record was not what had been reserved, or its
            parent was gone.
    """

    dram_written: int = 0
    dram_read: int = 0
    dram_evicted: int = 0
    flash_written: int = 0
    flash_read: int = 0
    flash_evicted: int = 0
    offers_reserved: int = 0
    offers_present: int = 0
    offers_full: int = 0
    offers_share: int = 0
    offers_no_parent: int = 0
    sinks_begun: int = 0
    sinks_dropped: int = 0
    sinks_first_use: int = 0
    sinks_over_budget: int = 0
    sinks_failed: int = 0
    rises_failed: int = 0
    rises_refused: int = 0
    dram_corrupt: int = 0
    flash_corrupt: int = 0
    flash_let_go: int = 0
    orphans_dropped: int = 0
    index_refused: int = 0
    commits_refused: int = 0
    expired: int = 0
    slots_wiped: int = 0
    flash_rebuilds: int = 0
