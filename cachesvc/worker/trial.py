"""The trial: before its first hit a worker stores a block and takes it back, through its own pages.

Worker and sidecar agree on a namespace by its digest alone. That the worker's pages really lie as
the namespace says, and that what goes through the sidecar's memory comes back, is shown once a
session with a pattern of which every element says where it belongs (proto.layout.pattern). The
block has a key and a namespace that no prompt has, does not sink to flash, and is dropped again.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np

from kvist.cachesvc.worker.control import Control
from kvist.cachesvc.worker.life import Life
from kvist.cachesvc.worker.storing import StoreItem, Storer
from kvist.proto import cache_pb2
from kvist.proto.errors import BlockCorrupt, Detached
from kvist.proto.keys import NO_KEY, Namespace, trial_key
from kvist.proto.layout import pattern
from kvist.proto.record import Bytes, Wanted
from kvist.transfer.device import Pinner

# After a trial that failed; something has to be changed by a person before another can pass.
RETRY_S = 30.0


class TrialPage(Protocol):
    """A page like those of the worker's pool, written and read the way its model does.

    Attributes:
        pinner: told of the arena's memory, when the pool is a device's.
    """

    pinner: Pinner | None

    def written(self) -> Bytes:
        """A page whose elements were set by their positions to the pattern, as a payload."""
        ...

    def reads(self, payload: Bytes) -> bool:
        """Whether a page that got this payload shows the pattern at every position."""
        ...


def run_trial(
    life: Life, control: Control, storer: Storer, namespace: Namespace, page: TrialPage
) -> str:
    """Store a block, read it back, compare, drop it.

    Args:
        life: a session, entered; nobody else stores yet.

    Returns:
        What is wrong, in words; "" when all came back as it was.

    Raises: Detached, SessionUnknown: it could not be tried.
    """
    payload = page.written()
    if not np.array_equal(payload, pattern(namespace.format)):
        return "the worker's pages do not lie as its namespace says"
    item = _item(life, namespace, payload)
    result = storer.store(life, [item])
    if result.stored != 1:
        raise Detached(f"no block could be stored for a trial: {dict(result.dropped)}")
    try:
        return _read_back(life, item, payload, page)
    finally:
        control.clear(cache_pb2.ClearRequest(namespace=item.namespace)).result()


def _item(life: Life, namespace: Namespace, payload: Bytes) -> StoreItem:
    # Of this session alone, so that workers that attach at once do not meet.
    name = hashlib.sha256(b"kvist trial" + life.session.encode() + namespace.digest()).digest()
    tokens = np.arange(namespace.format.block_tokens, dtype="<u4").tobytes()
    return StoreItem(trial_key(name), NO_KEY, name, 0, tokens, payload)


def _read_back(life: Life, item: StoreItem, payload: Bytes, page: TrialPage) -> str:
    slot = life.index.dram_slot(item.key)
    if slot is None:
        return "a block that was just stored is not to be found"
    out = np.zeros_like(payload)
    wanted = Wanted(item.key, item.namespace, item.tokens, payload.nbytes)
    try:
        life.arena.read(slot, wanted, out)
    except BlockCorrupt as error:
        return f"a block that was just stored is damaged: {error}"
    if not np.array_equal(out, payload) or not page.reads(out):
        return "a block came back with other bytes than it had"
    return ""
