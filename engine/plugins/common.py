"""What plugins share whose engine names its blocks by a hash and keeps their inside to itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kvist.cachesvc.worker.storing import StoreItem
from kvist.proto.keys import KEY_BYTES, NO_KEY, BlockKey, Namespace, origin_of
from kvist.proto.layout import DTYPE_BYTES, BlockFormat
from kvist.proto.record import Bytes, Wanted

IDENTITY_BYTES = 32
"""Of a block's name: a SHA-256, or what an engine has that is as good."""

_OPAQUE_DTYPE = "bfloat16"


def check_version(plugin: str, product: str, version: str, supported: Sequence[str]) -> None:
    """Raises: RuntimeError: a release that this plugin was not tested with."""
    if not any(version == one or version.startswith(f"{one}.") for one in supported):
        raise RuntimeError(
            f"{plugin} is tested with {product} {', '.join(supported)}; this is {product} "
            f"{version}, whose interface may differ. Install one of these releases, or a release "
            "of Kvist that names yours"
        )


def opaque_format(payload_bytes: int, block_tokens: int) -> BlockFormat:
    """The format of bytes whose inside is another engine's: it only says how many there are.

    What the bytes mean has to be in the words of the namespace.

    Args:
        payload_bytes: of a block. block_tokens: that it stands for.

    Raises: ValueError: the bytes cannot be parted evenly.
    """
    step = 2 * DTYPE_BYTES[_OPAQUE_DTYPE] * block_tokens
    if payload_bytes <= 0 or payload_bytes % step:
        raise ValueError(
            f"a block of {payload_bytes} bytes for {block_tokens} tokens is not served; it must "
            f"be a multiple of {step} bytes"
        )
    return BlockFormat(1, 1, payload_bytes // step, _OPAQUE_DTYPE, block_tokens)


def digest_text(*parts: str) -> str:
    """16 hex digits that differ whenever a part does."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def model_folder(model: str, revision: str | None) -> Path | None:
    """Where a model's files are on this host; None when they are not to be found without a net."""
    if Path(model).exists():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(model, revision=revision, local_files_only=True)
    except Exception:  # not a name of the hub, or not kept here: the name must do
        return None
    return Path(found)


class HashNames:
    """Names of blocks of which no tokens are known, only a hash over all up to their end.

    key = first 16 bytes of SHA-256(namespace digest, identity). The identity itself, 32 bytes,
    stands in the record where tokens stand otherwise and is compared on every read, beside the
    namespace digest and the checksum: a block that is served was stored under the same hash of
    the same prefix, whatever happened to index, slots and disk.

    Args:
        namespace: of the blocks.

    Attributes:
        digest: of the namespace.
    """

    def __init__(self, namespace: Namespace) -> None:
        self.digest = namespace.digest()
        self._payload_bytes = namespace.format.payload_bytes
        self._seed = hashlib.sha256(self.digest)

    def key(self, identity: bytes) -> BlockKey:
        """About 0.6 us."""
        hasher = self._seed.copy()
        hasher.update(identity)
        return BlockKey(hasher.digest()[:KEY_BYTES])

    def wanted(self, identity: bytes, more: bytes = b"", payload_bytes: int = 0) -> Wanted:
        """What a load must find.

        Args:
            more: compared besides the identity, a multiple of 4 bytes; not in the key.
            payload_bytes: 0 is that of the namespace.
        """
        size = payload_bytes or self._payload_bytes
        return Wanted(self.key(identity), self.digest, identity + more, size)

    def item(self, identity: bytes, parent: BlockKey, depth: int, payload: Bytes) -> StoreItem:
        """What is stored.

        Args:
            parent: the block before, NO_KEY with depth 0. payload: see proto.slot.fill_slot.
        """
        origin = self.origin(identity) if parent == NO_KEY else b""
        return StoreItem(self.key(identity), parent, self.digest, depth, identity, payload, origin)

    def origin(self, identity: bytes) -> bytes:
        """By which a miss can say that the block is there under another namespace."""
        return origin_of("", identity)
