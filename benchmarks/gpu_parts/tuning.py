"""What other constants of the attention kernels would give: one is changed at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch

from gpu_parts.attention import decode_plan, lay_out, prefill_plan, random_queries
from gpu_parts.clock import Clock, Result, Sizes
from kvist.kernels.device import decode_attention as decode
from kvist.kernels.device import launch
from kvist.kernels.device import prefill_attention as prefill
from kvist.kernels.device.paged import Paged

# SPLIT and ROWS are part of a row's arithmetic: another one is another launch.RELEASE.
DECODE: tuple[tuple[ModuleType, str, tuple[int, ...]], ...] = (
    (launch, "PROGRAMS_PER_SM", (2, 3, 4, 6, 8)),
    (decode, "STAGES", (2, 3, 4)),
    (decode, "WARPS", (2, 4, 8)),
    (decode, "SPLIT", (128, 256, 512, 1024)),
)
PREFILL: tuple[tuple[ModuleType, str, tuple[int, ...]], ...] = (
    (prefill, "STAGES", (2, 3, 4)),
    (prefill, "WARPS", (4, 8)),
    (prefill, "ROWS", (64, 128, 256)),
)
LAYERS = 8  # one call for each: other memory each time


@torch.inference_mode()
def sweep(sizes: Sizes, clock: Clock, pool: torch.Tensor) -> Result:
    """Microseconds of a launch, or why there is none."""
    lengths = {
        "decode_1": [sizes.decode[-1][1]],
        "decode_many": [sizes.contexts[0]] * sizes.rows[-1],
    }
    result: Result = {}
    for name, keys in lengths.items():
        if sum(-(-one // sizes.block_tokens) for one in keys) <= len(pool):
            run = functools.partial(_decode_us, sizes, clock, lay_out(keys, pool))
            result[name] = {"keys": keys[0], "rows": len(keys), **_vary(DECODE, run)}
    tokens = min(sizes.chunk, sizes.prefill[-1])
    paged = lay_out([tokens], pool)

    def prefill_us() -> float:
        plan = prefill_plan(sizes, tokens, clock.device)
        q = random_queries(sizes, tokens, clock.device)
        out = torch.empty_like(q)
        calls = [
            functools.partial(prefill.prefill_attention, q, paged, layer, plan, out)
            for layer in range(min(LAYERS, pool.shape[1]))
        ]
        return 1e3 * clock.time_graph(calls).ms

    result["prefill"] = {"tokens": tokens, **_vary(PREFILL, prefill_us)}
    return result


def _decode_us(sizes: Sizes, clock: Clock, paged: Paged) -> float:
    plan = decode_plan(sizes, paged)
    q = random_queries(sizes, len(paged.lengths), clock.device)
    out = torch.empty_like(q)
    calls = [
        functools.partial(decode.decode_attention, q, paged, layer, plan, out)
        for layer in range(min(LAYERS, paged.pool.shape[1]))
    ]
    return 1e3 * clock.time_graph(calls).ms


def _vary(
    constants: tuple[tuple[ModuleType, str, tuple[int, ...]], ...], run: Callable[[], float]
) -> Result:
    """A run with each value of each constant, the others as they are."""
    found: Result = {}
    for module, name, values in constants:
        kept = getattr(module, name)
        found[name] = {"now": kept}
        for value in values:
            setattr(module, name, value)
            try:
                found[name][str(value)] = run()
            except Exception as error:  # more shared memory than there is, mostly
                found[name][str(value)] = f"{type(error).__name__}: {error}"[:120]
            finally:
                setattr(module, name, kept)
    return found
