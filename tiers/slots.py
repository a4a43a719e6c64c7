"""Which slots of a tier are free."""

from __future__ import annotations

from array import array

from kvist.proto.errors import TierFull


class FreeSlots:
    """A stack of free slot numbers: what was freed last is given out first.

    take leaves its slot on the stack, to be skipped when it comes up, because a search would
    make a start with n blocks cost n * n. One thread uses it. 5 bytes a slot.

    Attributes:
        count: slots that pop could give out now.
    """

    def __init__(self, slots: int) -> None:
        """All of range(slots) are free; the lowest is given out first."""
        self._stack = array("I", range(slots - 1, -1, -1))
        self._used = bytearray(slots)
        self.count = slots

    def pop(self) -> int:
        """Take any free slot.

        Raises:
            TierFull: none is left.
        """
        if not self.count:
            raise TierFull(f"all {len(self._used)} slots are in use")
        slot = self._stack.pop()
        while self._used[slot]:
            slot = self._stack.pop()
        self._used[slot] = 1
        self.count -= 1
        return slot

    def take(self, slot: int) -> bool:
        """Take this slot; False when there is no such slot or it is in use."""
        if not 0 <= slot < len(self._used) or self._used[slot]:
            return False
        self._used[slot] = 1
        self.count -= 1
        return True

    def push(self, slot: int) -> None:
        """Give a slot back."""
        assert self._used[slot], f"slot {slot} is free already"
        self._used[slot] = 0
        self._stack.append(slot)
        self.count += 1
