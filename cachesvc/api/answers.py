"""Control calls as messages: check a request, make one call of the store, write the reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from kvist.cachesvc.api.call_lines import tell_committed, tell_prefetched, tell_reserved
from kvist.cachesvc.core.sessions import First
from kvist.cachesvc.core.store import Store
from kvist.cachesvc.placing.pins import STRENGTH_DEFAULT, STRENGTH_MAX, TTL_DEFAULT_S, TTL_MAX_S
from kvist.cachesvc.worker.control import KEYS_MAX, PROTOCOL_VERSION, SLOTS_MAX
from kvist.proto import cache_pb2
from kvist.proto.errors import FormatRefused, KvistError
from kvist.proto.hints import Hint
from kvist.proto.keys import DIGEST_BYTES, KEY_BYTES, ORIGIN_BYTES, BlockKey
from kvist.proto.record import RecordShape

NAME_BYTES_MAX = 256
NAMESPACE_TEXT_BYTES_MAX = 4096
PAYLOAD_BYTES_MAX = 1 << 30
BLOCK_TOKENS_MAX = 65536
SESSION_BYTES_MAX = 64
TENANT_BYTES_MAX = 128

_OUTCOMES = {
    "reserved": cache_pb2.Reservation.RESERVED,
    "present": cache_pb2.Reservation.PRESENT,
    "refused": cache_pb2.Reservation.REFUSED,
}


class RequestInvalid(KvistError):
    """A request breaks a limit of the protocol; the message names the field and the limit."""


class Answers:
    """Every control call but the streams. Used on the store's thread.

    All methods raise RequestInvalid for a field out of its limits, and what the store raises.

    Args:
        store: open.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def attach(self, request: cache_pb2.AttachRequest) -> cache_pb2.AttachReply:
        """Open a session. Raises: FormatRefused for a client of another protocol version."""
        if request.protocol_version != PROTOCOL_VERSION:
            raise FormatRefused(
                f"protocol_version: the client speaks {request.protocol_version}, this sidecar "
                f"{PROTOCOL_VERSION}; run the same version of Kvist on both sides"
            )
        _check_length("client", request.client.encode(), 1, NAME_BYTES_MAX)
        _check_digest("namespace", request.namespace)
        _check_length(
            "namespace_text", request.namespace_text.encode(), 0, NAMESPACE_TEXT_BYTES_MAX
        )
        _check_length("model", request.model.encode(), 0, NAME_BYTES_MAX)
        _check_range("pid", request.pid, 1, 1 << 31)
        _check_range("payload_bytes", request.payload_bytes, 1, PAYLOAD_BYTES_MAX)
        _check_range("block_tokens", request.block_tokens, 1, BLOCK_TOKENS_MAX)
        info = self._store.attach(
            request.client,
            request.pid,
            request.namespace,
            request.namespace_text,
            RecordShape(request.payload_bytes, request.block_tokens),
            request.model,
        )
        return cache_pb2.AttachReply(
            session=info.session,
            boot_epoch=info.boot_epoch,
            index_path=str(info.index_path),
            arena_path=str(info.arena_path),
            ring_path=str(info.ring_path),
            bell_path=str(info.bell_path),
            slot_bytes=info.slot_bytes,
            dram_slots=info.dram_slots,
            reservation_limit=info.reservation_limit,
            number=info.number,
            calls_path=str(info.calls_path),
        )

    def lookup(self, request: cache_pb2.LookupRequest) -> cache_pb2.LookupReply:
        """Longest cached prefix."""
        tiers, reason = self._store.lookup(checked_keys(request.keys))
        return cache_pb2.LookupReply(blocks=len(tiers), tiers=tiers, miss_reason=reason)

    def reserve(self, request: cache_pb2.ReserveRequest) -> cache_pb2.ReserveReply:
        """Slots to fill."""
        _check_length("session", request.session.encode(), 1, SESSION_BYTES_MAX)
        _check_count("blocks", len(request.blocks), SLOTS_MAX)
        names = []
        firsts = {}
        for block in request.blocks:
            _check_length("blocks.key", block.key, KEY_BYTES, KEY_BYTES)
            _check_length("blocks.parent", block.parent, KEY_BYTES, KEY_BYTES)
            names.append((BlockKey(block.key), BlockKey(block.parent)))
            if block.HasField("first"):
                firsts[BlockKey(block.key)] = _checked_first(block.first)
        reply = cache_pb2.ReserveReply()
        answers = self._store.reserve(request.session, names, firsts)
        tell_reserved(self._store, request, answers)
        for answer in answers:
            reply.reservations.add(
                outcome=_OUTCOMES[answer.outcome], slot=answer.slot or 0, reason=answer.reason
            )
        return reply

    def commit(self, request: cache_pb2.CommitRequest) -> cache_pb2.CommitReply:
        """Make filled slots visible."""
        _check_length("session", request.session.encode(), 1, SESSION_BYTES_MAX)
        _check_count("slots", len(request.slots), SLOTS_MAX)
        losses = self._store.commit(request.session, list(request.slots))
        tell_committed(self._store, request, losses)
        return cache_pb2.CommitReply(committed=[not loss for loss in losses], reasons=losses)

    def abort(self, request: cache_pb2.AbortRequest) -> cache_pb2.AbortReply:
        """Take slots back unfilled."""
        _check_length("session", request.session.encode(), 1, SESSION_BYTES_MAX)
        _check_count("slots", len(request.slots), SLOTS_MAX)
        self._store.abort(request.session, list(request.slots))
        return cache_pb2.AbortReply()

    def prefetch(self, request: cache_pb2.PrefetchRequest) -> cache_pb2.PrefetchReply:
        """Have blocks rise from flash."""
        keys = checked_keys(request.keys)
        rising = self._store.prefetch(keys, checked_hint(request.hint))
        tell_prefetched(self._store, keys, rising)
        return cache_pb2.PrefetchReply(rising=rising)

    def clear(self, request: cache_pb2.ClearRequest) -> cache_pb2.ClearReply:
        """Drop the blocks of one namespace, or all."""
        if request.namespace:
            _check_digest("namespace", request.namespace)
        dropped = self._store.clear(request.namespace or None)
        return cache_pb2.ClearReply(dropped_blocks=dropped)

    def pin(self, request: cache_pb2.PinRequest) -> cache_pb2.PinReply:
        """Pin the cached blocks of a prompt."""
        _check_range("ttl_s", request.ttl_s, 0, TTL_MAX_S)
        _check_range("strength", request.strength, 0, STRENGTH_MAX)
        ttl_s, strength = request.ttl_s or TTL_DEFAULT_S, request.strength or STRENGTH_DEFAULT
        pinned = self._store.pin(checked_keys(request.keys), ttl_s, strength)
        return cache_pb2.PinReply(pinned=pinned)

    def unpin(self, request: cache_pb2.UnpinRequest) -> cache_pb2.UnpinReply:
        """End the pins of a prompt."""
        return cache_pb2.UnpinReply(unpinned=self._store.unpin(checked_keys(request.keys)))

    def stats(self, _: cache_pb2.StatsRequest) -> cache_pb2.StatsReply:
        """What the service holds and has done."""
        stats = self._store.stats()
        reply = cache_pb2.StatsReply(
            boot_epoch=stats.boot_epoch,
            uptime_s=stats.uptime_s,
            sessions=stats.sessions,
            reserved_slots=stats.reserved_slots,
            requested_tokens=stats.requested_tokens,
            hit_tokens=stats.hit_tokens,
            miss_tokens=stats.miss_tokens,
            blocks=stats.blocks,
            eviction=[cache_pb2.EvictionStats(**asdict(use)) for use in stats.eviction],
        )
        for worker in stats.workers:
            reply.workers.add(client=worker.client, rates=worker.rates)
        for name, estimates in stats.what_if.items():
            for estimate in estimates:
                reply.what_if.add(tier=name, **asdict(estimate))
        for tier in stats.tiers:
            reply.tiers.add(
                tier=tier.tier,
                state=tier.state,
                slots=tier.slots,
                used_slots=tier.used_slots,
                slot_bytes=tier.slot_bytes,
                evicted_blocks=tier.evicted_blocks,
                written_blocks=tier.written_blocks,
                read_blocks=tier.read_blocks,
            )
        return reply


