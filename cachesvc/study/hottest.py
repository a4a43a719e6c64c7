"""The hottest prefixes: which beginnings of prompts save most, counted block by block.

Each block counts the requests that found it since it was stored, 2 bytes a row. A prefix ends where
the count falls: where prompts part, or where they end. It is worth its uses times its length, the
tokens that nobody computed again. Of prefixes that lie in one another only those are shown that are
used at least twice as often as the longer one, or a long chat would fill the list with its turns.

Looking for them is done in slices, so that it holds up nothing, whatever the size of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.blocks import NO_ROW, Blocks
from kvist.cachesvc.policy.eviction import Rows
from kvist.proto.hints import Hint

SHOWN = 12
# One look goes over so many rows (0.4 ms) and walks so many blocks of chains (about 1.5 ms) at
# most; a cache of a million blocks is gone over in 27 looks.
_SLICE_ROWS = 1 << 16
_WALK_BLOCKS = 16384
# Looks between two rounds: to describe what was found takes up to 2 ms, so not each second.
REST_LOOKS = 4
# Rows with the highest worth that are kept of a round: the ends of long chains come first.
_BEST = 512
TOKENS_SHOWN = 8
USES_MAX = 65535


@dataclass(frozen=True, slots=True)
class Prefix:
    """A beginning that prompts share, as it was when the round that found it ended.

    Attributes:
        key: of its last block, hex.
        blocks: of it, the last included.
        uses: requests that found it since its last block was stored, USES_MAX at most.
        dram_blocks: of its blocks, those with a copy in DRAM; flash_blocks likewise.
        namespace: first digits of the digest.
        begins: first token ids of its first block, ends: last ones of its last; both empty unless
            the operator allows it and the block is in DRAM.
    """

    key: str
    blocks: int
    uses: int
    dram_blocks: int
    flash_blocks: int
    namespace: str
    begins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


class Hottest:
    """Counts uses and finds what is used most; a Learner (policy/eviction). One thread.

    Args:
        blocks: the stored blocks. rows: of the index.

    Attributes:
        prefixes: what the last whole round found, most worth first.
        tokens_of: token ids of the block in a row, if they may be shown; () where not at hand.
    """

    def __init__(self, blocks: Blocks, rows: int) -> None:
        self._blocks = blocks
        self._uses: Final = np.zeros(rows, np.uint16)
        self._best = np.zeros(0, np.int64)
        self._at = self._rest = 0
        self.prefixes: tuple[Prefix, ...] = ()
        self.tokens_of: Callable[[int], tuple[int, ...]] = lambda _row: ()

    def found(self, rows: Rows, request: int, at: int) -> None:  # noqa: ARG002 - see Learner
        """See Learner."""
        self._uses[rows] = np.minimum(self._uses[rows], USES_MAX - 1) + np.uint16(1)

    def stored(self, rows: Rows, request: int, at: int) -> None:  # noqa: ARG002
        """See Learner."""
        self._uses[rows] = 0

    def restored(self, rows: Rows, at: int) -> None:  # noqa: ARG002
        """See Learner."""
        self._uses[rows] = 0

    def hinted(self, rows: Rows, request: int, hint: Hint) -> None:
        """See Learner."""

    def removed(self, row: int) -> None:
        """See Learner."""
        self._uses[row] = 0

    def forget(self, rows: Rows) -> None:
        """Blocks that were cleared are not of interest any more."""
        self._uses[rows] = 0

    def uses(self, rows: Rows) -> Rows:
        """Requests that found each of some stored blocks since it was stored."""
        return self._uses[rows].astype(np.int64)

    def look(self) -> tuple[Prefix, ...]:
        """Go over the next rows; what the last whole round found, most worth first."""
        if self._rest:
            self._rest -= 1
            return self.prefixes
        stop = min(self._at + _SLICE_ROWS, len(self._uses))
        used = np.flatnonzero(self._uses[self._at : stop]) + self._at
        self._best = self._top(np.concatenate([self._best, used[~self._goes_on(used)]]))
        self._at = stop
        if stop == len(self._uses):
            self.prefixes = tuple(self._ends())
            self._at, self._best, self._rest = 0, np.zeros(0, np.int64), REST_LOOKS
        return self.prefixes

    def _goes_on(self, rows: Rows) -> NDArray[np.bool_]:
        """Whether all that used a row used its first child too: then the prefix ends further on,
        and a long document would fill the list of the best with its rows."""
        child = np.asarray(self._blocks.first_child)[rows]
        same: NDArray[np.bool_] = (child != NO_ROW) & (self._uses[child] == self._uses[rows])
        return same

    def _worth(self, rows: Rows) -> Rows:
        depth = np.asarray(self._blocks.depth)[rows].astype(np.int64)
        worth: Rows = self._uses[rows].astype(np.int64) * (depth + 1)
        return worth

    def _top(self, rows: Rows) -> Rows:
        if len(rows) <= _BEST:
            return rows
        return rows[np.argpartition(self._worth(rows), -_BEST)[-_BEST:]]

    def _ends(self) -> Iterator[Prefix]:
        """Prefixes of the round's best rows that do not say the same as a better one."""
        rows = self._best[np.argsort(-self._worth(self._best), kind="stable")]
        ends: dict[int, int] = {}  # last row of a prefix that is shown -> its uses
        through: dict[int, int] = {}  # row -> most uses of a shown prefix that it is in
        walked = 0
        for row in map(int, rows):
            uses = int(self._uses[row])
            if not uses or 2 * through.get(row, 0) > uses:
                continue
            chain = self._blocks.chain(row)
            walked += len(chain)
            if any(ends.get(above, 0) and ends[above] < 2 * uses for above in chain):
                continue
            ends[row] = uses
            for above in chain:
                through[above] = max(through.get(above, 0), uses)
            yield self._describe(row, chain, uses)
            if len(ends) == SHOWN or walked > _WALK_BLOCKS:
                break

    def _describe(self, row: int, chain: list[int], uses: int) -> Prefix:
        index = self._blocks.index
        return Prefix(
            key=index.key(row).hex(),
            blocks=len(chain),
            uses=uses,
            dram_blocks=sum(index.dram(each) is not None for each in chain),
            flash_blocks=sum(index.flash(each) is not None for each in chain),
            namespace=self._blocks.namespace(row).hex()[:12],
            begins=self.tokens_of(chain[-1])[:TOKENS_SHOWN],
            ends=self.tokens_of(row)[-TOKENS_SHOWN:],
        )
