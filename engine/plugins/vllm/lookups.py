"""One request's names: the keys of its tokens, why it may have none, and what is copied by them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.plugins.vllm.identity import files_fingerprint
from kvist.proto.keys import NO_KEY, BlockKey, KeyChain, Namespace, origin_of, tenant_of
from kvist.proto.record import Bytes, Wanted

ADAPTER_SUFFIXES = (".safetensors", ".bin", ".json", ".pt")
_NO_PAYLOAD: Bytes = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class Load:
    """One request's blocks to bring in.

    Attributes:
        request: its id.
        wanted: in order. blocks: where each goes, vLLM's block numbers.
    """

    request: str
    wanted: list[Wanted]
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Save:
    """A block that is complete after this step.

    Attributes:
        item: what it is, its payload empty. block: where it lies, vLLM's block number.
    """

    item: StoreItem
    block: int


class Adapters:
    """Fingerprints of LoRA adapters by content, made once for each state of their files."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, tuple[tuple[str, int, int], ...]], str] = {}

    def fingerprint(self, lora: Any) -> str | None:
        """32 hex digits; None when the adapter's files are not to be found here."""
        path = Path(lora.lora_path)
        try:
            files = sorted(one for one in path.iterdir() if one.suffix in ADAPTER_SUFFIXES)
            stats = [(one.name, one.stat()) for one in files]
            key = str(path), tuple((name, at.st_mtime_ns, at.st_size) for name, at in stats)
            if files and key not in self._known:
                self._known[key] = files_fingerprint(path, ADAPTER_SUFFIXES)
        except OSError:
            return None
        return self._known.get(key)


def unnamed(request: Any, adapters: Adapters) -> str:
    """Why a request's blocks have no names and are neither looked up nor stored; "" if they have.

    Args:
        request: vLLM's Request.
    """
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "prompt_embeds"
    if request.resumable:
        return "streaming_input"
    lora = request.lora_request
    if lora is not None and (lora.load_inplace or adapters.fingerprint(lora) is None):
        return "adapter"
    return ""


def digest_of(namespace: Namespace, request: Any, adapters: Adapters) -> bytes:
    """The namespace digest of one request: tenant, adapter and media included.

    Pictures and sounds stand in a prompt as tokens that say nothing of their content, so their
    identifiers and places seed the whole prompt: it is shared by prompts that have all the same.
    """
    lora = request.lora_request
    adapter = "" if lora is None else f"lora={adapters.fingerprint(lora)}"
    media = [
        (one.identifier, one.mm_position.offset, one.mm_position.length)
        for one in request.mm_features
    ]
    if media:
        adapter += " media=" + hashlib.sha256(repr(media).encode()).hexdigest()
    salt = request.cache_salt or ""
    return replace(namespace, adapter=adapter, salt=salt).digest()


class Names:
    """Keys of one request's growing tokens.

    Args:
        digest: of its namespace. block_tokens: tokens of a block. salt: of its tenant, or "".
        payload_bytes: of a block.
    """

    def __init__(self, digest: bytes, block_tokens: int, salt: str, payload_bytes: int) -> None:
        self.digest = digest
        self._size = block_tokens
        self._salt = salt
        self._payload_bytes = payload_bytes
        self._chain = KeyChain(digest, block_tokens)

    def keys(self, tokens: Sequence[int]) -> list[BlockKey]:
        """One key for each full block. Do not change the list.

        Args:
            tokens: all of the request; those that made a block before are still the same.
        """
        named = len(self._chain.keys) * self._size
        full = len(tokens) // self._size * self._size
        if full > named:
            self._chain.extend(tokens[named:full])
        return self._chain.keys

    def wanted(self, tokens: Sequence[int], block: int) -> Wanted:
        """What a load must find."""
        key = self.keys(tokens)[block]
        return Wanted(key, self.digest, self._own(tokens, block), self._payload_bytes)

    def item(self, tokens: Sequence[int], block: int) -> StoreItem:
        """What a store says of a block; its payload is still to be put in."""
        keys, own = self.keys(tokens), self._own(tokens, block)
        return StoreItem(
            key=keys[block],
            parent=keys[block - 1] if block else NO_KEY,
            namespace=self.digest,
            depth=block,
            tokens=own,
            payload=_NO_PAYLOAD,
            origin=b"" if block else origin_of(self._salt, own),
            tenant="" if block else tenant_of(self._salt),
        )

    def first(self, tokens: Sequence[int]) -> tuple[bytes, bytes]:
        """Origin and namespace of the first block, which must be full; see CacheClient.lookup."""
        return origin_of(self._salt, self._own(tokens, 0)), self.digest

    def _own(self, tokens: Sequence[int], block: int) -> bytes:
        own = tokens[block * self._size : (block + 1) * self._size]
        return np.asarray(own, dtype="<u4").tobytes()
