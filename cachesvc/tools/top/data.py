"""The figures of `kvist top`: what changed between two readings of a sidecar."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# "Now" is the last so many seconds: shorter, and a request more or less shows.
WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer of a sidecar.

    Attributes:
        at_s: when it came, seconds of a clock that does not jump.
        stats: as /stats.json has them; over the socket of an older sidecar some are missing.
    """

    at_s: float
    stats: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TierNow:
    """One tier; in and out are bytes per second in the window."""

    tier: str
    state: str
    used_slots: int
    slots: int
    size_bytes: int
    in_bytes_per_s: float
    out_bytes_per_s: float
    evicted_per_s: float


@dataclass(frozen=True, slots=True)
class Now:
    """What a person sees.

    Attributes:
        seconds: of the window; 0 with one reading, then all is since the start.
        requested: prompt tokens in the window.
        hits, misses: tokens of them by tier, and by reason; without zeros, largest first.
        tiers: as they are.
        stats: the last reading.
    """

    seconds: float
    requested: int
    hits: Mapping[str, int]
    misses: Mapping[str, int]
    tiers: tuple[TierNow, ...]
    stats: Mapping[str, Any]

    @property
    def hit_ratio(self) -> float | None:
        """Of the window; None when nothing was asked for."""
        return sum(self.hits.values()) / self.requested if self.requested else None

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "seconds": round(self.seconds, 3),
            "requested_tokens": self.requested,
            "hit_tokens": dict(self.hits),
            "miss_tokens": dict(self.misses),
            "hit_ratio": self.hit_ratio,
            "tiers": [
                {name: getattr(tier, name) for name in TierNow.__dataclass_fields__}
                for tier in self.tiers
            ],
            "sessions": self.stats.get("sessions", 0),
            "blocks": self.stats.get("blocks", 0),
            "uptime_s": self.stats.get("uptime_s", 0.0),
        }


def hit_ratio_of(stats: Mapping[str, Any]) -> float | None:
    """Since the sidecar's start."""
    hits, misses = (sum(map(int, stats[name].values())) for name in ("hit_tokens", "miss_tokens"))
    return hits / (hits + misses) if hits + misses else None


@dataclass(slots=True)
class Window:
    """The readings of the last seconds."""

    readings: deque[Reading] = field(default_factory=deque)

    def add(self, reading: Reading) -> None:
        """Another one; a sidecar that began anew begins a new window."""
        if self.readings:
            last = self.readings[-1].stats
            if last.get("boot_epoch") != reading.stats.get("boot_epoch"):
                self.readings.clear()
        self.readings.append(reading)
        while len(self.readings) > 2 and reading.at_s - self.readings[1].at_s >= WINDOW_S:
            self.readings.popleft()

    def now(self) -> Now | None:
        """What there is to see; None before the first reading."""
        if not self.readings:
            return None
        last, first = self.readings[-1], self.readings[0]
        seconds = last.at_s - first.at_s
        before = first.stats if seconds else {}
        hits = _grown(last.stats["hit_tokens"], before.get("hit_tokens", {}))
        misses = _grown(last.stats["miss_tokens"], before.get("miss_tokens", {}))
        requested = sum(hits.values()) + sum(misses.values())
        tiers = tuple(_tier(tier, last.stats, before, seconds) for tier in last.stats["tiers"])
        return Now(seconds, requested, hits, misses, tiers, last.stats)


def _grown(counts: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    grown = {name: int(value) - int(before.get(name, 0)) for name, value in counts.items()}
    # A worker that is gone for good and counted anew could make a sum fall; never below nothing.
    return dict(sorted(((k, v) for k, v in grown.items() if v > 0), key=lambda each: -each[1]))


def _tier(
    tier: Mapping[str, Any], stats: Mapping[str, Any], before: Mapping[str, Any], seconds: float
) -> TierNow:
    name = str(tier["tier"])
    old: Mapping[str, Any] = next(
        (one for one in before.get("tiers", ()) if one["tier"] == name), {}
    )

    def per_s(field_name: str) -> float:
        change = int(tier[field_name]) - int(old.get(field_name, 0))
        return max(0, change) / seconds if seconds else 0.0

    slot_bytes = int(tier["slot_bytes"])
    out = per_s("read_blocks") * slot_bytes
    if name == "dram" and seconds:  # workers read DRAM by themselves, and count it
        loaded = int(stats.get("counters", {}).get("loaded_bytes", 0))
        out += max(0, loaded - int(before.get("counters", {}).get("loaded_bytes", 0))) / seconds
    return TierNow(
        name,
        str(tier["state"]),
        int(tier["used_slots"]),
        int(tier["slots"]),
        int(tier["slots"]) * slot_bytes,
        per_s("written_blocks") * slot_bytes,
        out,
        per_s("evicted_blocks"),
    )
