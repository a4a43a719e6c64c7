"""What the store says about itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from kvist.cachesvc.core.sessions import Sessions
from kvist.cachesvc.flash.budget import Wear
from kvist.cachesvc.placing.moves import Moves
from kvist.cachesvc.placing.placement import Placement
from kvist.cachesvc.study.hottest import Prefix
from kvist.cachesvc.study.whatif import Estimate
from kvist.proto.shm import MISS_REASONS, TIERS


@dataclass(frozen=True, slots=True)
class TierUse:
    """One tier now, and what it did in this life; the fields of TierStats in cache.proto, and

    Attributes:
        failure: why it is in state "failed", in words; "" when it is not.
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
        namespace: first digits of the digest. model: the namespace in words, without a salt.
        age_s: seconds since it attached.
        reserved_slots: that it is filling.
        requested_tokens: that it asked for; hit_tokens: of those, found in any tier.
        loaded_bytes, stored_bytes: that it copied out and in.
        dram_blocks, flash_blocks: held of its namespace, by whomever they were stored.
    """

    client: str
    pid: int
    namespace: str
    model: str
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
        counters: totals of all workers, by name of proto.shm.COUNTERS.
        events: placement.Counts.
        wear: of flash; None without it.
        workers: what each attached one measured.
        pinned_blocks: now; spared_blocks: how often one was passed over.
        attached: the workers, longest first.
        prefixes: used most, see study/hottest.
        block_tokens: tokens of a block, of the worker that attached last.
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


def tier_uses(placement: Placement, moves: Moves) -> tuple[TierUse, ...]:
    """DRAM, and flash where there is a tier."""
    counts, dram, flash = placement.counts, placement.dram, placement.flash
    uses = [
        TierUse(
            "dram", "ready", dram.slots, dram.slots - dram.free_slots - dram.quarantined,
            dram.slot_bytes, counts.dram_evicted, counts.dram_written, counts.dram_read,
            dram.quarantined, dram.huge_bytes,
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
    return tuple(uses)


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
            held = placement.blocks.held if placement else (lambda _namespace, _tier: 0)
            yield Attached(
                client=session.client,
                pid=session.pid,
                namespace=namespace.hex()[:12],
                model=session.text.partition(" salt=")[0],
                age_s=round(sessions.age_s(session), 1),
                reserved_slots=len(session.reserved),
                requested_tokens=counters["requested_tokens"],
                hit_tokens=sum(counters[f"hit_tokens.{tier}"] for tier in TIERS),
                loaded_bytes=counters["loaded_bytes"],
                stored_bytes=counters["stored_bytes"],
                dram_blocks=held(namespace, "dram"),
                flash_blocks=held(namespace, "flash"),
            )


def store_stats(
    boot_epoch: bytes,
    uptime_s: float,
    sessions: Sessions,
    placement: Placement | None,
    moves: Moves | None,
) -> StoreStats:
    """Gather everything; placement and moves are None as long as there is no arena."""
    counters = sessions.counters()
    return StoreStats(
        boot_epoch=boot_epoch,
        uptime_s=uptime_s,
        tiers=tier_uses(placement, moves) if placement and moves else (),
        sessions=len(sessions),
        reserved_slots=sessions.reserved_slots,
        requested_tokens=counters.get("requested_tokens", 0),
        hit_tokens={tier: counters.get(f"hit_tokens.{tier}", 0) for tier in TIERS},
        miss_tokens={why: counters.get(f"miss_tokens.{why}", 0) for why in MISS_REASONS},
        blocks=len(placement.blocks) if placement else 0,
        counters=counters,
        events=asdict(placement.counts) if placement else {},
        eviction=eviction_uses(placement) if placement else (),
        what_if=placement.what_if if placement else {},
        workers=tuple(WorkerRates(client, rates) for client, rates in sessions.rates()),
        pinned_blocks=placement.pins.count if placement else 0,
        spared_blocks=placement.spared if placement else 0,
        attached=tuple(attached(sessions, placement)),
        prefixes=placement.hottest.look() if placement else (),
        block_tokens=placement.policy.block_tokens if placement else 0,
    )
