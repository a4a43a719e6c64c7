"""Which slots of a tier are free."""

from __future__ import annotations

from array import array

from kvist.proto.errors import TierFull

DOOMED_SHARE = 1 / 16


class FreeSlots:
    """A stack of free slot numbers: what was freed last is given out first.

    take leaves its slot on the stack, to be skipped when it comes up, because a search would
    make a start with n blocks cost n * n. One thread uses it. 5 bytes a slot.

    A slot that gave back other bytes than it got is doomed: when it is freed it is not given out
    again, in this life. At most DOOMED_SHARE of the slots are, so that a worker or a device that
    damages everything cannot use a tier up; what comes after is reused.

    Attributes:
        count: slots that pop could give out now.
        doomed: slots that are not given out again.
    """

    def __init__(self, slots: int) -> None:
        """All of range(slots) are free; the lowest is given out first."""
        self._stack = array("I", range(slots - 1, -1, -1))
        self._used = bytearray(slots)
        self.count = slots
        self.doomed: set[int] = set()
        self._doomed_max = max(1, int(slots * DOOMED_SHARE))

    def doom(self, slot: int) -> bool:
        """Give a slot that is in use to nobody any more once it is free; False: too many are."""
        if len(self.doomed) < self._doomed_max:
            self.doomed.add(slot)
        return slot in self.doomed

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
        """Give a slot back; a doomed one stays in use for good."""
        assert self._used[slot], f"slot {slot} is free already"
        if slot in self.doomed:
            return
        self._used[slot] = 0
        self._stack.append(slot)
        self.count += 1


class Quarantine:
    """What a tier says about its doomed slots."""

    _free: FreeSlots

    @property
    def quarantined(self) -> int:
        """Slots that gave other bytes than they got, and are not given out again."""
        return len(self._free.doomed)

    def quarantine(self, slot: int) -> bool:
        """The slot is not to be used again once it is free; False when too many are so."""
        return self._free.doom(slot)
