"""Before anything is timed: the model's own promises, graphs and copies, on the real device."""

from __future__ import annotations

import dataclasses

import torch

from gpu_parts.attention import new_pool, relative_error
from gpu_parts.clock import Clock, Result, Sizes
from gpu_parts.model import pages_for, random_model
from gpu_parts.tiers import Tiers, moved_right
from kvist.cachesvc.worker.loading import LayerLoad
from kvist.engine.models.base import Chunk
from kvist.engine.models.decode_batch import DecodeBatch
from kvist.engine.models.llama_cuda import CudaLlama
from kvist.engine.request import SamplingParams
from kvist.engine.sampler import DrawState
from kvist.proto.record import Wanted
from kvist.transfer.pages import Pins
from kvist.transfer.pipeline import layer_cuts

LAYERS = 2  # of the real shape: all kernels of a step, in a second
STEPS = 3
# Logits of two models that round in other places: bfloat16 products of two layers.
ERROR_MAX = 3e-2
# Blocks that come layer by layer, from a page on that none of them is stored from.
BLOCKS, ELSEWHERE = 3, 4


def _prompts(sizes: Sizes) -> list[list[int]]:
    """Of two requests, each over several pages and ending within one."""
    lengths = (2 * sizes.block_tokens + 3, sizes.block_tokens + 2)
    return [[(n * 31 + p * 7) % sizes.model.vocab for p in range(n)] for n in lengths]


def _chunks(sizes: Sizes, prompts: list[list[int]]) -> list[Chunk]:
    """Each on pages of its own, with room for what follows."""
    each = len(pages_for(sizes, 0, max(map(len, prompts)) + STEPS))
    return [
        Chunk(prompt, 0, list(range(row * each, (row + 1) * each)), True)
        for row, prompt in enumerate(prompts)
    ]


def model_errors(sizes: Sizes, clock: Clock) -> Result:
    """Fast logits against invariant ones; a prompt's bits however it is cut and beside whomever;
    captured steps against eager ones."""
    few = dataclasses.replace(sizes, model=dataclasses.replace(sizes.model, layers=LAYERS))
    fast = random_model(few, clock.device)
    exact = fast.variant(fast=False)
    whole = _chunks(few, _prompts(few))
    pool = new_pool(few, 16, LAYERS, clock.device)
    logits = exact.forward(whole, pool)
    error = relative_error(fast.forward(whole, pool), logits.double())
    result: Result = {"fast_logits": {"error": error, "right": error < ERROR_MAX}}
    differing = _cut_anywhere(exact, whole, pool, logits)
    result["invariant_logits"] = {"error": differing, "right": differing == 0}
    for name, model in (("fast", fast), ("invariant", exact)):
        differing = _graphs_differ(clock, model, whole, pool)
        result[f"{name}_graphs"] = {"error": differing, "right": differing == 0}
    return result


def _cut_anywhere(
    model: CudaLlama, whole: list[Chunk], pool: torch.Tensor, logits: torch.Tensor
) -> float:
    """Logits that are other bits when prompts come one by one, in parts, in other pages."""
    pool.normal_()
    differing = 0
    for row, chunk in enumerate(whole):
        pages = list(reversed(chunk.pages))
        for first, last in ((0, 5), (5, 6), (6, len(chunk.tokens))):
            part = Chunk(chunk.tokens[first:last], first, pages, last == len(chunk.tokens))
            got = model.forward([part], pool)
        differing += int((got[0] != logits[row]).sum())
    return float(differing)


def _graphs_differ(clock: Clock, model: CudaLlama, whole: list[Chunk], pool: torch.Tensor) -> float:
    """Tokens that a captured step draws and an eager one does not."""
    drawn = []
    draws = DrawState(SamplingParams(temperature=1.0), seed=3)
    for captured in (False, True):
        model.forward(whole, pool)
        batch = DecodeBatch(model, pool, 4, len(whole[0].pages), 16 * pool.shape[4])
        if captured and clock.cuda:
            batch.capture((4, 2), lambda *_: None)
        for row, chunk in enumerate(whole):
            batch.place(row, chunk.tokens[-1], len(chunk.tokens), chunk.pages, draws)
        tokens = []
        for _ in range(STEPS):
            batch.run(len(whole))
            tokens += batch.tokens[: len(whole)].tolist()
        drawn.append(tokens)
    return float(sum(one != other for one, other in zip(*drawn, strict=True)))


def copy_errors(sizes: Sizes, clock: Clock) -> Result:
    """Pages through slots and back: straight from pinned memory, through parts that are pinned, and
    layer by layer, where the device looks at what a mark promises as soon as it was passed."""
    pool = new_pool(sizes, 2 * ELSEWHERE, sizes.model.layers, clock.device)
    tiers = Tiers(sizes, clock, pool, "check", 12)
    try:
        pins = tiers.pages.pins
        result: Result = {"pinned": {"error": 0.0, "right": moved_right(tiers)}}
        by_layers = _by_layers(tiers)
        result["by_layers"] = {"error": by_layers, "right": by_layers == 0}
        tiers.pages.pins = Pins()
        result["staged"] = {"error": 0.0, "right": moved_right(tiers, seed=3)}
        tiers.pages.pins = pins
    finally:
        tiers.close()
    result["pinned_bytes"] = tiers.pinned_bytes
    result["not_pinned_because"] = tiers.why
    return result


@torch.inference_mode()
def _by_layers(tiers: Tiers) -> float:
    """Layers of blocks that are not there when their mark was passed."""
    sources, outs = range(BLOCKS), range(ELSEWHERE, ELSEWHERE + BLOCKS)
    items = tiers.items(2, list(sources))
    stored = tiers.store(items)
    assert stored == BLOCKS, f"{stored} of {BLOCKS} blocks were stored: {tiers.dropped}"
    kept = tiers.pool[:BLOCKS].view(torch.uint8).clone()
    targets = tiers.pool[ELSEWHERE : ELSEWHERE + BLOCKS].view(torch.uint8)
    targets.zero_()
    if kept.is_cuda:
        torch.cuda.synchronize()
    missing: list[torch.Tensor] = []

    def reached(layers: int) -> None:
        tiers.pages.mark().hold()
        missing.append((targets[:, :layers] != kept[:, :layers]).any())

    layers = tiers.pool.shape[1]
    load = LayerLoad(
        [Wanted(item.key, item.namespace, item.tokens, tiers.block_bytes) for item in items],
        [tiers.pages.target(page) for page in outs],
        layer_cuts(layers, tiers.block_bytes, tiers.pages.run_bytes),
        reached,
    )
    came, why = tiers.client.stream(load)
    assert came == BLOCKS, f"{came} of {BLOCKS} blocks came: {why}"
    return float(sum(int(one) for one in missing))
