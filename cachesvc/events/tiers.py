"""The sidecar's events: what happens to the copies of blocks in DRAM and on flash.

A block's tokens are read from its record in DRAM, where every block was that this life has
stored. What an earlier life left on flash is told without tokens at once, and again with them when
its header was read.

Routers compare tokens, and a block of a tenant's must not look like everybody's. Workers attach
with the namespace of their model; tenants' namespaces are made of it and their salt. So blocks of
namespaces with which nobody attached carry `kvist:` and the first half of the digest in extra_keys,
where vLLM has the salt itself, which is a secret.
"""

from __future__ import annotations

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.core.sessions import Sessions
from kvist.cachesvc.events.journal import Facts, Journal
from kvist.cachesvc.events.tokens import TokenReader
from kvist.cachesvc.placing.placement import Placement
from kvist.proto.errors import KvistError
from kvist.proto.keys import NO_KEY, TRIAL_PREFIX
from kvist.proto.kv_events import CPU, STORAGE, space_name

_MEDIA = {"dram": CPU, "flash": STORAGE}


class TierEvents:
    """Writes down what the blocks of a store do. Its thread.

    Args:
        placement: the blocks, none yet.
        sessions: say which namespaces belong to nobody in particular.
        journal: where to.
    """

    def __init__(self, placement: Placement, sessions: Sessions, journal: Journal) -> None:
        self._placement = placement
        self._sessions = sessions
        self._journal = journal
        self._common: set[bytes] = set()
        flash = placement.flash
        self._reader = None if flash is None else TokenReader(flash, journal)
        placement.blocks.on_copy = self._changed

    def _changed(self, row: int, tier: str, is_there: bool) -> None:
        index = self._placement.index
        key = index.key(row)
        if key.startswith(TRIAL_PREFIX):
            return
        if not is_there:
            again = index.find(key) if index.hidden.of[row] else None
            if again is None or getattr(again, tier) is None:  # not stored anew since its Clear
                self._journal.removed(key, _MEDIA[tier])
            return
        facts, slot = self._facts(row), index.flash(row)
        self._journal.stored(key, _MEDIA[tier], facts)
        if not facts.tokens and slot is not None and self._reader is not None:
            self._reader.wish(key, slot, facts.space)

    def close(self) -> None:
        """Before flash is closed."""
        if self._reader is not None:
            self._reader.close()

    def _facts(self, row: int) -> Facts:
        blocks, index = self._placement.blocks, self._placement.index
        parent, namespace = blocks.parent[row], blocks.namespace(row)
        if namespace not in self._common:
            self._common.update(session.namespace for session in self._sessions.each())
        is_common = namespace in self._common or not self._common
        return Facts(
            parent=NO_KEY if parent == NO_ROW else index.key(parent),
            tokens=self._tokens(row),
            space="" if is_common else space_name(namespace),
        )

    def _tokens(self, row: int) -> bytes:
        slot = self._placement.index.dram(row)
        if slot is None:
            return b""
        try:
            header = self._placement.dram.header(slot)
        except KvistError:  # a worker wrote over it; the next reader will find out
            return b""
        return header.tokens if header.key == self._placement.index.key(row) else b""
