"""Numbers as a person reads them in a table; the width never grows."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from kvist.proto.errors import ConfigInvalid

_SPANS = ((86400.0, "d"), (3600.0, "h"), (60.0, "m"), (1.0, "s"))
_TIME = re.compile(r"(\d+)([smhd]?)")


def span(seconds: float) -> str:
    """A time that passed, in its largest unit: 12s, 3m, 5h, 2d."""
    for size, unit in _SPANS:
        if seconds >= size:
            return f"{int(seconds / size)}{unit}"
    return "0s"


def count(number: float) -> str:
    """A number in at most 5 characters: 999, 12.3k, 4.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 10 * size or (number >= size and unit != "k"):
            text = f"{number / size:.1f}" if number < 100 * size else f"{number / size:.0f}"
            return text + unit
    return f"{number:.0f}"


def counted(number: int, noun: str) -> str:
    """A number of things, whole: 1 block, 12345 blocks."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def percent(part: float, whole: float) -> str:
    """A share, "-" of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def parse_span(flag: str, text: str) -> int:
    """Seconds of a time like 90, 90s, 30m, 24h or 7d. Raises: ConfigInvalid."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigInvalid(f"{flag}: {text!r} is no time; write one like 90s, 30m, 24h or 7d")
    unit = match.group(2) or "s"
    return int(match.group(1)) * int(next(size for size, name in _SPANS if name == unit))


def day(seconds: float) -> str:
    """A time since 1970, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
