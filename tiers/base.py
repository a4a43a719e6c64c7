"""The contract of a tier: a bounded number of slots, each holding at most one block."""

from __future__ import annotations

from typing import Protocol

from kvist.proto.record import BlockHeader, Bytes, Wanted


class Tier(Protocol):
    """Fixed slots of immutable blocks.

    A tier knows slots, not keys: which block is where is the index's business, what to drop is
    a decision, and decisions live in placing/placement. A block is written once and never
    changed. Methods block for one device operation at most. Different slots may be used from
    different threads at once; the caller sees to it that one slot is used by one thread at a
    time, except that read may run at any moment and then gives the block or raises.

    Attributes:
        name: "hbm", "dram" or "flash".
        slots: how many blocks fit.
    """

    name: str
    slots: int

    @property
    def free_slots(self) -> int:
        """Slots that allocate could give out now."""
        ...

    def allocate(self) -> int:
        """Take a free slot; it is the caller's until free, and unreadable until write.

        Raises: TierFull when none is left. TierOffline when the device failed.
        """
        ...

    def write(self, slot: int, header: BlockHeader, payload: Bytes) -> None:
        """Fill an allocated slot and make it readable.

        Args:
            slot: from allocate, not yet written.
            header: says what the payload is; header.checksum is that of the payload.
            payload: shape (header.payload_bytes,), uint8.

        Raises: TierOffline when the device failed; the slot stays the caller's.
        """
        ...

    def read(self, slot: int, wanted: Wanted, out: Bytes) -> None:
        """Copy a block out, if it is what was asked, whole and unchanged.

        Args:
            slot: any slot number.
            wanted: what the block must be.
            out: shape (wanted.payload_bytes,), uint8, writable; its content is undefined after
                an error.

        Raises: BlockMissing when the slot holds no block. BlockCorrupt when the block differs
            from what was asked or its payload from its checksum. BlockTorn when the slot was
            rewritten meanwhile. TierOffline when the device failed.
        """
        ...

    def free(self, slot: int) -> None:
        """Make the slot unreadable and give it back; freeing a free slot is a broken invariant."""
        ...

    def close(self) -> None:
        """Give back memory, files and descriptors; the tier is not used after it."""
        ...
