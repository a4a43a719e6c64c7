"""Tokens of blocks that an earlier life left on flash: the index there does not have them."""

from __future__ import annotations

import threading
from queue import SimpleQueue

from kvist.cachesvc.events.journal import Facts, Journal
from kvist.proto.errors import TierOffline
from kvist.proto.keys import BlockKey
from kvist.tiers.flash import FlashTier

Wish = tuple[BlockKey, int, str]


class TokenReader:
    """Reads headers, one after the other, on a thread that begins with the first wish.

    A header is 4 KiB of a record; 100,000 of them take a disk some seconds, beside its other work.

    Args:
        flash: where from. journal: where to.
    """

    def __init__(self, flash: FlashTier, journal: Journal) -> None:
        self._flash = flash
        self._journal = journal
        self._wishes: SimpleQueue[Wish | None] = SimpleQueue()
        self._closing = False
        self._thread: threading.Thread | None = None

    def wish(self, key: BlockKey, slot: int, space: str) -> None:
        """Have the tokens of a block in a flash slot told; space is as in Facts."""
        self._wishes.put((key, slot, space))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvist-tokens", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Read no more."""
        self._closing = True
        self._wishes.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (wish := self._wishes.get()) is not None and not self._closing:
            key, slot, space = wish
            try:
                header = self._flash.header(slot)
            except TierOffline:  # told without tokens as it was, until it rises or is found anew
                continue
            # The slot may have another block by now. Whether this one is still there is no matter:
            # what is known of a block that was removed is not told.
            if header is not None and header.key == key:
                self._journal.known(key, Facts(header.parent, header.tokens, space))
