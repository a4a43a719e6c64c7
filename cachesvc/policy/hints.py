"""Hints: what a policy knows of each block by what the senders of requests said.

A byte a row. The low 4 bits say when the block is expected: nothing known, never (its session has
ended), or after a pause, in octaves; the next 3 are the priority. The highest says that the block
is shared: a prompt went on from it otherwise than the one before. What one session says of its
future is no news of a block that others use too, so only its private blocks heed it.

A block's expectation ends with its next use, and a shared block's priority falls by a step with
each use that does not renew it. Before the first hint nothing is done or kept.
"""

from __future__ import annotations

from collections import OrderedDict
from math import ceil, log2

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.policy.eviction import Rows
from kvist.proto.hints import PRIORITY_MAX, Hint

# Requests whose hint is remembered for what they store yet.
_REQUESTS_MAX = 4096

UNTOLD, NEVER, SOONEST = 0, 1, 2
PAUSE_KINDS = 14
"""Expectations: untold, never, and pauses of up to 1, 2, 4, ... 8192 s from SOONEST on."""
EXPECTATIONS = SOONEST + PAUSE_KINDS

_EXPECTATION = 0x0F
_PRIORITY = 0x70
_PRIORITY_SHIFT = 4
_SHARED = 0x80


def _code(hint: Hint) -> int:
    expectation = UNTOLD
    if hint.session_end:
        expectation = NEVER
    elif hint.tool_pause_s:
        octave = ceil(log2(max(1.0, hint.tool_pause_s)))
        expectation = SOONEST + min(octave, PAUSE_KINDS - 1)
    return expectation | (hint.priority & 7) << _PRIORITY_SHIFT


def _priority(code: int) -> int:
    step = (code & _PRIORITY) >> _PRIORITY_SHIFT
    return step - 8 if step > PRIORITY_MAX else step


# By code.
_PRIORITIES = np.array([_priority(code) for code in range(256)], np.int8)
_WEIGHTS = np.exp2(_PRIORITIES.astype(np.float64))
_WEIGHT_OF = _WEIGHTS.data


class Hints:
    """By row. One thread.

    Attributes:
        is_on: a hint was heard; before that nothing else here need be called.

    Args:
        rows: row numbers are below this.
        parent: see eviction.Tree.
    """

    def __init__(self, rows: int, parent: memoryview) -> None:
        self.is_on = False
        self._parent = parent
        self._codes = np.zeros(rows, np.uint8)
        self._code_of = self._codes.data
        self._requests: OrderedDict[int, int] = OrderedDict()

    def told(self, request: int, hint: Hint) -> None:
        """Of the blocks that a request uses from now on."""
        self.is_on = True
        self._requests[request] = _code(hint)
        if len(self._requests) > _REQUESTS_MAX:
            self._requests.popitem(last=False)

    def used(self, rows: Rows, request: int) -> None:
        """A request uses blocks; may be told again when more is known of the request."""
        told = self._requests.get(request, 0)
        codes = self._codes[rows]
        is_shared = codes >= _SHARED
        steps = np.maximum(_PRIORITIES[codes] - 1, _priority(told)) & 7
        shared = _SHARED | steps.astype(np.uint8) << _PRIORITY_SHIFT
        self._codes[rows] = np.where(is_shared, shared, told)

    def stored(self, rows: Rows, request: int) -> None:
        """A request stores new blocks."""
        self._codes[rows] = self._requests.get(request, 0)

    def share(self, row: int) -> list[int]:
        """A block is used by more than one session, and so are all before it.

        Returns: rows for which that is new.
        """
        fresh = []
        while row != NO_ROW and self._code_of[row] < _SHARED:
            self._code_of[row] = _SHARED | (self._code_of[row] & _PRIORITY)
            fresh.append(row)
            row = self._parent[row]
        return fresh

    def expectations(self, rows: Rows) -> NDArray[np.uint8]:
        """When blocks are expected, (rows,)."""
        expected: NDArray[np.uint8] = self._codes[rows] & np.uint8(_EXPECTATION)
        return expected

    def expectation(self, row: int) -> int:
        """The same for one row."""
        return int(self._code_of[row] & _EXPECTATION)

    def weights(self, rows: Rows) -> NDArray[np.float64]:
        """By what their priorities multiply blocks' worth, (rows,)."""
        weights: NDArray[np.float64] = _WEIGHTS[self._codes[rows]]
        return weights

    def weight(self, row: int) -> float:
        """The same for one row."""
        return float(_WEIGHT_OF[self._code_of[row]])
