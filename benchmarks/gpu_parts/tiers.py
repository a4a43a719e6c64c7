"""Blocks between pinned memory and pages: rates, what they add to a step, what hits save."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from gpu_parts.clock import Clock, Result, Sizes, percent
from gpu_parts.model import Steps, pages_for, prefill
from kvist.engine.models.llama_cuda import CudaLlama

# A hit's last tokens are computed: the rest of a block, and the token that logits are wanted of.
TAIL_TOKENS = 16


class Slots:
    """A pinned arena of slots, each the bytes of a page, and the stream that copies."""

    def __init__(self, sizes: Sizes, clock: Clock, pool: torch.Tensor) -> None:
        shape = (sizes.slots, *pool.shape[1:])
        self.arena = torch.empty(shape, dtype=pool.dtype, pin_memory=clock.cuda)
        self.arena.copy_(torch.randn(shape[1:]).to(pool.dtype).expand(shape))
        self.pool = pool
        self._clock = clock
        self.copy_stream = torch.cuda.Stream() if clock.cuda else None  # type: ignore[no-untyped-call]

    def load(self, pages: list[int]) -> None:
        """Copy slots into pages, one copy a block; slots are taken in turn."""
        for number, page in enumerate(pages):
            slot = number % len(self.arena)
            self.pool[page].copy_(self.arena[slot], non_blocking=True)

    def store(self, pages: list[int]) -> None:
        """Copy pages into slots."""
        for number, page in enumerate(pages):
            slot = number % len(self.arena)
            self.arena[slot].copy_(self.pool[page], non_blocking=True)


def moved_right(slots: Slots) -> bool:
    """Whether a page that went through a slot is the same, bit for bit."""
    page = slots.pool[0].view(torch.uint8).clone()
    slots.store([0])
    slots.pool[0].zero_()
    slots.load([0])
    return torch.equal(slots.pool[0].view(torch.uint8), page)


def tier_rates(sizes: Sizes, clock: Clock, slots: Slots) -> Result:
    """GB/s of loads and stores, and whether what comes back is what went."""
    pages = list(range(min(sizes.slots, len(slots.pool))))
    result: Result = {"block_bytes": sizes.page_bytes, "right": moved_right(slots)}
    moves: dict[str, Callable[[list[int]], None]] = {"load": slots.load, "store": slots.store}
    for name, move in moves.items():
        timing = clock.time(lambda move=move: move(pages))  # type: ignore[misc]
        result[f"{name}_gb_per_s"] = len(pages) * sizes.page_bytes / timing.ms / 1e6
        result[f"{name}_spread_percent"] = round(timing.spread_percent, 1)
    return result


def step_inflation(sizes: Sizes, clock: Clock, steps: Steps, slots: Slots, rates: Result) -> Result:
    """How much longer a decode step is while blocks are loaded or stored beside it.

    Args:
        rates: from tier_rates.
    """
    stream = slots.copy_stream
    if stream is None:
        return {"skipped": "no device to copy beside"}
    rows = max(rows for rows in sizes.rows if steps.fits(rows, sizes.contexts[0]))
    result: Result = {"rows": rows, "context": sizes.contexts[0]}
    moves: dict[str, Callable[[list[int]], None]] = {"load": slots.load, "store": slots.store}
    for name, move in moves.items():
        alone = steps.time_ms(rows, sizes.contexts[0])
        # Enough copies for all steps that are timed, twice over, on the last pages of the pool:
        # the first ones are being read.
        copy_ms = sizes.page_bytes / rates[f"{name}_gb_per_s"] / 1e6
        count = math.ceil(2 * (sizes.repeats + 1) * alone / copy_ms)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            move([len(slots.pool) - 1 - number % 8 for number in range(count)])
            copied.record(stream)
        beside = steps.time_ms(rows, sizes.contexts[0])
        result[name] = {
            "alone_ms": alone,
            "beside_copies_ms": beside,
            "inflation_percent": percent(beside - alone, alone),
            # If not, a part of the steps was timed alone and the figure is too good.
            "copies_outlasted_steps": not copied.query(),  # type: ignore[no-untyped-call]
        }
        clock.sync()
    return result


def hits(sizes: Sizes, clock: Clock, model: CudaLlama, slots: Slots, pool: torch.Tensor) -> Result:
    """TTFT of a prompt whose blocks are in DRAM, and of the same prompt computed."""
    result: Result = {}
    for tokens in sizes.hits:
        pages = pages_for(sizes, 0, tokens)
        if len(pages) > len(pool):
            result[str(tokens)] = {"skipped": "the pool is too small"}
            continue
        cached = (tokens - TAIL_TOKENS) // sizes.block_tokens

        def hit(tokens: int = tokens, cached: int = cached) -> None:
            slots.load(list(range(cached)))
            prefill(sizes, model, pool, cached * sizes.block_tokens, tokens)

        computed = clock.time(lambda tokens=tokens: prefill(sizes, model, pool, 0, tokens))  # type: ignore[misc]
        loaded = clock.time(hit)
        result[str(tokens)] = {
            "recompute_ms": computed.ms,
            "dram_hit_ms": loaded.ms,
            "times_sooner": round(computed.ms / loaded.ms, 2),
        }
    return result
