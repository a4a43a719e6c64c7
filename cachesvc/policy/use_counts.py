"""How often each stored block was used in this life: for people, no policy asks."""

from __future__ import annotations

import numpy as np

from kvist.cachesvc.policy.eviction import Rows
from kvist.proto.hints import Hint

USES_MAX = np.iinfo(np.uint16).max


class UseCounts:
    """Requests that found or stored a block, 2 bytes a row; see eviction.Learner.

    Attributes:
        uses: (rows,), uint16; USES_MAX stands for that many or more.
    """

    def __init__(self, rows: int) -> None:
        self.uses = np.zeros(rows, np.uint16)

    def found(self, rows: Rows, request: int, at: int) -> None:  # noqa: ARG002 - see Learner
        """See Learner."""
        uses = self.uses[rows]
        self.uses[rows] = uses + (uses < USES_MAX)

    def stored(self, rows: Rows, request: int, at: int) -> None:  # noqa: ARG002 - see Learner
        """See Learner."""
        self.uses[rows] = 1

    def hinted(self, rows: Rows, request: int, hint: Hint) -> None:
        """See Learner."""

    def restored(self, rows: Rows, at: int) -> None:  # noqa: ARG002 - see Learner
        """See Learner."""
        self.uses[rows] = 0

    def removed(self, row: int) -> None:
        """See Learner."""
