"""Cut sequences into parts of a fixed length and list the parts, without asking the host.

    items[firsts[s] + p] = (s, p)        for p in [0, ceil(lengths[s] / part)), s ascending
    count                = parts of all sequences

A persistent grid walks such a list: its size is fixed when a CUDA graph is captured, its work is
read from memory. Parts are cut in tokens and never by how many programs there are, so that what a
sequence's result is summed from depends on its own length only.

Bound: latency; one launch a step for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl

from kvist.kernels.device.launch import OPTIONS

STORES = 128  # items that a program writes at a time
LEAST = 256  # sequences of a sum: one code for all batches up to it


@dataclass(frozen=True, slots=True)
class WorkList:
    """Room for a list, made once and filled for every step.

    Attributes:
        part: tokens of a part.
        items: (capacity, 2), int32: sequence, and its part.
        firsts: (sequences,), int32: a sequence's first item.
        count: (1,), int32: items in all, at most the capacity.
    """

    part: int
    items: torch.Tensor
    firsts: torch.Tensor
    count: torch.Tensor


def new_work_list(part: int, sequences: int, capacity: int, device: torch.device) -> WorkList:
    """An empty list for up to this many sequences and items."""
    assert part >= 1, "a part has at least one token"
    assert sequences >= 1, "a list is of at least one sequence"
    assert capacity >= 1, "a list has room for at least one item"
    return WorkList(
        part,
        torch.zeros((capacity, 2), dtype=torch.int32, device=device),
        torch.zeros(sequences, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )


def cut_reference(lengths: list[int], part: int) -> list[tuple[int, int]]:
    """The meaning of cut, in lists."""
    return [(s, p) for s, length in enumerate(lengths) for p in range(-(-length // part))]


def cut(lengths: torch.Tensor, work: WorkList) -> None:
    """Fill the list.

    Args:
        lengths: (sequences,), int32, each >= 0; as many as the list was made for. The parts of
            all together must fit: the caller knows the lengths on the host and sees to it. What
            is over is not listed.
        work: overwritten.
    """
    sequences = lengths.shape[0]
    assert lengths.dtype == torch.int32, "lengths are int32"
    assert sequences == work.firsts.shape[0], "the list was made for another number of sequences"
    _cut_kernel[(sequences,)](
        lengths,
        work.items,
        work.firsts,
        work.count,
        sequences,
        work.items.shape[0],
        PART=work.part,
        SEQUENCES=max(LEAST, triton.next_power_of_2(sequences)),
        STORES=STORES,
        **OPTIONS,
    )


@triton.jit(
    do_not_specialize=["sequences", "capacity"],
    do_not_specialize_on_alignment=["lengths", "firsts"],
)
@no_type_check
def _cut_kernel(  # noqa: PLR0913
    lengths,
    items,
    firsts,
    count,
    sequences,
    capacity,
    PART: tl.constexpr,
    SEQUENCES: tl.constexpr,
    STORES: tl.constexpr,
):
    # One program lists one sequence. Each adds up the ones before it by itself: 256 lengths are
    # 1 KiB, and a second launch for a prefix sum would cost more.
    me = tl.program_id(0)
    every = tl.arange(0, SEQUENCES)
    length = tl.load(lengths + every, mask=every < sequences, other=0)
    parts = (length + PART - 1) // PART
    first = tl.sum(tl.where(every < me, parts, 0), 0)
    mine = tl.sum(tl.where(every == me, parts, 0), 0)
    tl.store(firsts + me, first)
    if me == sequences - 1:
        tl.store(count, tl.minimum(first + mine, capacity))
    for at in range(0, mine, STORES):
        part = at + tl.arange(0, STORES)
        item = first + part
        listed = (part < mine) & (item < capacity)
        tl.store(items + 2 * item, me + tl.zeros_like(part), mask=listed)
        tl.store(items + 2 * item + 1, part, mask=listed)
