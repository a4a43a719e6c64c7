"""What the log says of calls, where KVIST_DEBUG asks for it; see cachesvc/log.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvist.cachesvc.core.intake import Loss
from kvist.cachesvc.core.store import Reserved, Store
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import REQUEST_CHARS_MAX
from kvist.proto import cache_pb2
from kvist.proto.keys import BlockKey


def tell_reserved(
    store: Store, request: cache_pb2.ReserveRequest, answers: Sequence[Reserved]
) -> None:
    """Of a Reserve: what was given, and why no more."""
    log = _log_of(store)
    if log is None:
        return
    fates = Counter(str(answer.reason or answer.outcome) for answer in answers)
    refused = len(answers) - fates["reserved"] - fates["present"]
    fields: dict[str, object] = {"session": request.session}
    if request.request:
        fields["request"] = request.request[:REQUEST_CHARS_MAX]
    keys = [block.key.hex() for block in request.blocks] if log.shows(3) else ()
    named = {"keys": ",".join(keys)} if keys else {}
    if refused:
        log.detail(1, "blocks refused", **fields, blocks=len(answers), **fates, **named)
    else:
        log.detail(2, "reserved", **fields, blocks=len(answers), **fates, **named)


def tell_committed(store: Store, request: cache_pb2.CommitRequest, losses: Sequence[Loss]) -> None:
    """Of a Commit: how many blocks are there now."""
    log = _log_of(store)
    if log is not None:
        lost = Counter[str](loss for loss in losses if loss)
        fields: dict[str, object] = {"session": request.session, "blocks": len(losses)}
        if lost:
            log.detail(1, "blocks not committed", **fields, lost=lost.total(), **lost)
        else:
            log.detail(2, "committed", **fields)


def tell_prefetched(store: Store, keys: Sequence[BlockKey], rising: int) -> None:
    """Of a Prefetch."""
    log = _log_of(store)
    if log is not None:
        last = keys[-1].hex() if keys else "none"
        log.detail(2, "prefetch", blocks=len(keys), rising=rising, last=last)


def _log_of(store: Store) -> Log | None:
    """The store's log, if it shows any detail."""
    parts = store.parts
    return parts.log if parts is not None and parts.log.shows(1) else None
