"""Ghosts: what is remembered of blocks that were evicted, so that their return can be learned from.

One ghost stands for a run: blocks of a chain that were used together last and are of one class.
Eviction goes from the end of a chain to its beginning, so a ghost grows upwards. It is found by
the name of its shallowest block, which is the one that a prompt that comes back misses first.

A ring of fixed size, in arrays, with an open hash table on top (linear probing, backward-shift
deletion: Knuth, The Art of Computer Programming 3, 6.4, algorithm R): 28 bytes a ghost and 8 to 16
of the table. The oldest ghost makes room for a new one.
"""

from __future__ import annotations

import numpy as np

NO_GHOST = -1


class Ghosts:
    """The ring. One thread.

    Attributes:
        length: blocks of a ghost; 0 where there is none. These are by ghost number:
        request, at: as in eviction.History, when the run was evicted.
        uses, rhythm, kind: see rgg.Gittins.

    Args:
        capacity: ghosts at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lengths = np.zeros(capacity, np.int32)
        self.ats = np.zeros(capacity, np.uint32)
        self.kinds = np.zeros(capacity, np.uint16)
        self.length, self.at, self.kind = self.lengths.data, self.ats.data, self.kinds.data
        self.request = np.zeros(capacity, np.int64).data
        self.uses = np.zeros(capacity, np.uint8).data
        self.rhythm = np.zeros(capacity, np.uint8).data
        self._name = np.zeros(capacity, np.uint64).data
        table_slots = 1 << (2 * capacity - 1).bit_length()
        self._mask = table_slots - 1
        self._table = np.zeros(table_slots, np.int32).data  # ghost + 1; 0 is free
        self._next = 0
        # The ghost that grew last is named here and not in the table: it grows again, mostly.
        self._open = NO_GHOST
        self._open_name = 0

    def find(self, name: int) -> int:
        """The ghost whose shallowest block has that name; NO_GHOST if there is none."""
        if self._open != NO_GHOST and self._open_name == name:
            return self._open
        place = self._place(name)
        return self._table[place] - 1 if place >= 0 else NO_GHOST

    def next(self) -> int:
        """The number that the next ghost gets: the oldest ghost, if its length is not 0; the
        caller drops that first.
        """
        return self._next

    def open(self, name: int) -> int:
        """Begin a ghost of one block; its number. The caller fills in the rest."""
        ghost = self._next
        assert not self.length[ghost]
        self._next = (ghost + 1) % self.capacity
        self._close()
        self._open, self._open_name = ghost, name
        self.length[ghost] = 1
        return ghost

    def grow(self, ghost: int, name: int) -> None:
        """The block before a ghost's shallowest one, of that name, is evicted too."""
        if ghost != self._open:
            self._close()
            self._delete(ghost)
            self._open = ghost
        self._open_name = name
        self.length[ghost] += 1

    def drop(self, ghost: int) -> None:
        """Forget a ghost."""
        if ghost == self._open:
            self._open = NO_GHOST
        else:
            self._delete(ghost)
        self.length[ghost] = 0

    def _close(self) -> None:
        """Put the open ghost into the table. A name that is there belongs to an older life of
        the same block: that ghost stays in the ring, unfound, until it is the oldest."""
        ghost, name = self._open, self._open_name
        if ghost == NO_GHOST:
            return
        self._name[ghost] = name
        table, mask, place = self._table, self._mask, name & self._mask
        while table[place]:
            if self._name[table[place] - 1] == name:
                break
            place = place + 1 & mask
        table[place] = ghost + 1
        self._open = NO_GHOST

    def _place(self, name: int) -> int:
        """Where in the table a name is; -1 if nowhere."""
        table, mask, names, place = self._table, self._mask, self._name, name & self._mask
        while (entry := table[place]) and names[entry - 1] != name:
            place = place + 1 & mask
        return place if table[place] else -1

    def _delete(self, ghost: int) -> None:
        hole = self._place(self._name[ghost])
        table, mask, names = self._table, self._mask, self._name
        if hole < 0 or table[hole] != ghost + 1:
            return
        place = hole
        while entry := table[place := place + 1 & mask]:
            home = names[entry - 1] & mask
            # It may move into the hole if that is not before its home.
            if (place - home & mask) >= (place - hole & mask):
                table[hole] = entry
                hole = place
        table[hole] = 0
