"""Where the cache beyond the pool is: what --cache may say."""

from __future__ import annotations

import re

from kvist.proto.errors import ConfigInvalid

CACHE_EMBEDDED = "embedded"
CACHE_OFF = "off"
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


def normal_cache(text: str) -> str:
    """Bring a cache setting to "embedded", "off", "unix:/path" or "host:port".

    Raises:
        ConfigInvalid: none of these.
    """
    if text in (CACHE_EMBEDDED, CACHE_OFF):
        return text
    if text.startswith("/"):
        return f"unix:{text}"
    if text.startswith("unix:") and len(text) > len("unix:"):
        return text
    match = _HOST_PORT.fullmatch(text)
    if match and 0 < int(match.group(2)) <= 65535:
        return text
    raise ConfigInvalid(
        f"--cache: {text!r} is no cache; give embedded, off, an absolute path to a socket "
        "like /run/kvist/kvistd.sock, or host:port"
    )
