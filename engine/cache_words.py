"""What the banner says of the cache: what was asked for, and what came of it."""

from __future__ import annotations

from kvist.cachesvc.client import CacheClient
from kvist.engine.cache_address import CACHE_EMBEDDED, CACHE_OFF
from kvist.engine.config import EngineConfig
from kvist.proto.sizes import format_bytes


def cache_words(config: EngineConfig, client: CacheClient | None) -> str:
    """The cache in words.

    Args:
        client: of the cache that was opened; None is none.
    """
    if not config.enable_prefix_caching:
        return "off, in every tier"
    if config.cache == CACHE_OFF or client is None:
        return "HBM only"
    if config.cache == CACHE_EMBEDDED:
        flash = "flash off"
        if client.without:
            flash = f"flash: {client.without}, off"
        elif config.cache_flash_bytes:
            flash = f"flash {format_bytes(config.cache_flash_bytes)} in {config.cache_flash_path}"
        return f"embedded: DRAM {format_bytes(config.cache_dram_bytes)}, {flash}"
    text = f"sidecar at {config.cache}"
    if client.state == "attached":
        return text
    reason = client.refusal or "not attached yet"
    return f"{text}: serving without it, trying again; {reason}"
