"""The journal: what came to a medium and what left it, and was not told to routers yet.

It is no queue. It has one entry for a block and a medium, the last thing that happened to it, so
it is bounded by what the tiers hold, whoever is slow, and nothing is ever dropped from it. What
came and went before anybody looked is not told at all.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from kvist.proto.keys import BlockKey


@dataclass(frozen=True, slots=True)
class Facts:
    """What is told of a block beside its key.

    Attributes:
        parent: key of the block before, NO_KEY for a first one.
        tokens: its own, little-endian uint32; b"" when they are not known.
        space: "" for a block that every request with these tokens may use; else a name for
            whose it is.
    """

    parent: BlockKey
    tokens: bytes
    space: str


Entry = tuple[BlockKey, str]
"""A block and a medium; "" where only its facts have become known."""

Changes = dict[Entry, Facts | None]
"""What was stored, with facts, and what was removed, with None; in the order of events."""


class Journal:
    """Written by the threads that own tiers, read by the publisher's; about 1 us a change.

    Attributes:
        bell: an eventfd that becomes readable when there is something to take.
    """

    def __init__(self) -> None:
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = Lock()
        self._changes: Changes = {}
        self._open = True

    def __len__(self) -> int:
        """Entries that wait to be told."""
        return len(self._changes)

    def stored(self, key: BlockKey, medium: str, facts: Facts) -> None:
        """A medium has a block now."""
        self._note((key, medium), facts)

    def known(self, key: BlockKey, facts: Facts) -> None:
        """What a block has for tokens, if it is still there."""
        self._note((key, ""), facts)

    def removed(self, key: BlockKey, medium: str) -> None:
        """A medium has a block no more."""
        self._note((key, medium), None)

    def _note(self, entry: Entry, facts: Facts | None) -> None:
        with self._lock:
            if not self._open:
                return
            if not self._changes:
                self.ring()
            self._changes.pop(entry, None)  # so that it is told after what made it so
            self._changes[entry] = facts

    def ring(self) -> None:
        """Wake whoever waits for the bell."""
        os.eventfd_write(self.bell, 1)

    def take(self) -> Changes:
        """All that there is; the bell is silent until there is more."""
        with self._lock:
            changes, self._changes = self._changes, {}
            with suppress(BlockingIOError):
                os.eventfd_read(self.bell)
        return changes

    def close(self) -> None:
        """Changes after this are told to nobody."""
        with self._lock:
            self._open = False
            os.close(self.bell)
