"""Trees: blocks and all that stand on them, found as arrays where they are many."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.blocks import NO_ROW, Blocks, by_value

# A tree is walked block by block up to here, 0.3 us each: as long as a pass over a million.
_WALK_BLOCKS = 1 << 16

Rows = NDArray[np.int64]


def tree(blocks: Blocks, row: int) -> Rows:
    """A block that can be found and all that stand on it, children before their parents."""
    rows = [row]
    for parent in rows:  # grows meanwhile
        child = blocks.first_child[parent]
        while child != NO_ROW:
            rows.append(child)
            child = blocks.next_sibling[child]
        if len(rows) > _WALK_BLOCKS:
            return trees(blocks, np.array([row], np.int64))
    return np.array(rows[::-1], np.int64)


def trees(blocks: Blocks, roots: Rows) -> Rows:
    """Some blocks and all that stand on them, children before their parents.

    One pass over the blocks of their namespaces, level by level.

    Args:
        roots: of blocks that can be found, one at least.
    """
    depth, parent = np.asarray(blocks.depth), np.asarray(blocks.parent)
    spaces = by_value(roots, blocks.spaces_of(roots))
    rows = blocks.in_spaces([blocks.space(int(some[0])) for some in spaces])
    rows = blocks.deepest_first(rows[depth[rows] >= depth[roots].min()])[::-1]
    is_in = np.zeros(len(depth) + 1, np.bool_)  # the last one stands for NO_ROW
    is_in[roots] = True
    levels = np.flatnonzero(np.diff(depth[rows])) + 1
    for start, stop in pairwise([*levels.tolist(), len(rows)]):
        level = rows[start:stop]
        is_in[level] |= is_in[parent[level]]
    return rows[is_in[rows]][::-1]


def sinking_from(blocks: Blocks, row: int) -> list[int]:
    """A block on its way to flash and those on their way that stand on it, children first."""
    rows = [row]
    for parent in rows:  # grows meanwhile
        child = blocks.first_child[parent]
        while child != NO_ROW:
            if blocks.reaches_flash(child):
                rows.append(child)
            child = blocks.next_sibling[child]
    return rows[::-1]
