"""Sizes as people write them: 4GiB, 512MiB, 1.5GB."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_BYTES_MAX = 1 << 63
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Read a size; a bare number is bytes, K, M, G and T alone are powers of 1024.

    Raises:
        ValueError: not a size; the message shows the text and the accepted form.
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"{text} is not a size: it must not be negative")
        return text
    match = _PATTERN.fullmatch(text)
    if match is None or match.group(2).lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with a unit, like 4GiB")
    count = float(match.group(1)) * _UNITS[match.group(2).lower()]
    if count > _BYTES_MAX:
        raise ValueError(f"{text[:40]} is not a size: no memory or disk is that large")
    return int(count)


def format_bytes(count: int) -> str:
    """Write a size so that a person reads it and parse_bytes takes it: 4GiB, 1.4MiB, 512B."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _UNITS[unit.lower()]
        if count >= scale:
            return f"{count / scale:.1f}".removesuffix(".0") + unit
    return f"{count}B"
