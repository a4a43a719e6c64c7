"""KV memory as vLLM's CPU build lays it out, small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from kvist.proto.keys import Namespace
from kvist.proto.layout import BlockFormat

LAYERS, HEADS, SIZE, DIM, BLOCKS = 3, 2, 16, 8, 40
NAMESPACE = Namespace(
    "model", BlockFormat(LAYERS, HEADS, DIM, "bfloat16", SIZE), "rope", "vllm-test"
)


def vllm_memory() -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Placement and layer tensors, all slices of one allocation, as vLLM's CPU build has them."""
    page = HEADS * SIZE * 2 * DIM * 2
    raw = torch.zeros(64 + LAYERS * BLOCKS * page, dtype=torch.uint8)
    names = [f"model.layers.{layer}.attn" for layer in range(LAYERS)]
    caches = {}
    for layer, name in enumerate(names):
        first = 64 + layer * BLOCKS * page
        part = raw[first : first + BLOCKS * page].view(torch.bfloat16)
        caches[name] = part.view(BLOCKS, HEADS, SIZE, 2 * DIM)
    place = SimpleNamespace(
        layers=names, offset=64, layer_stride=BLOCKS * page, block_stride=page, size=raw.nbytes
    )
    return [place], caches
