"""Settings of KV events: one JSON object with vLLM's keys, the same for engine and sidecar."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvist.proto.errors import ConfigInvalid
from kvist.proto.kv_events import EventFormat

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]


class KvEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `--kv-events-config` says.

    Attributes:
        enable_kv_cache_events: False is off. vLLM's default is False; whoever gives this object
            wants events, so ours is True.
        publisher: "zmq", or "null", which is off.
        endpoint: of the PUB socket. Bound where it has `*`, `::` or 0.0.0.0, or is ipc://, else
            connected to, as in vLLM.
        replay_endpoint: of the ROUTER socket, always bound; None is no replay and no snapshot.
        buffer_steps: messages kept for replay, at most.
        hwm: messages that may wait for a slow subscriber before it loses some.
        max_queue_size: taken for vLLM's sake: what was not sent yet is one entry a block and
            medium, however fast they change, so there is no queue to bound.
        topic: first frame of each message.
        event_format: "map", as vLLM 0.32 sends events, or "array", as older ones did.
    """

    enable_kv_cache_events: bool = True
    publisher: str = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: Count = 10_000
    hwm: Count = 100_000
    max_queue_size: Count = 100_000
    topic: str = ""
    event_format: EventFormat = "map"


def parse_kv_events(text: str) -> KvEventsConfig | None:
    """The settings in a JSON object; None when events are off, as with an empty text.

    Raises:
        ValueError: says what is accepted.
    """
    if not text:
        return None
    try:
        config = msgspec.json.decode(text, type=KvEventsConfig)
    except msgspec.DecodeError as error:
        raise ValueError(
            f"{error}; give a JSON object like "
            '{"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}'
        ) from None
    if config.publisher not in ("zmq", "null"):
        raise ValueError(f"publisher: {config.publisher!r} is not one of zmq, null")
    for key in ("endpoint", "replay_endpoint"):
        address = getattr(config, key)
        if address is not None and not address.startswith(("tcp://", "ipc://")):
            raise ValueError(f"{key}: {address!r} is no ZMQ address; write one like tcp://*:5557")
    if config.endpoint == config.replay_endpoint:
        raise ValueError(f"replay_endpoint: {config.endpoint} is also endpoint; give it another")
    is_on = config.enable_kv_cache_events and config.publisher == "zmq"
    return config if is_on else None


def checked_kv_events(text: str) -> KvEventsConfig | None:
    """The same, for a flag of the engine.

    Raises:
        ConfigInvalid: names the flag.
    """
    try:
        return parse_kv_events(text)
    except ValueError as error:
        raise ConfigInvalid(f"--kv-events-config: {error}") from None
