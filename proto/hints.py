"""Hints: what the sender of a request says about what comes after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PAUSE_MAX_S = 86400
PRIORITY_MAX = 3


@dataclass(frozen=True, slots=True)
class Hint:
    """How the blocks of a request will be used. Nothing is promised by either side.

    Attributes:
        session_end: the conversation is over.
        tool_pause_s: seconds after which it will most likely go on, 0 to PAUSE_MAX_S; 0 is not
            told.
        priority: -PRIORITY_MAX to PRIORITY_MAX; each step makes the blocks worth twice as much.
    """

    session_end: bool = False
    tool_pause_s: float = 0.0
    priority: int = 0

    def problem(self) -> str:
        """What is wrong with it, as "field: words"; "" if nothing is."""
        if not 0 <= self.tool_pause_s <= PAUSE_MAX_S:
            return f"tool_pause_s: {self.tool_pause_s:g}, give 0 to {PAUSE_MAX_S} seconds"
        if not -PRIORITY_MAX <= self.priority <= PRIORITY_MAX:
            return f"priority: {self.priority}, give {-PRIORITY_MAX} to {PRIORITY_MAX}"
        if self.session_end and self.tool_pause_s:
            return "tool_pause_s: a session that has ended has no pause; drop one of the two"
        return ""


NO_HINT: Final = Hint()
