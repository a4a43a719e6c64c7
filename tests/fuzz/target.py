"""What a fuzz target is, how it is run, and what "bounded" means for it."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy

# A worker of the tests has 23 GiB; an input that asks for one of them has got out of hand.
MEMORY_BYTES_MAX = 1 << 30

Check = Callable[[object], None]


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads bytes of others.

    Attributes:
        name: for people.
        inputs: strategy of the inputs.
        opened: gives the check of one input, which raises when the target does what it must
            not; set up once for all inputs.
    """

    name: str
    inputs: SearchStrategy[object]
    opened: Callable[[], AbstractContextManager[Check]]


def fuzz(target: Target, inputs: int, seed: int | None = None) -> None:
    """Feed a target.

    Args:
        inputs: how many.
        seed: of the choice of inputs; None is the same choice each time.

    Raises: whatever the check raises, after hypothesis has made the input small.
    """
    before = peak_bytes()
    with target.opened() as check:

        def one(data: object) -> None:
            check(data)

        run = given(target.inputs)(one)
        if seed is not None:
            run = seeded(seed)(run)
        settings(
            max_examples=inputs,
            derandomize=seed is None,
            database=None,
            deadline=5000,  # ms an input: more is a hang
            suppress_health_check=list(HealthCheck),
        )(run)()
    grown = peak_bytes() - before
    assert grown < MEMORY_BYTES_MAX, f"{target.name}: {grown} bytes more at the peak"


def peak_bytes() -> int:
    """Most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
