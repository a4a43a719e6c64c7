"""Tracing between processes: the W3C's traceparent, and the notes of which spans are made.

    traceparent    00-<trace id, 32 hex>-<span id, 16 hex>-<flags, 2 hex>; flag 01 is "sampled"

A process that cannot or need not export spans writes notes with the stamps that it took anyway,
of CLOCK_MONOTONIC, which is one clock for all processes of a host.
"""

from __future__ import annotations

import re
import secrets

import msgspec

HEADER = "traceparent"
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1

Attribute = str | int | float | bool


class TraceContext(msgspec.Struct, frozen=True):
    """A span's place: hex ids of its trace and itself."""

    trace: str
    span: str
    sampled: bool = True

    def __str__(self) -> str:
        """As a header has it."""
        return f"00-{self.trace}-{self.span}-{_SAMPLED if self.sampled else 0:02x}"

    def child(self) -> TraceContext:
        """A new span's place in the same trace."""
        return TraceContext(self.trace, secrets.token_hex(8), self.sampled)


def parse_traceparent(text: str) -> TraceContext | None:
    """What a header says; None when it is none that can be used, which is no error."""
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not (int(trace, 16) and int(span, 16)):
        return None
    return TraceContext(trace, span, bool(int(flags, 16) & _SAMPLED))


class SpanNote(msgspec.Struct, frozen=True):
    """A span that has ended.

    Attributes:
        name: of what was done.
        at: its own place.
        parent: span id of what it is a part of; "" is nothing.
        start_s, end_s: of CLOCK_MONOTONIC.
        attributes: what is worth knowing.
        is_server: a request of another process was answered.
        error: what went wrong, in words; "" is nothing.
    """

    name: str
    at: TraceContext
    parent: str
    start_s: float
    end_s: float
    attributes: dict[str, Attribute] = {}
    is_server: bool = False
    error: str = ""
