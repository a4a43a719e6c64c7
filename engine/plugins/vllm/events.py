"""What Kvist holds of this vLLM, in vLLM's own stream of KV events.

BlockStored and BlockRemoved with vLLM's own block hashes, so that whoever follows the stream finds
them under the blocks of the device: medium CPU for DRAM and STORAGE for flash, ownership kvist. A
block that moves is stored in the one and removed from the other. vLLM publishes with its steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_events import (
    MEDIUM_CPU,
    MEDIUM_STORAGE,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)

from kvist.cachesvc.client import CacheClient
from kvist.engine.plugins.vllm.held import Change, Held
from kvist.proto.keys import BlockKey

OWNER = "kvist"
_MEDIA = {"dram": MEDIUM_CPU, "flash": MEDIUM_STORAGE}


@dataclass(frozen=True, slots=True)
class _Block:
    """A block as vLLM's events describe it; two with one hash are one."""

    hash: bytes
    described: dict[str, Any] = field(compare=False)


class Events:
    """The events of one scheduler; see held.py.

    Args:
        cache: asked where blocks are. block_tokens: tokens of a block.
    """

    def __init__(self, cache: CacheClient, block_tokens: int) -> None:
        self._size = block_tokens
        self._held: Held[_Block] = Held(cache)

    def watch(self, request: Any, block: int, keys: Sequence[BlockKey]) -> None:
        """A request's block is being stored, or was found.

        Args:
            request: vLLM's Request. block: which of its blocks. keys: of it, of each rank.
        """
        hashes = request.block_hashes
        if block >= len(hashes):
            return  # its hash is made when vLLM appends the token that completes it
        first, end = block * self._size, (block + 1) * self._size
        extra, _ = generate_block_hash_extra_keys(request, first, end, 0)
        lora = request.lora_request
        described = {
            "block_hashes": [maybe_convert_block_hash(hashes[block])],
            "parent_block_hash": maybe_convert_block_hash(hashes[block - 1]) if block else None,
            "token_ids": list(request.all_token_ids[first:end]),
            "block_size": self._size,
            "lora_id": lora.adapter_id if lora else None,
            "lora_name": lora.name if lora else None,
            "extra_keys": to_event_extra_keys([extra]),
            "group_idx": 0,
        }
        self._held.watch(_Block(hashes[block], described), keys)

    def take(self) -> list[KVCacheEvent]:
        """See KVConnectorBase_V1.take_events."""
        return [event for change in self._held.look() for event in _events_of(change)]

    def forget(self) -> None:
        """See Held.forget."""
        self._held.forget()


def _events_of(change: Change[_Block]) -> Iterator[KVCacheEvent]:
    described = change.block.described
    owner = {"locality": "LOCAL", "ownership": OWNER}
    if change.now is not None:
        yield BlockStored(medium=_MEDIA[change.now], **described, **owner)
    if change.before is not None:
        yield BlockRemoved(
            block_hashes=described["block_hashes"], medium=_MEDIA[change.before], group_idx=0,
            **owner,
        )  # fmt: skip