def checked_keys(keys: Sequence[bytes]) -> list[BlockKey]:
    """The keys of a request.

    Raises: RequestInvalid: too many, or one of another length.
    """
    _check_count("keys", len(keys), KEYS_MAX)
    for key in keys:
        _check_length("keys", key, KEY_BYTES, KEY_BYTES)
    return [BlockKey(key) for key in keys]


def checked_hint(told: cache_pb2.Hint) -> Hint:
    """The hint of a request; one left out is NO_HINT.

    Raises: RequestInvalid: it cannot be.
    """
    hint = Hint(told.session_end, told.tool_pause_s, told.priority)
    if hint.problem():
        raise RequestInvalid(f"hint.{hint.problem()}")
    return hint


def _checked_first(first: cache_pb2.FirstBlock) -> First:
    if first.origin:
        _check_length("blocks.first.origin", first.origin, ORIGIN_BYTES, ORIGIN_BYTES)
    _check_digest("blocks.first.namespace", first.namespace)
    _check_length("blocks.first.tenant", first.tenant.encode(), 0, TENANT_BYTES_MAX)
    return First(first.origin, first.namespace, first.tenant)


def _check_digest(field: str, value: bytes) -> None:
    _check_length(field, value, DIGEST_BYTES, DIGEST_BYTES)


def _check_length(field: str, value: bytes, low: int, high: int) -> None:
    if not low <= len(value) <= high:
        wanted = str(low) if low == high else f"{low} to {high}"
        raise RequestInvalid(f"{field}: {len(value)} bytes, the limit is {wanted}")


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RequestInvalid(f"{field}: {value}, the limit is {low} to {high}")


def _check_count(field: str, count: int, high: int) -> None:
    if count > high:
        raise RequestInvalid(f"{field}: {count} of them, the limit is {high} in one call")
