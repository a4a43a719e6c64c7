"""What the store says about itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

from kvist.cachesvc.core.accounts import TenantUse, Worth, tenant_uses, worth_of_tiers
from kvist.cachesvc.core.sessions import Session, Sessions
from kvist.cachesvc.events.figures import EventUse
from kvist.cachesvc.flash.budget import Wear
from kvist.cachesvc.placing.moves import Moves
from kvist.cachesvc.placing.placement import Placement
from kvist.cachesvc.study.hottest import Prefix
from kvist.cachesvc.study.whatif import Estimate
from kvist.proto.histograms import WORKER_HISTOGRAMS, Shown, shown_of, words_of
from kvist.proto.shm import COUNTERS, MISS_REASONS, TENANT_COUNTERS, TIERS

_FIRST_HIT = TENANT_COUNTERS.index(f"hit_tokens.{TIERS[0]}")
_FIRST_MISS = TENANT_COUNTERS.index(f"miss_tokens.{MISS_REASONS[0]}")
_HITS = slice(_FIRST_HIT, _FIRST_HIT + len(TIERS))
_MISSES = slice(_FIRST_MISS, _FIRST_MISS + len(MISS_REASONS))
_HISTOGRAM_WORDS = frozenset(word for name in WORKER_HISTOGRAMS for word in words_of(name))


@dataclass(frozen=True, slots=True)
class TierUse:
    """One tier now, and what it did in this life; the fields of TierStats in cache.proto, and

    Attributes:
        failure: why it is in state "failed", in words; "" when it is not.
        written_bytes, read_bytes: of those blocks, whole slots.
        node_bytes: of its memory on each NUMA node, once it is populated; {} where unknown.
    """

    tier: str
    state: str
    slots: int
    used_slots: int
    slot_bytes: int
    evicted_blocks: int
    written_blocks: int
    read_blocks: int
    quarantined_slots: int = 0
    huge_bytes: int = 0
    failure: str = ""
    written_bytes: int = 0
    read_bytes: int = 0
    node_bytes: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvictionUse:
    """How eviction from a tier fares against leaf-LRU, which is counted beside it.

    Attributes:
        asked_blocks: found or stored by requests, in this life.
        hit_blocks: of those, that the tier held when they were asked for; for flash, that any
            tier held.
        lru_hit_blocks: that a leaf-LRU of the same size would have held.
        points_over_lru: points of hit ratio won lately; negative when it loses.
        is_lru: it has lost for long, so that leaf-LRU decides for a while.
        falls: times that this came to be so.
    """

    tier: str
    asked_blocks: int
    hit_blocks: int
    lru_hit_blocks: int
    points_over_lru: float
    is_lru: bool
    falls: int


@dataclass(frozen=True, slots=True)
class WorkerRates:
    """What an attached worker measured.

    Attributes:
        client: its name.
        rates: by name of proto.shm.RATES, without what it did not measure.
    """

    client: str
    rates: dict[str, int]


@dataclass(frozen=True, slots=True)
class Attached:
    """One worker that is attached, and what it did in its session.

    Attributes:
        client: its name. pid: of its process.
        namespace: of its blocks, as in tenants. compute: the same in words, without a salt.
        age_s: seconds since it attached.
        reserved_slots: that it is filling.
        requested_tokens: that it asked for; hit_tokens: of those, found in any tier.
        loaded_bytes, stored_bytes: that it copied out and in.
        dram_blocks, flash_blocks: held of its namespace, by whomever they were stored.
    """

    client: str
    pid: int
    namespace: str
    compute: str
    age_s: float
    reserved_slots: int
    requested_tokens: int
    hit_tokens: int
    loaded_bytes: int
    stored_bytes: int
    dram_blocks: int
    flash_blocks: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store holds and has done; the fields of StatsReply in cache.proto, and

    Attributes:
        eviction: by tier; empty when the policy is leaf-LRU itself.
        what_if: by tier, the hit ratio of leaf-LRU at multiples of its size.
        counters: totals of all workers: lookups, and by name of proto.shm.COUNTERS.
        tenants: the same tokens by namespace and tenant, and what these saved, moved and hold.
        worth: of each tier to all of them, see accounts.worth_s.
        histograms: of all workers and of the sidecar itself.
        events: placement.Counts.
        sessions_opened: in this life.
        queued_blocks: that wait for flash or are under way, "read" from it and "write" to it.
        flash_busy_s: the same -> what threads took.
        wear: of flash; None without it.
        workers: what each attached one measured.
        pinned_blocks: now; spared_blocks: how often one was passed over.
        attached: the workers, longest first.
        prefixes: used most, see study/hottest.
        block_tokens: tokens of a block, of the worker that attached last.
        kv_events: what routers were told; None: events are off.
    """

    boot_epoch: bytes
    uptime_s: float
    tiers: tuple[TierUse, ...]
    sessions: int
    reserved_slots: int
    requested_tokens: int
    hit_tokens: dict[str, int]
    miss_tokens: dict[str, int]
    blocks: int
    counters: dict[str, int]
    events: dict[str, int]
    wear: Wear | None = None
    eviction: tuple[EvictionUse, ...] = ()
    what_if: dict[str, tuple[Estimate, ...]] = field(default_factory=dict)
    workers: tuple[WorkerRates, ...] = ()
    pinned_blocks: int = 0
    spared_blocks: int = 0
    attached: tuple[Attached, ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    block_tokens: int = 0
    tenants: tuple[TenantUse, ...] = ()
    worth: tuple[Worth, ...] = ()
    histograms: tuple[Shown, ...] = ()
    sessions_opened: int = 0
    queued_blocks: dict[str, int] = field(default_factory=dict)
    flash_busy_s: dict[str, float] = field(default_factory=dict)
    kv_events: EventUse | None = None


def tier_uses(placement: Placement, moves: Moves) -> tuple[TierUse, ...]:
    """DRAM, and flash where there is a tier."""
    counts, dram, flash = placement.counts, placement.dram, placement.flash
    uses = [
        TierUse(
            "dram", "ready", dram.slots, dram.slots - dram.free_slots - dram.quarantined,
            dram.slot_bytes, counts.dram_evicted, counts.dram_written, counts.dram_read,
            dram.quarantined, dram.huge_bytes, node_bytes=dram.node_bytes,
        )
    ]  # fmt: skip
    if flash is not None:
        used = flash.slots - flash.free_slots - flash.quarantined
        used = 0 if flash.needs_rebuild else used
        uses.append(
            TierUse(
                "flash", moves.state, flash.slots, used, flash.slot_bytes,
                counts.flash_evicted, counts.flash_written, counts.flash_read,
                flash.quarantined, failure=flash.failure,
            )
        )  # fmt: skip
    return tuple(
        replace(
            use,
            written_bytes=use.written_blocks * use.slot_bytes,
            read_bytes=use.read_blocks * use.slot_bytes,
        )
        for use in uses
    )


def unopened_flash(failure: str) -> TierUse:
    """A flash tier whose folder cannot even be read, so that the size of slots is still open."""
    return TierUse("flash", "failed", 0, 0, 0, 0, 0, 0, failure=failure)


def eviction_uses(placement: Placement) -> tuple[EvictionUse, ...]:
    """DRAM, and flash where there is a tier."""
    return tuple(
        EvictionUse(
            tier, shadow.asked, shadow.own_hits, shadow.hits, round(shadow.points, 3),
            shadow.is_losing, shadow.falls,
        )
        for tier, shadow in placement.shadows.items()
    )  # fmt: skip


def attached(sessions: Sessions, placement: Placement | None) -> Iterator[Attached]:
    """The open sessions, in the order in which they came."""
    for session in sessions.each():
        if session.is_open:
            counters, namespace = session.ring.counters(), session.namespace
            hit, missed = _tokens(session)
            held = placement.blocks.held if placement else (lambda _namespace, _tier: 0)
            yield Attached(
                client=session.client,
                pid=session.pid,
                namespace=session.label,
                compute=session.text.partition(" salt=")[0],
                age_s=round(sessions.age_s(session), 1),
                reserved_slots=len(session.reserved),
                requested_tokens=hit + missed,
                hit_tokens=hit,
                loaded_bytes=counters["loaded_bytes"],
                stored_bytes=counters["stored_bytes"],
                dram_blocks=held(namespace, "dram"),
                flash_blocks=held(namespace, "flash"),
            )


def _tokens(session: Session) -> tuple[int, int]:
    """What a worker found and what it computed, of all tenants."""
    rows = [counts for _, counts in session.ring.tenants()]
    return sum(sum(row[_HITS]) for row in rows), sum(sum(row[_MISSES]) for row in rows)


def store_stats(
    boot_epoch: bytes,
    uptime_s: float,
    sessions: Sessions,
    placement: Placement | None,
    moves: Moves | None,
) -> StoreStats:
    """Gather everything; placement and moves are None as long as there is no arena."""
    counters = sessions.counters()
    totals = sessions.accounted()
    held = sessions.accounts.held(placement.blocks, placement.now()) if placement else {}
    uses = tenant_uses(totals, held)
    hits = {tier: sum(use.hit_tokens[tier] for use in uses) for tier in TIERS}
    misses = {why: sum(use.miss_tokens[why] for use in uses) for why in MISS_REASONS}
    measures = placement.measures if placement else None
    busy_s = dict(measures.busy_s) if measures else {}
    return StoreStats(
        boot_epoch=boot_epoch,
        uptime_s=uptime_s,
        tiers=tier_uses(placement, moves) if placement and moves else (),
        sessions=len(sessions),
        reserved_slots=sessions.reserved_slots,
        requested_tokens=sum(hits.values()) + sum(misses.values()),
        hit_tokens=hits,
        miss_tokens=misses,
        blocks=len(placement.blocks) if placement else 0,
        counters=_plain(counters) | {"lookups": sum(use.lookups for use in uses)},
        events=asdict(placement.counts) if placement else {},
        eviction=eviction_uses(placement) if placement else (),
        what_if=placement.what_if if placement else {},
        workers=tuple(WorkerRates(client, rates) for client, rates in sessions.rates()),
        pinned_blocks=placement.pins.count if placement else 0,
        spared_blocks=placement.spared if placement else 0,
        attached=tuple(attached(sessions, placement)),
        prefixes=placement.hottest.look() if placement else (),
        block_tokens=placement.policy.block_tokens if placement else 0,
        tenants=uses,
        worth=worth_of_tiers(uses, busy_s.get("write", 0.0)),
        histograms=(
            *(shown_of(name, counters) for name in WORKER_HISTOGRAMS),
            *(measures.shown(placement.flash is not None) if measures and placement else ()),
        ),
        sessions_opened=sessions.opened,
        queued_blocks=moves.queued if moves and moves.state != "off" else {},
        flash_busy_s=busy_s if placement and placement.flash else {},
    )


def _plain(counters: dict[str, int]) -> dict[str, int]:
    """Those that are no word of a histogram."""
    return {name: counters.get(name, 0) for name in COUNTERS if name not in _HISTOGRAM_WORDS}
