"""KV events: the messages by which routers index caches, byte for byte those of vLLM.

A message on the PUB socket has three frames: topic, sequence number (8 bytes, big-endian), and a
batch in msgpack:

    batch             [ts, events, data_parallel_rank]
    an event          a map with its name under "type" (vLLM 0.32), or an array that begins with
                      its name and goes on in the order of the fields below (older releases)

A reader that has seen a gap sends the number of the first message that it lacks to the ROUTER
socket, as (empty, 8 bytes big-endian), and gets (empty, topic, number, batch) for each message
from there on, then one with the number END and an empty batch. Not vLLM's: SNAPSHOT in place of a
number asks for all that is stored now, and a number that is not kept any more gets that first.
To a publisher of vLLM SNAPSHOT is a number that it has not come to: it answers with END alone.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvist.proto.keys import NO_KEY, BlockKey

EventFormat = Literal["map", "array"]

GPU, CPU, STORAGE = "GPU", "CPU", "STORAGE"
"""Media, as vLLM names them: pages of an engine (on a processor too), DRAM, flash."""

END = b"\xff" * 8
SNAPSHOT = b"snapshot"

_encoder = msgspec.msgpack.Encoder()


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """A medium has these blocks now; each stands on the one before it.

    Attributes:
        block_hashes: see hash_of. parent_block_hash: of the block before the first, None if none.
        token_ids: of all the blocks; empty when they are not known. block_size: tokens of one
            block, 0 when they are not known.
        lora_id, lora_name: always None; an adapter is part of the hash.
        extra_keys: one per block: None, or what beside the tokens a request must have in common
            with it, see cachesvc.events.tiers.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """A medium has these blocks no more; others may."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    """The publisher has begun anew: forget what it told before."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """Events in their order; ts in unix seconds."""

    ts: float
    events: list[Event]
    data_parallel_rank: int = 0


def hash_of(key: BlockKey) -> int:
    """A block's name in events: the last 64 bits of its key, as vLLM shortens its hashes.

    Two of 10 million blocks share one with a probability of 3e-6; a router then sends a request
    to the wrong place, no more.
    """
    return int.from_bytes(key[-8:], "big")


def parent_hash_of(key: BlockKey) -> int | None:
    """The same of the block before; None for NO_KEY."""
    return None if key == NO_KEY else hash_of(key)


def space_name(namespace: bytes) -> str:
    """What stands in extra_keys for a namespace that is a tenant's own; not the salt, a secret."""
    return f"kvist:{namespace[:16].hex()}"


def encode_batch(ts: float, events: list[Event], event_format: EventFormat) -> bytes:
    """The third frame of a message."""
    if event_format == "map":
        return _encoder.encode(EventBatch(ts, events))
    return _encoder.encode((ts, [_as_array(event) for event in events], 0))


def _as_array(event: Event) -> list[object]:
    fields = [type(event).__name__, *msgspec.structs.astuple(event)]
    if isinstance(event, BlockStored) and event.extra_keys is None:
        fields.pop()  # older readers have no such field
    return fields


def encode_number(number: int) -> bytes:
    """The second frame of a message, and a request for replay."""
    return number.to_bytes(8, "big")
