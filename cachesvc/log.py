"""Log lines: one event, one line, as text or JSON, with a level and a limit per event.

Engine and sidecar write the same lines. KVIST_DEBUG says how much detail comes on top of what
log_level lets through, for both ("2") or for each ("engine:3,cachesvc:1"):

    1    a line per request (engine), and per call that did not get all it asked for (sidecar)
    2    a line per load and store, and per call
    3    a line per step, and the keys of calls
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from threading import Lock
from typing import Literal, TextIO

from kvist.proto.errors import ConfigInvalid

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")
Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = ("text", "json")

DEBUG_VARIABLE = "KVIST_DEBUG"
Area = Literal["engine", "cachesvc"]
AREAS: tuple[Area, ...] = ("engine", "cachesvc")
DETAIL_MAX = 3

# One failing device or one client in a loop can raise the same event thousands of times a second.
BURST_LINES = 20
WINDOW_S = 10.0
# Who asks for detail wants it; a loop still cannot fill a disk.
DETAIL_BURST_LINES = 2000


def debug_detail(area: Area, environment: Mapping[str, str]) -> int:
    """What KVIST_DEBUG asks of an area, 0 to DETAIL_MAX.

    Raises: ConfigInvalid: it says something else.
    """
    text = environment.get(DEBUG_VARIABLE, "").strip()
    detail = 0
    for word in filter(None, (each.strip() for each in text.split(","))):
        name, colon, number = word.rpartition(":")
        if not number.isdecimal() or int(number) > DETAIL_MAX or (colon and name not in AREAS):
            raise ConfigInvalid(
                f"{DEBUG_VARIABLE}: {word!r} is no detail; give 0 to {DETAIL_MAX}, or one for each "
                f"of {', '.join(AREAS)}, like engine:2,cachesvc:1"
            )
        if not colon or name == area:
            detail = int(number)
    return detail


class Log:
    """Writes events; threads may share one.

    An event is a few fixed words, what varies goes into fields, so that lines can be counted.
    Beyond BURST_LINES lines of one event in WINDOW_S seconds (DETAIL_BURST_LINES of detail) the
    rest is dropped, and the next line of that event says how many were.

    Args:
        stream: where lines go; a stream that cannot be written is ignored, a log never fails.
        level: lines below it are not written.
        format: "text" (`time LEVEL event key=value`) or "json" (one object a line).
        detail: see the top of the file.
        wall: seconds since 1970, for the time on the line.
        now: seconds of a clock that never jumps, for the limit.
    """

    def __init__(
        self,
        stream: TextIO,
        level: Level = "info",
        format: Format = "text",
        *,
        detail: int = 0,
        wall: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._lowest = LEVELS.index(level)
        self._as_json = format == "json"
        self._detail = max(detail, int(level == "debug"))
        self._wall = wall
        self._now = now
        self._lock = Lock()
        self._windows: dict[str, tuple[float, int]] = {}

    def debug(self, event: str, **fields: object) -> None:
        """What only somebody who looks for a fault wants to see; detail 1."""
        self.detail(1, event, **fields)

    def shows(self, detail: int) -> bool:
        """Whether so much detail is wanted: asked before a line that costs something to make."""
        return detail <= self._detail

    def detail(self, detail: int, event: str, **fields: object) -> None:
        """The same of a detail, 1 to DETAIL_MAX."""
        if detail <= self._detail:
            self._write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """What happened as it should."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """What went wrong and was dealt with."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """What went wrong and wants a person."""
        self._write("error", event, fields)

    def _write(self, level: Level, event: str, fields: dict[str, object]) -> None:
        if level != "debug" and LEVELS.index(level) < self._lowest:
            return
        with self._lock:
            dropped = self._admit(event, DETAIL_BURST_LINES if level == "debug" else BURST_LINES)
            if dropped is None:
                return
            if dropped:
                fields = {**fields, "similar_dropped": dropped}
            line = self._as_line(level, event, fields)
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                pass

    def _admit(self, event: str, most: int) -> int | None:
        """None: over the limit. Otherwise how many lines of the event were dropped before."""
        start, lines = self._windows.get(event, (self._now(), 0))
        dropped = 0
        if self._now() - start >= WINDOW_S:
            dropped = max(0, lines - most)
            start, lines = self._now(), 0
        self._windows[event] = (start, lines + 1)
        return dropped if lines < most else None

    def _as_line(self, level: Level, event: str, fields: dict[str, object]) -> str:
        at = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="milliseconds")
        if self._as_json:
            return json.dumps({"time": at, "level": level, "event": event, **fields}, default=str)
        words = " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())
        return f"{at} {level.upper():7} {event} {words}".rstrip()


def _quoted(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    plain = text.isprintable() and not any(mark in text for mark in ' "=')
    return text if text and plain else json.dumps(text)
