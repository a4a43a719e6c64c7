"""What the sidecar alone knows of each stored block: the tree of prefixes, row by row.

A block's id is its row in the shared index (catalog/index). All of this is arrays indexed by
row, about 37 bytes a row and no Python object per block: a million objects cost a pause of 0.4 s
at each full garbage collection. Single values are read through memoryviews, which give Python
ints in 80 ns; a numpy element takes 135 ns and is no int.

Two closures hold after every method, and everything above relies on them:

    stored    the parent of a stored block is stored, so a lookup may search by halves
    flash     the parent of a block on flash, or on its way there, is too, so that what a restart
              finds on flash hangs together

There is none for DRAM: a long conversation may be continued although its beginning sank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.index import IndexWriter, Location
from kvist.proto.keys import BlockKey

NO_ROW = -1
"""The parent of a first block, the child of a leaf."""

_NO_SPACE = -1


def name_of(key: BlockKey) -> int:
    """64 bits that stand for a block in tables that outlive its row."""
    return int.from_bytes(key[:8], "little")


class Blocks:
    """The stored blocks. One thread. Slots are only written down here, never given back.

    Attributes:
        index: where the copies are, as workers see it.
        parent: row of the block before, or NO_ROW.
        first_child, next_sibling: rows, or NO_ROW.
        dram_children: children with a copy in DRAM.
        flash_children: children with a copy on flash or on the way there.
        depth: blocks before this one.
        spaces: number of a namespace that has blocks -> its digest.
        spaces_version: grows whenever spaces changes.
        copies: tier -> number of a namespace -> its copies there; on flash those under way count.
        block_tokens: number of a namespace -> tokens of a block, once note_tokens was told.
        on_copy: told of (row, tier, whether the block is there now), after it came or before it
            goes; None tells nobody.
    """

    def __init__(self, index: IndexWriter) -> None:
        """Nothing is stored; index is empty."""
        self.index = index
        self.parent: Final = _per_row(index.rows, NO_ROW)
        self.first_child: Final = _per_row(index.rows, NO_ROW)
        self.next_sibling: Final = _per_row(index.rows, NO_ROW)
        self._previous_sibling = _per_row(index.rows, NO_ROW)
        self.dram_children: Final = _per_row(index.rows, 0)
        self.flash_children: Final = _per_row(index.rows, 0)
        self.depth: Final = _per_row(index.rows, 0)
        self._space = _per_row(index.rows, _NO_SPACE)
        self._sinking = bytearray(index.rows)
        self.spaces: dict[int, bytes] = {}
        self.spaces_version = 0
        self.copies: dict[str, dict[int, int]] = {"dram": {}, "flash": {}}
        self.block_tokens: dict[int, int] = {}
        self.on_copy: Callable[[int, str, bool], None] | None = None
        self._space_ids: dict[bytes, int] = {}
        self._hidden_spaces: dict[int, bytes] = {}
        self._space_blocks: dict[int, int] = {}
        self._spaces_seen = 0

    def __len__(self) -> int:
        """Blocks stored, without those that are hidden."""
        hidden = sum(self._space_blocks[number] for number in self._hidden_spaces)
        return self.index.used_rows - hidden

    def add(self, key: BlockKey, parent: int, namespace: bytes, location: Location) -> int:
        """Store a new block and make it visible.

        Args:
            key: of no stored block.
            parent: row of the block before, or NO_ROW; on flash, if the new block is.
            namespace: digest.
            location: its copies, at least one.

        Returns: its row.

        Raises: TierFull when the index has no room for the key.
        """
        row = self.index.insert(key, location.dram, location.flash)
        self.parent[row] = parent
        self.first_child[row] = NO_ROW
        self.next_sibling[row] = self._previous_sibling[row] = NO_ROW
        self.dram_children[row] = self.flash_children[row] = 0
        self.depth[row] = 0 if parent == NO_ROW else self.depth[parent] + 1
        self._space[row] = self._enter_space(namespace)
        self._count(self.dram_children, row, location.dram is not None)
        if location.flash is not None:
            assert parent == NO_ROW or self.reaches_flash(parent)
            self._count(self.flash_children, row, 1)
        if parent != NO_ROW:
            elder = self.first_child[parent]
            self.next_sibling[row] = elder
            if elder != NO_ROW:
                self._previous_sibling[elder] = row
            self.first_child[parent] = row
        if location.dram is not None:
            self._tell(row, "dram", True)
        if location.flash is not None:
            self._tell(row, "flash", True)
        return row

    def name(self, row: int) -> int:
        """See name_of."""
        return name_of(self.index.key(row))

    def note_tokens(self, row: int, block_tokens: int) -> None:
        """How many tokens a block has, and so each of its namespace; for people only."""
        self.block_tokens.setdefault(self._space[row], block_tokens)

    def space(self, row: int) -> int:
        """Number of a stored block's namespace in spaces, or as hide gave it; -1 of a free row."""
        return self._space[row]

    def spaces_of(self, rows: NDArray[np.int64] | slice) -> NDArray[np.int32]:
        """The same of many; of a slice it is what is there at any time."""
        return np.asarray(self._space)[rows]

    def space_blocks(self, space: int) -> int:
        """Blocks of a namespace that has some."""
        return self._space_blocks[space]

    def tails(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows from start up to stop of blocks on which stand none, or several; none hidden."""
        child = np.asarray(self.first_child)[start:stop]
        has_two = np.asarray(self.next_sibling)[child] != NO_ROW
        stored = np.asarray(self._space)[start:stop] != _NO_SPACE
        stored &= ~self.index.hidden.are(slice(start, stop))
        return np.flatnonzero(stored & ((child == NO_ROW) | has_two)) + start

    def run(self, tail: int) -> list[int]:
        """The blocks up to a tail that no other prompt parts from; the tail first."""
        parent, child, sibling = self.parent, self.first_child, self.next_sibling
        rows, row = [tail], parent[tail]
        while row != NO_ROW and sibling[child[row]] == NO_ROW:
            rows.append(row)
            row = parent[row]
        return rows

    def namespace(self, row: int) -> bytes:
        """Digest of a block's namespace."""
        space = self._space[row]
        return self.spaces.get(space) or self._hidden_spaces[space]

    def held(self, namespace: bytes, tier: str) -> int:
        """Copies of a namespace's blocks in a tier."""
        return self.copies[tier].get(self._space_ids.get(namespace, _NO_SPACE), 0)

    def namespaces(self) -> list[bytes]:
        """Digests of the namespaces that have blocks."""
        return list(self.spaces.values())

    def in_namespace(self, namespace: bytes | None) -> list[int]:
        """Rows of the stored blocks of a namespace, or of all with None, those that are hidden
        included; children first."""
        if namespace is None:
            rows = np.flatnonzero(np.asarray(self._space) != _NO_SPACE)
        else:
            rows = self.in_spaces([self._space_ids.get(namespace, _NO_SPACE - 1)])
        return [int(row) for row in self.deepest_first(rows)]

    def deepest_first(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of stored blocks, children before their parents."""
        heights = -np.asarray(self.depth)[rows]
        heights -= heights.min(initial=0)
        # By radix where 16 bits will do.
        short = heights.max(initial=0) < 1 << 16
        return rows[np.argsort(heights.astype(np.uint16) if short else heights, kind="stable")]

    def hide(self, namespace: bytes | None) -> tuple[NDArray[np.int64], frozenset[int]]:
        """Have nobody find the blocks of a namespace any more, or any block with None.

        They are stored until they are dropped, but no key leads to them, and their namespace has
        another number from now on. No block can come to stand on one of them.

        Returns: rows, children first, and the numbers that their namespaces had. A row is one of
            these blocks as long as its number is one of those.
        """
        of_one = self._space_ids.get(namespace or b"")
        numbers = list(self.spaces) if namespace is None else [of_one] if of_one is not None else []
        rows = self.in_spaces(numbers)
        self.index.hidden.add(rows, "cleared")  # in the order in which they lie in memory
        for number in numbers:
            digest = self._hidden_spaces[number] = self.spaces.pop(number)
            del self._space_ids[digest]
        self.spaces_version += 1
        return self.deepest_first(rows), frozenset(numbers)

    def hide_trees(self, rows: NDArray[np.int64], why: str) -> tuple[frozenset[int], list[int]]:
        """Have nobody find some blocks any more, whatever stands on them included; as hide.

        Their namespaces stay, and they get numbers of their own. What they stood on forgets them.

        Args:
            rows: of blocks that are found, and all that stand on these; one at least.
            why: see catalog/hidden.REASONS.

        Returns: the numbers that they have now, and the rows of what they stood on.
        """
        spaces, parent, hidden = np.asarray(self._space), np.asarray(self.parent), self.index.hidden
        marks = np.zeros(self.index.rows, np.bool_)
        marks[rows] = True
        rows = np.flatnonzero(marks)  # in the order in which they lie in memory
        hidden.add(rows, why)
        cut = rows[parent[rows] != NO_ROW]
        cut = cut[~hidden.are(parent[cut])]
        bereft = parent[cut].tolist()
        for row in cut.tolist():
            self._detach(row)
        numbers = []
        for mine in by_value(rows, spaces[rows]):
            numbers.append(self._spaces_seen)
            self._move_space(mine, int(spaces[mine[0]]), self._spaces_seen)
            spaces[mine] = self._spaces_seen
            self._spaces_seen += 1
        self.spaces_version += 1
        return frozenset(numbers), bereft

    def _move_space(self, rows: NDArray[np.int64], space: int, number: int) -> None:
        """Count some blocks of a namespace as those of a hidden one."""
        self._hidden_spaces[number] = self.spaces[space]
        self._space_blocks[number] = len(rows)
        in_dram, on_flash = self.index.copies(rows)
        on_flash |= np.frombuffer(self._sinking, np.bool_)[rows]
        for tier, held in (("dram", in_dram), ("flash", on_flash)):
            copies, moved = self.copies[tier], int(np.count_nonzero(held))
            copies[number] = moved
            copies[space] = copies.get(space, 0) - moved
        self._count_out(space, len(rows))

    def _detach(self, row: int) -> None:
        """Its parent forgets a block that nobody is to find."""
        parent = self.parent[row]
        self._leave_siblings(row)
        self.dram_children[parent] -= self.index.dram(row) is not None
        self.flash_children[parent] -= self.reaches_flash(row)
        self.parent[row] = NO_ROW
        self.next_sibling[row] = self._previous_sibling[row] = NO_ROW

    def in_spaces(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        """Rows of the stored blocks of some namespaces, given by their numbers in spaces."""
        spaces = np.asarray(self._space)
        is_mine = spaces == numbers[0] if len(numbers) == 1 else np.isin(spaces, numbers)
        return np.flatnonzero(is_mine)

    def chain(self, row: int) -> list[int]:
        """A block and all before it, itself first."""
        rows, parent = [], self.parent
        while row != NO_ROW:
            rows.append(row)
            row = parent[row]
        return rows

    # Copies. A block whose last copy goes is forgotten, its row is free.

    def gain_dram(self, row: int, slot: int) -> None:
        """A block has a copy in DRAM now."""
        assert self.index.dram(row) is None
        self.index.set_location(row, slot, self.index.flash(row))
        self._count(self.dram_children, row, 1)
        self._tell(row, "dram", True)

    def lose_dram(self, row: int) -> int:
        """A block's copy in DRAM goes; returns its slot. As the last copy: no children, no sink."""
        slot, flash = self.index.dram(row), self.index.flash(row)
        assert slot is not None
        self._tell(row, "dram", False)
        self._count(self.dram_children, row, -1)
        if flash is None:
            self._forget(row)
        else:
            self.index.set_location(row, None, flash)
        return slot

    def reaches_flash(self, row: int) -> bool:
        """Whether a block has a copy on flash or on the way there."""
        return bool(self._sinking[row]) or self.index.flash(row) is not None

    def begin_sink(self, row: int) -> None:
        """A block is on its way to flash; its parent counts it as a child there from now on."""
        parent = self.parent[row]
        assert parent == NO_ROW or self.reaches_flash(parent)
        assert not self.reaches_flash(row)
        self._sinking[row] = 1
        self._count(self.flash_children, row, 1)

    def cancel_sink(self, row: int) -> None:
        """It does not get there. No child of it is there or under way."""
        assert self._sinking[row]
        assert not self.flash_children[row]
        self._sinking[row] = 0
        self._count(self.flash_children, row, -1)

    def finish_sink(self, row: int, slot: int) -> None:
        """It is there."""
        assert self._sinking[row]
        self._sinking[row] = 0
        self.index.set_location(row, self.index.dram(row), slot)
        self._tell(row, "flash", True)

    def lose_flash(self, row: int) -> int:
        """A block's copy on flash goes; returns its slot. No child there; the last copy: none."""
        dram, slot = self.index.dram(row), self.index.flash(row)
        assert slot is not None
        assert not self.flash_children[row]
        self._tell(row, "flash", False)
        self._count(self.flash_children, row, -1)
        if dram is None:
            self._forget(row)
        else:
            self.index.set_location(row, dram, None)
        return slot

    def _tell(self, row: int, tier: str, is_there: bool) -> None:
        if self.on_copy is not None:
            self.on_copy(row, tier, is_there)

    def _count(self, children: memoryview, row: int, change: int) -> None:
        copies = self.copies["dram" if children is self.dram_children else "flash"]
        space = self._space[row]
        copies[space] = copies.get(space, 0) + change
        parent = self.parent[row]
        if parent != NO_ROW:
            children[parent] += change

    def _forget(self, row: int) -> None:
        assert self.first_child[row] == NO_ROW, "a block goes after all that stand on it"
        assert not self._sinking[row]
        self._leave_siblings(row)
        space = self._space[row]
        self._space[row] = _NO_SPACE
        self._count_out(space, 1)
        self.index.remove(row)

    def _leave_siblings(self, row: int) -> None:
        parent, elder = self.parent[row], self.next_sibling[row]
        younger = self._previous_sibling[row]
        if younger != NO_ROW:
            self.next_sibling[younger] = elder
        elif parent != NO_ROW:
            self.first_child[parent] = elder
        if elder != NO_ROW:
            self._previous_sibling[elder] = younger

    def _enter_space(self, namespace: bytes) -> int:
        """Number of a namespace; one without blocks is forgotten: old tenants cost nothing."""
        space = self._space_ids.get(namespace)
        if space is None:
            space = self._space_ids[namespace] = self._spaces_seen
            self.spaces[space] = namespace
            self._space_blocks[space] = 0
            self._spaces_seen += 1
            self.spaces_version += 1
        self._space_blocks[space] += 1
        return space

    def _count_out(self, space: int, blocks: int) -> None:
        """So many blocks of a namespace are not of it any more."""
        self._space_blocks[space] -= blocks
        if not self._space_blocks[space]:
            del self._space_blocks[space]
            self.block_tokens.pop(space, None)
            self.spaces_version += 1
            for copies in self.copies.values():
                copies.pop(space, None)
            if self._hidden_spaces.pop(space, None) is None:
                del self._space_ids[self.spaces.pop(space)]


def by_value(rows: NDArray[np.int64], values: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    """Rows, one at least, parted by a value of each."""
    if (values == values[0]).all():
        return [rows]
    order = np.argsort(values, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(values[order])) + 1)


def _per_row(rows: int, value: int) -> memoryview:
    return np.full(rows, value, np.int32).data
