"""The calls of people's tools as messages: List, Show and Evict; see core/browse.py."""

from __future__ import annotations

import string

import numpy as np

from kvist.cachesvc.api.answers import RequestInvalid
from kvist.cachesvc.core.browse import RUNS_MAX, Asked, Browser, Run, Shown, Space
from kvist.cachesvc.core.parts import Parts
from kvist.cachesvc.core.store import Store
from kvist.proto import cache_pb2
from kvist.proto.errors import BlockMissing
from kvist.proto.keys import DIGEST_BYTES, KEY_BYTES, BlockKey

_HEX = frozenset(string.hexdigits.lower())
TENANT_BYTES_MAX = 128
PAGE_TOKEN_MAX = 1 << 48
USES_MAX = (1 << 31) - 1


class Browsing:
    """Used on the store's thread. All methods raise RequestInvalid for a field out of its limits.

    Args:
        store: open.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._made: tuple[Parts, Browser] | None = None

    def _browser(self) -> Browser | None:
        parts = self._store.parts
        if parts is None:
            return None
        if self._made is None or self._made[0] is not parts:
            self._made = parts, Browser(parts)
        return self._made[1]

    def page(self, request: cache_pb2.ListRequest) -> cache_pb2.ListReply:
        """A page of runs."""
        _check_digits("namespace", request.namespace, 2 * DIGEST_BYTES)
        _check_digits("key", request.key, 2 * KEY_BYTES)
        for field, value, high in (
            ("page_token", request.page_token, PAGE_TOKEN_MAX),
            ("limit", request.limit, RUNS_MAX),
            ("min_uses", request.min_uses, USES_MAX),
            ("tenant", len(request.tenant.encode()), TENANT_BYTES_MAX),
        ):
            if value > high:
                raise RequestInvalid(f"{field}: {value}, the limit is {high}")
        browser = self._browser()
        if browser is None:
            return cache_pb2.ListReply()
        page = browser.page(
            Asked(
                request.page_token, request.limit or RUNS_MAX, request.namespace, request.tenant,
                request.key, request.min_uses,
            )
        )  # fmt: skip
        return cache_pb2.ListReply(
            runs=map(_run, page.runs),
            next_page_token=page.next,
            rows=page.rows,
            namespaces=map(_space, page.spaces),
            slot_bytes=page.slot_bytes,
        )

    async def show(self, request: cache_pb2.ShowRequest) -> cache_pb2.ShowReply:
        """One block. Raises: BlockMissing."""
        browser = self._browser()
        key = _checked_key(request.key)
        if browser is None:
            raise BlockMissing("nothing is stored yet")
        return _shown(await browser.show(key, request.verify), request.tokens)

    def evict(self, request: cache_pb2.EvictRequest) -> cache_pb2.EvictReply:
        """Drop a block, or a part of what stands on it. Raises: BlockMissing, ConfigInvalid."""
        browser = self._browser()
        key = _checked_key(request.key)
        if browser is None:
            raise BlockMissing("nothing is stored yet")
        dropped, more = browser.evict(key, request.descendants)
        return cache_pb2.EvictReply(dropped_blocks=dropped, more=more)


def _run(run: Run) -> cache_pb2.Run:
    return cache_pb2.Run(
        key=run.key,
        namespace=run.namespace,
        depth=run.depth,
        blocks=run.blocks,
        dram_blocks=run.dram_blocks,
        flash_blocks=run.flash_blocks,
        pinned_blocks=run.pinned_blocks,
        uses=run.uses,
        idle_s=run.idle_s,
        branches=run.branches,
    )


def _space(space: Space) -> cache_pb2.NamespaceInfo:
    return cache_pb2.NamespaceInfo(
        namespace=space.namespace,
        tenant=space.tenant,
        block_tokens=space.block_tokens,
        blocks=space.blocks,
        dram_blocks=space.dram_blocks,
        flash_blocks=space.flash_blocks,
    )


def _shown(shown: Shown, with_tokens: bool) -> cache_pb2.ShowReply:
    reply = cache_pb2.ShowReply(
        name=cache_pb2.BlockName(key=shown.key, parent=shown.parent),
        namespace=_space(shown.space),
        depth=shown.depth,
        chain=shown.chain,
        uses=shown.uses,
        idle_s=shown.idle_s,
        children=shown.children,
        pinned_s=shown.pinned_s,
        pin_lives=shown.pin_lives,
        expires_s=shown.expires_s,
    )
    for copy in shown.copies:
        reply.copies.add(
            tier=copy.tier,
            slot=copy.slot,
            state=copy.state,
            generation=copy.generation,
            checksum=copy.checksum,
        )
    if shown.header is not None:
        reply.created_s = shown.header.created_s
        reply.payload_bytes = shown.header.payload_bytes
        if with_tokens:
            reply.tokens.extend(np.frombuffer(shown.header.tokens, "<u4").tolist())
    return reply


def _checked_key(key: bytes) -> BlockKey:
    if len(key) != KEY_BYTES:
        raise RequestInvalid(f"key: {len(key)} bytes, the limit is {KEY_BYTES}")
    return BlockKey(key)


def _check_digits(field: str, text: str, most: int) -> None:
    if len(text) > most or not _HEX.issuperset(text):
        raise RequestInvalid(
            f"{field}: {text[:40]!r} is not {most} or fewer hex digits, lower case"
        )
