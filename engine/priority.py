"""Priority classes of requests: what clients may write, and what the engine makes of it.

    realtime       somebody waits for each token
    interactive    somebody waits for the answer; what is said when nothing is said
    batch          nobody waits; it takes what the others leave

vLLM's clients write an integer, and lower is sooner: below 0 is realtime, 0 interactive, above 0
batch. Within a class the order is that of arrival, so that no integer starves another one.
"""

from __future__ import annotations

REALTIME, INTERACTIVE, BATCH = range(3)
PRIORITIES = ("realtime", "interactive", "batch")
"""Names, at the place of their number; lower is sooner."""


def priority_of(value: int | str) -> int:
    """The class of what a client or an operator wrote.

    Raises:
        ValueError: a word that names no class; the message lists those there are.
    """
    if isinstance(value, str):
        if value not in PRIORITIES:
            raise ValueError(
                f"{value!r} is no class; give {', '.join(PRIORITIES)}, "
                "or a whole number, where lower is sooner and 0 is interactive"
            )
        return PRIORITIES.index(value)
    return INTERACTIVE + (value > 0) - (value < 0)
