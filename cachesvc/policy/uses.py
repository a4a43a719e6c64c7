"""Uses: what workers do, told as requests; and which request used which block last.

A policy thinks in requests: one prompt, of which the leading blocks are found and the rest is
stored. The service hears of a request in pieces, and this is how they are put together:

    TOUCH      an entry in a session's ring, pushed when a request's blocks have been loaded, and
               before any block of it is stored. Begins a request, which finds the whole chain.
    PREFETCH   pushed before that if some of the chain is on flash only, twice sometimes. The
               first begins the request; what the same session pushes for the same block within
               JOIN_S goes on with it and is not one more use.
    Commit     new blocks go on with the request that used the block they stand on last, if it
               began at most JOIN_S before; so do the blocks that a request generates, one by one.
               Otherwise (no touch came, for the ring was full; or it takes long) they begin one.
    Read       of a client elsewhere, block by block: one goes on with the request that has just
               used the block before it, or else begins one, which finds the whole chain. So does
               a block that is stored once more because flash was away.
    Prefetch   a call of a client elsewhere: a request by itself.
    Hint       of a TOUCH, a Prefetch or a Read: told of the request that these begin or go on
               with. EXPECT: of the request that will begin with a block not stored yet.
    restart    all that is found on flash belongs to one request, number 0, at the start.

What a worker found in its own pool (HBM) is part of the chain that it touches. Blocks that were
missed and then not stored (no room, over the share) are not heard of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.policy.eviction import TICK_MASK, TICKS_PER_S, History, Learner, Rows, Tree
from kvist.proto.hints import NO_HINT, Hint

# A request touches when it is admitted and stores as it is computed. If it is longer, its uses
# are counted as of two requests; if it were much longer, what a long answer stores would seem old.
JOIN_S = 60
_JOIN = JOIN_S * TICKS_PER_S
# Wishes whose touch has not come, because their request was aborted.
_WISHES_MAX = 1024
_EXPECTED_MAX = 1024
_NO_ROWS = np.zeros(0, np.int64)
# Requests that may be gone on with; 60 s of 68 a second.
_OPEN_MAX = 4096


class Uses:
    """Numbers requests and tells those who learn. One thread.

    Args:
        tree: the stored blocks.
        history: written here.
        learners: told before history is.
        now: seconds, of a clock that does not jump.

    Attributes:
        requests: begun so far, the one at the start included.
        found_blocks, stored_blocks: of all requests.
    """

    def __init__(
        self,
        tree: Tree,
        history: History,
        learners: Sequence[Learner],
        now: Callable[[], float],
    ) -> None:
        self._parent: Final = tree.parent
        self._name: Final = tree.name
        self._history = history
        self._learners = learners
        self._now = now
        self._start_s = now()
        self._wishes: dict[tuple[int, int], int] = {}
        self._expected: dict[int, Hint] = {}
        self._began_at = np.zeros(_OPEN_MAX, np.uint32).data
        self._new: list[int] = []
        self._restored: list[int] = []
        self.requests = 1
        self.found_blocks = 0
        self.stored_blocks = 0

    def clock(self) -> int:
        """Ticks since the start."""
        return int((self._now() - self._start_s) * TICKS_PER_S) & TICK_MASK

    def wished(self, session: int, row: int, hint: Hint = NO_HINT) -> None:
        """A session will use a block and all before it soon."""
        key, at = (session, row), self.clock()
        if not self._is_wished(key, at):
            self._begin(self._chain(row), at)
            self._wishes.pop(key, None)
            self._wishes[key] = at
            if len(self._wishes) > _WISHES_MAX:
                del self._wishes[next(iter(self._wishes))]
        self._tell_hint(row, hint)

    def touched(self, session: int, row: int, hint: Hint = NO_HINT) -> None:
        """A session uses a block and all before it."""
        key, at = (session, row), self.clock()
        if not self._is_wished(key, at):
            self._begin(self._chain(row), at)
        self._wishes.pop(key, None)
        self._tell_hint(row, hint)

    def expected(self, name: int, hint: Hint) -> None:
        """A request that finds nothing will store a first block of that name."""
        self._expected.pop(name, None)
        self._expected[name] = hint
        if len(self._expected) > _EXPECTED_MAX:
            del self._expected[next(iter(self._expected))]

    def _is_wished(self, key: tuple[int, int], at: int) -> bool:
        """The row may have got another block since; one use less is counted then."""
        wished_at = self._wishes.get(key)
        return wished_at is not None and at - wished_at & TICK_MASK <= _JOIN

    def used(self, row: int, hint: Hint = NO_HINT) -> None:
        """Somebody uses a block by itself, after the one before it."""
        at = self.clock()
        request = self._request_on(self._parent[row], at)
        if request > self._history.request_of[row]:
            self._tell_found(np.array([row], np.int64), request, at)
        else:
            self._begin(self._chain(row), at)
        self._tell_hint(row, hint)

    def found(self, rows: Rows, hint: Hint = NO_HINT) -> None:
        """A new request finds a chain."""
        self._begin(rows, self.clock())
        self._tell_hint(int(rows[-1]), hint)

    def stored(self, row: int) -> None:
        """A block is new; tell_stored follows before anything else is asked of the policy."""
        self._new.append(row)

    def tell_stored(self) -> None:
        """What was stored goes on with requests, chain by chain."""
        new, parent, at = self._new, self._parent, self.clock()
        self._new = []
        starts = [i for i, row in enumerate(new) if not i or parent[row] != new[i - 1]]
        for start, stop in pairwise([*starts, len(new)]):
            request = self._request_on(parent[new[start]], at)
            if request < 0:
                request = self._next_request(at)
                self._tell_expected(new[start], request)
            rows = np.array(new[start:stop], np.int64)
            self.stored_blocks += len(rows)
            for learner in self._learners:
                learner.stored(rows, request, at)
            self._note(rows, request, at)

    def restored(self, row: int) -> None:
        """A block was found on flash at the start; tell_restored follows."""
        self._restored.append(row)

    def tell_restored(self) -> None:
        """What was restored belongs to request 0."""
        rows, at = np.array(self._restored, np.int64), self.clock()
        self._restored.clear()
        for learner in self._learners:
            learner.restored(rows, at)
        self._note(rows, 0, at)

    def removed(self, row: int) -> None:
        """A block is in no tier any more; the tree still knows it."""
        for learner in self._learners:
            learner.removed(row)

    def _chain(self, row: int) -> Rows:
        """A block and all before it, first block first. About 0.1 us a block."""
        rows, parent = [], self._parent
        while row != NO_ROW:
            rows.append(row)
            row = parent[row]
        return np.array(rows[::-1], np.int64)

    def _next_request(self, at: int) -> int:
        request = self.requests
        self.requests += 1
        self._began_at[request % _OPEN_MAX] = at
        return request

    def _request_on(self, parent: int, at: int) -> int:
        """Number of the request that used a block last, if it may go on; else -1."""
        request = self._history.request_of[parent] if parent != NO_ROW else -1
        if request <= max(0, self.requests - _OPEN_MAX):
            return -1
        return request if at - self._began_at[request % _OPEN_MAX] & TICK_MASK <= _JOIN else -1

    def _begin(self, rows: Rows, at: int) -> None:
        self._tell_found(rows, self._next_request(at), at)

    def _tell_found(self, rows: Rows, request: int, at: int) -> None:
        self.found_blocks += len(rows)
        for learner in self._learners:
            learner.found(rows, request, at)
        self._note(rows, request, at)

    def _tell_hint(self, row: int, hint: Hint) -> None:
        """Of the request that has just found a chain, which ends with a row."""
        if hint != NO_HINT:
            rows, request = self._chain(row), self._history.request_of[row]
            for learner in self._learners:
                learner.hinted(rows, request, hint)

    def _tell_expected(self, row: int, request: int) -> None:
        hint = self._expected.pop(self._name(row), None) if self._expected else None
        if hint is not None:
            for learner in self._learners:
                learner.hinted(_NO_ROWS, request, hint)

    def _note(self, rows: Rows, request: int, at: int) -> None:
        self._history.request[rows] = request
        self._history.at[rows] = at
