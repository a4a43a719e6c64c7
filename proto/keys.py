"""Keys: the namespace digest, and one key per token block that names the whole prefix.

    digest = SHA-256(tagged, length-prefixed fields of the namespace)
    key(i) = first 16 bytes of SHA-256(digest, tokens[0 : (i + 1) * block_tokens])

Tokens are hashed as little-endian uint32. One running hash serves a whole prompt: after each
block a copy of it is finished, which is the fastest cryptographic form in pure Python (0.43 to
0.94 us a block). A key depends on every token before it, so equal keys mean equal prefixes and
the keys of a prompt that are stored form a prefix of its list.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from typing import NewType

import numpy as np
import numpy.typing as npt

from kvist.proto.layout import BlockFormat

KEY_BYTES = 16
DIGEST_BYTES = 32
FORMAT_VERSION = 1
ORIGIN_BYTES = 8
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")

BlockKey = NewType("BlockKey", bytes)
Tokens = npt.NDArray[np.uint32]

NO_KEY = BlockKey(bytes(KEY_BYTES))
"""The parent of a first block."""

TRIAL_PREFIX = b"kv-trial"
"""How the key of a trial block begins (cachesvc/worker/trial.py); it never leaves DRAM."""


def trial_key(namespace: bytes) -> BlockKey:
    """Key of the one block that a trial's namespace, which is its own, has."""
    return BlockKey(TRIAL_PREFIX + namespace[: KEY_BYTES - len(TRIAL_PREFIX)])


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that makes KV bytes interchangeable. A mismatch is a miss, never an error.

    Attributes:
        model: fingerprint of weights and model configuration.
        format: which bytes of a block are what.
        rope: rotary parameters in words, for example "theta=100000".
        compute: what the numbers depend on besides the weights, for example "bfloat16/onednn".
        adapter: fingerprint of a LoRA adapter, or "".
        salt: tenants with different salts never share; "" is the common pool.
    """

    model: str
    format: BlockFormat
    rope: str
    compute: str
    adapter: str = ""
    salt: str = ""

    def digest(self) -> bytes:
        """32 bytes that differ whenever any field does."""
        hasher = hashlib.sha256(b"kvist.namespace")
        fields: list[tuple[str, str]] = [("version", str(FORMAT_VERSION))]
        fields += [
            (name, str(getattr(self, name)))
            for name in ("model", "rope", "compute", "adapter", "salt")
        ]
        fields += [
            (f"format.{field.name}", str(getattr(self.format, field.name)))
            for field in dataclasses.fields(self.format)
        ]
        for name, value in fields:
            for part in (name.encode(), value.encode()):
                hasher.update(len(part).to_bytes(4, "little"))
                hasher.update(part)
        return hasher.digest()

    def salted(self, salt: str) -> Namespace:
        """The same namespace for another tenant."""
        return dataclasses.replace(self, salt=salt)


class KeyChain:
    """The keys of one growing token sequence.

    Attributes:
        keys: one per full block so far.
        block_tokens: tokens per block.
    """

    def __init__(self, digest: bytes, block_tokens: int) -> None:
        """Start an empty chain.

        Args:
            digest: namespace digest, DIGEST_BYTES long.
            block_tokens: tokens per block, >= 1.

        Raises:
            ValueError: an argument has the wrong length or range.
        """
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"digest must be {DIGEST_BYTES} bytes, got {len(digest)}")
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be >= 1, got {block_tokens}")
        self.keys: list[BlockKey] = []
        self.block_tokens = block_tokens
        self._hasher = hashlib.sha256(digest)
        self._tail = b""

    def extend(self, tokens: npt.ArrayLike) -> int:
        """Append tokens; return how many keys that added.

        Args:
            tokens: shape (n,), ids in [0, 2**32).
        """
        data = self._tail + np.ascontiguousarray(tokens, dtype="<u4").tobytes()
        step = 4 * self.block_tokens
        whole = len(data) // step * step
        view = memoryview(data)
        keys = self.keys
        before = len(keys)
        update, copy = self._hasher.update, self._hasher.copy
        for start in range(0, whole, step):
            update(view[start : start + step])
            keys.append(BlockKey(copy().digest()[:KEY_BYTES]))
        self._tail = data[whole:]
        return len(keys) - before


def block_keys(digest: bytes, tokens: npt.ArrayLike, block_tokens: int) -> list[BlockKey]:
    """Name each full block of a prompt.

    Args:
        digest: namespace digest, DIGEST_BYTES long.
        tokens: shape (n,), ids in [0, 2**32).
        block_tokens: tokens per block, >= 1.

    Returns:
        n // block_tokens keys, first block first. A partial last block has no key.
    """
    chain = KeyChain(digest, block_tokens)
    chain.extend(tokens)
    return chain.keys


def origin_of(salt: str, tokens: bytes) -> bytes:
    """Name a first block by its tokens and its tenant, whatever model computed it.

    By it a miss can say that the prompt is cached under another namespace, without a word about
    what other tenants have: who does not know the salt cannot ask.

    Args:
        salt: the tenant's, "" for the common pool.
        tokens: the block's own, as little-endian uint32.

    Returns:
        ORIGIN_BYTES bytes, never all zero.
    """
    hasher = hashlib.sha256(b"kvist.origin")
    for part in (salt.encode(), tokens):
        hasher.update(len(part).to_bytes(4, "little"))
        hasher.update(part)
    return hasher.digest()[:ORIGIN_BYTES].replace(bytes(ORIGIN_BYTES), b"\1" * ORIGIN_BYTES)


def tenant_of(salt: str) -> str:
    """Name the tenant that a salt stands for; the name tells nothing of the secret in it.

    Returns:
        "" for the common pool; the part before the first colon, if it is a name, as in
        "acme:3f9a..."; else "salt-" and 16 hex digits of a hash of the salt.
    """
    name, colon, _ = salt.partition(":")
    if not salt or (colon and _TENANT.fullmatch(name)):
        return name
    return "salt-" + hashlib.sha256(b"kvist.tenant" + salt.encode()).hexdigest()[:16]
