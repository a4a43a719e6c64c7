"""One request's names: the keys of its tokens, why it may have none, and what is copied by them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.plugins.vllm.identity import files_fingerprint
from kvist.proto.keys import NO_KEY, BlockKey, KeyChain, Namespace, origin_of, tenant_of
from kvist.proto.layout import BlockFormat
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
    """Fingerprints of LoRA adapters by content, made once.

    vLLM goes on with what it has read when files are replaced under an adapter that it has, and
    reads them when it has put the adapter away meanwhile: which of the two is not known here. What
    is loaded anew is another adapter to vLLM, with a number of its own.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[list[tuple[str, int, int]], str]] = {}

    def fingerprint(self, lora: Any) -> str | None:
        """32 hex digits; None when the adapter's files are not to be found here, or are not those
        of the first time any more."""
        path, name = Path(lora.lora_path), (lora.lora_int_id, lora.lora_path)
        try:
            files = sorted(one for one in path.iterdir() if one.suffix in ADAPTER_SUFFIXES)
            stats = [(one.name, one.stat()) for one in files]
            state = [(file, at.st_mtime_ns, at.st_size) for file, at in stats]
            if state and name not in self._known:
                self._known[name] = state, files_fingerprint(path, ADAPTER_SUFFIXES)
        except OSError:
            return None
        first, content = self._known.get(name, ([], ""))
        return content if state and state == first else None


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
    """The namespace digest of one request: tenant and adapter included."""
    lora = request.lora_request
    # Should the files be gone since unnamed has looked, the name is nobody else's.
    found = lora and (adapters.fingerprint(lora) or secrets.token_hex(16))
    adapter = "" if lora is None else f"lora={found}"
    return replace(namespace, adapter=adapter, salt=request.cache_salt or "").digest()


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or a sound in a prompt, whose tokens say nothing of its content.

    Attributes:
        identifier: vLLM's hash of it. offset: its first token. length: tokens.
    """

    identifier: str
    offset: int
    length: int


def media_of(request: Any) -> list[Medium]:
    """What stands in a request's prompt beside words, in order."""
    places = [(one.identifier, one.mm_position) for one in request.mm_features]
    found = [Medium(identifier, place.offset, place.length) for identifier, place in places]
    return sorted(found, key=lambda one: one.offset)


class Names:
    """Keys of one request's growing tokens.

    A block's K and V depend on all before it and on whatever picture or sound begins before its
    end. So at a block in which one begins the keys start anew, from the key before and from what
    begins there: prompts share their blocks up to the first medium that differs.

    Args:
        namespace: digest. format: of a block. salt: of its tenant, or "". media: in order.
    """

    def __init__(
        self, namespace: bytes, format: BlockFormat, salt: str, media: Sequence[Medium] = ()
    ) -> None:
        self.digest = namespace
        self._size = format.block_tokens
        self._salt = salt
        self._payload_bytes = format.payload_bytes
        self._chain = KeyChain(namespace, self._size)
        self._before: list[BlockKey] = []  # of the chains before this one
        self._media: dict[int, list[Medium]] = {}  # block -> what begins in it
        for one in media:
            self._media.setdefault(one.offset // self._size, []).append(one)
        self._turns = sorted(self._media)
        self._keys: list[BlockKey] = []

    def keys(self, tokens: Sequence[int]) -> list[BlockKey]:
        """One key for each full block. Do not change the list.

        Args:
            tokens: all of the request; those that made a block before are still the same.
        """
        full = len(tokens) // self._size
        while len(self._keys) < full:
            named = len(self._keys)
            if self._turns and self._turns[0] == named:
                self._turn(self._media[self._turns.pop(0)])
            end = min([full, *self._turns[:1]])
            self._chain.extend(tokens[named * self._size : end * self._size])
            self._keys = self._before + self._chain.keys
        return self._keys

    def _turn(self, media: Sequence[Medium]) -> None:
        """Start the keys anew at the next block."""
        first = len(self._keys) * self._size
        mixed = hashlib.sha256(self.digest + (self._keys[-1] if self._keys else NO_KEY))
        mixed.update(
            repr([(one.identifier, one.offset - first, one.length) for one in media]).encode()
        )
        self._before = list(self._keys)
        self._chain = KeyChain(mixed.digest(), self._size)

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
