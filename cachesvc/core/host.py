"""What a store stands on and does not decide: threads and the disk.

Like the clock, they are parameters, so that a simulation can hand in its own (tests/sim).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from kvist.tiers.segment import DiskIo


class Thread(Protocol):
    """A thread that was started."""

    def join(self) -> None:
        """Wait until it has ended."""
        ...


class Threads:
    """Starts the threads that move bytes, and makes what they wait on."""

    def start(self, work: Callable[[], None], name: str) -> Thread:
        """Run work on a thread of its own that does not keep the process alive."""
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread

    def condition(self) -> threading.Condition:
        """A lock to hold while looking, and to wait on."""
        return threading.Condition()


@dataclass(frozen=True, slots=True)
class Host:
    """The real ones.

    Attributes:
        threads: of flash I/O and scans.
        disk: what the flash tier asks of the system.
    """

    threads: Threads = field(default_factory=Threads)
    disk: DiskIo = field(default_factory=DiskIo)
