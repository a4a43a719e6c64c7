"""The parameter cache_hints of a request: what its sender knows of what comes after it."""

from __future__ import annotations

import msgspec

from kvist.proto.hints import Hint


class CacheHints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As in kvist.proto.hints.Hint, which says what the fields mean and checks them."""

    session_end: bool = False
    tool_pause_s: float = 0.0
    priority: int = 0

    @property
    def hint(self) -> Hint:
        """As the cache takes it."""
        return Hint(self.session_end, self.tool_pause_s, self.priority)
