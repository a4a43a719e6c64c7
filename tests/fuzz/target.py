"""What a fuzz target is, how it is run, and what "bounded" means for it."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NoReturn

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy

# An input that asks for a second, or for a GiB, has got out of hand.
CPU_S_MAX = 10.0
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
        inputs_an_example: how many inputs its check makes of each that the strategy gives.
    """

    name: str
    inputs: SearchStrategy[object]
    opened: Callable[[], AbstractContextManager[Check]]
    inputs_an_example: int = 1


def fuzz(target: Target, inputs: int, seed: int | None = None) -> None:
    """Feed a target.

    Args:
        inputs: how many.
        seed: of the choice of inputs; None is the same choice each time.

    Raises: whatever the check raises, after hypothesis has made the input small.
    """
    before = peak_bytes()
    with target.opened() as check, _no_hang():

        def one(data: object) -> None:
            signal.setitimer(signal.ITIMER_PROF, CPU_S_MAX)
            check(data)

        run = given(target.inputs)(one)
        if seed is not None:
            run = seeded(seed)(run)
        settings(
            max_examples=-(-inputs // target.inputs_an_example),
            derandomize=seed is None,
            database=None,
            deadline=None,  # the machine may be stopped for minutes; a hang is what burns CPU
            suppress_health_check=list(HealthCheck),
        )(run)()
    grown = peak_bytes() - before
    assert grown < MEMORY_BYTES_MAX, f"{target.name}: {grown} bytes more at the peak"


def peak_bytes() -> int:
    """Most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _no_hang() -> Iterator[None]:
    """Let an input that runs for too long fail where it is."""

    def hang(*_: object) -> NoReturn:
        raise AssertionError(f"an input took {CPU_S_MAX} s of CPU")

    before = signal.signal(signal.SIGPROF, hang)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
