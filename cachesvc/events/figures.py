"""What a publisher of KV events has done, for /metrics and /stats.json."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.cachesvc.events.publisher import Publisher
from kvist.proto.kv_events import CPU, STORAGE

EVENTS, MEDIA, ANSWERS = ("stored", "removed"), (CPU, STORAGE), ("replay", "snapshot")


@dataclass(frozen=True, slots=True)
class EventUse:
    """What routers were told, in this life.

    Attributes:
        blocks: event -> medium -> blocks told.
        clears: times that they were told that all is gone.
        batches: messages, those without an event included.
        answers: "replay" or "snapshot" -> requests of routers that were answered.
        pending: changes that they were not told yet.
    """

    blocks: dict[str, dict[str, int]]
    clears: int
    batches: int
    answers: dict[str, int]
    pending: int


def event_use(publisher: Publisher) -> EventUse:
    """As it is now; any thread."""
    told = publisher.events.copy()
    return EventUse(
        blocks={event: {medium: told[event, medium] for medium in MEDIA} for event in EVENTS},
        clears=told["cleared", ""],
        batches=publisher.batches,
        answers={kind: publisher.answers[kind] for kind in ANSWERS},
        pending=publisher.pending,
    )
