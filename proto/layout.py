"""The block format: which bytes of a block are which layer, K or V, and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}

# A step along one axis of the pattern; odd and far apart, so that no two axes look alike.
PATTERN_STEPS: Final = {"layer": 7919, "kind": 15731, "head": 22307, "token": 30011, "dim": 613}


@dataclass(frozen=True, slots=True)
class Region:
    """One run of bytes inside a block: the K or V of one head of one layer.

    Attributes:
        layer: layer of the model, counted from its first layer.
        kind: "k" or "v".
        head: KV head of the model, counted from its first head.
        offset: first byte inside the block.
        length: bytes; block_tokens rows of head_dim elements, token-major.
    """

    layer: int
    kind: Literal["k", "v"]
    head: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """The meaning of every byte of a block, said outright and never inferred from a shape.

    A block is page-first: C order [layer][k, v][head][token][head_dim], so that one page of a
    paged pool is the block, byte for byte, and moves with one copy.

    Attributes:
        layers: layers held in the block, >= 1.
        kv_heads: KV heads held in the block, >= 1.
        head_dim: elements of one head, >= 1.
        dtype: "bfloat16", "float16", "float32" or "float8_e4m3fn", as torch names them; what float8
            is multiplied by is a matter of the namespace (compute), not of the bytes.
        block_tokens: tokens per block, >= 1.
        first_layer: the model's number of the block's first layer (a pipeline stage starts here).
        first_head: the model's number of the block's first KV head (a tensor-parallel rank).

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int
    first_layer: int = 0
    first_head: int = 0

    def __post_init__(self) -> None:
        for field in ("layers", "kv_heads", "head_dim", "block_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be >= 1, got {getattr(self, field)}")
        if self.first_layer < 0 or self.first_head < 0:
            raise ValueError("first_layer and first_head must be >= 0")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {sorted(DTYPE_BYTES)}, got {self.dtype!r}")

    @property
    def region_bytes(self) -> int:
        """Bytes of one (layer, K or V, head)."""
        return self.block_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def payload_bytes(self) -> int:
        """Bytes of a whole block."""
        return self.layers * 2 * self.kv_heads * self.region_bytes

    def regions(self) -> Iterator[Region]:
        """Every region of the block, in the order of its bytes, without gaps."""
        offset = 0
        kinds: tuple[Literal["k", "v"], ...] = ("k", "v")
        for layer in range(self.layers):
            for kind in kinds:
                for head in range(self.kv_heads):
                    yield Region(
                        self.first_layer + layer,
                        kind,
                        self.first_head + head,
                        offset,
                        self.region_bytes,
                    )
                    offset += self.region_bytes


def pattern(format: BlockFormat) -> npt.NDArray[np.uint8]:
    """A payload in which the bits of each element follow from where it stands.

    An element's bits are, as an integer of its width that wraps, the sum over the axes of position
    times PATTERN_STEPS, layer and head counted as the model counts them, K as 0 and V as 1. A
    worker whose pages lie in another order than its format says cannot make or read it.

    Returns:
        shape (payload_bytes,), uint8.
    """
    steps = PATTERN_STEPS
    token, dim = np.ogrid[: format.block_tokens, : format.head_dim]
    rows = token * steps["token"] + dim * steps["dim"]
    width = np.dtype(f"<u{DTYPE_BYTES[format.dtype]}")
    out = np.empty(format.payload_bytes, np.uint8)
    for region in format.regions():
        base = region.layer * steps["layer"] + (region.kind == "v") * steps["kind"]
        values = (rows + base + region.head * steps["head"]).astype(width)
        out[region.offset : region.offset + region.length] = values.reshape(-1).view(np.uint8)
    return out
