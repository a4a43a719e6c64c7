"""History: what the figures were, each second for ten minutes and coarser for a day.

    each second     for 10 minutes
    each 10 s       for 2 hours
    each minute     for 24 hours

Kept are running totals, not rates: whatever span is asked for, its differences are exact, and hits
and misses add up to what was requested over it. A sample is a row of 8-byte numbers, so the memory
is fixed: MEMORY_BYTES, about 2 MB. It is lost with the process, as the totals are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.core.report import StoreStats
from kvist.cachesvc.placing.counts import Counts
from kvist.proto.errors import KvistError
from kvist.proto.histograms import WORKER_HISTOGRAMS, words_of
from kvist.proto.shm import COUNTERS, MISS_REASONS, MOVED_TIERS, TIERS

STEPS_S: Final = {1: 601, 10: 721, 60: 1441}
"""Seconds between two samples -> how many of them are kept."""

TTFT = ("none", *TIERS)
_WORDS = frozenset(word for name in WORKER_HISTOGRAMS for word in words_of(name))
FIELDS: Final = (
    *(f"hit_tokens.{tier}" for tier in TIERS),
    *(f"miss_tokens.{reason}" for reason in MISS_REASONS),
    "lookups",
    *(name for name in COUNTERS if name not in _WORDS),
    *(f"{what}_bytes.{t}" for what in ("used", "written", "read", "evicted") for t in MOVED_TIERS),
    *(f"{what}_s.{tier}" for what in ("saved", "load", "store") for tier in TIERS),
    *(f"ttft_{what}.{tier}" for what in ("requests", "s") for tier in TTFT),
    *asdict(Counts()),
    "wear_bytes",
    "blocks",
    "sessions",
)
"""What is kept; totals of this life but for used_bytes, blocks and sessions, which are levels."""

MEMORY_BYTES: Final = 8 * (1 + len(FIELDS)) * sum(STEPS_S.values())

LATE_S = 3.0

Rows = NDArray[np.float64]


def sample(stats: StoreStats) -> dict[str, float]:
    """One row of the history, by name of FIELDS; what is not there is 0."""
    row: dict[str, float] = {f"hit_tokens.{tier}": n for tier, n in stats.hit_tokens.items()}
    row |= {f"miss_tokens.{reason}": n for reason, n in stats.miss_tokens.items()}
    row |= stats.counters
    row |= stats.events
    for use in stats.tiers:
        for what, slots in (
            ("used", use.used_slots),
            ("written", use.written_blocks),
            ("read", use.read_blocks),
            ("evicted", use.evicted_blocks),
        ):
            row[f"{what}_bytes.{use.tier}"] = slots * use.slot_bytes
    for worth in stats.worth:
        row[f"saved_s.{worth.tier}"] = worth.saved_s
        row[f"load_s.{worth.tier}"] = worth.load_s
        row[f"store_s.{worth.tier}"] = worth.store_s
    for shown in stats.histograms:
        if shown.name == "ttft_seconds":
            row[f"ttft_requests.{shown.labels['tier']}"] = sum(shown.counts)
            row[f"ttft_s.{shown.labels['tier']}"] = shown.sum
    row["wear_bytes"] = stats.wear.written_bytes if stats.wear else 0
    row["blocks"], row["sessions"] = stats.blocks, stats.sessions
    return {name: row.get(name, 0) for name in FIELDS}


@dataclass(frozen=True, slots=True)
class Span:
    """What happened between two samples.

    Attributes:
        seconds: between them.
        change: by name of FIELDS, how much each grew.
    """

    seconds: float
    change: Mapping[str, float]

    def sum(self, prefix: str) -> float:
        """Of all fields whose name begins so."""
        return sum(value for name, value in self.change.items() if name.startswith(prefix))

    @property
    def requested(self) -> float:
        """Tokens asked for: hits of any tier and misses for any reason."""
        return self.sum("hit_tokens.") + self.sum("miss_tokens.")


class History:
    """The samples of one life of the sidecar. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rings = {step: _Ring(length) for step, length in STEPS_S.items()}

    def add(self, at_s: float, values: Mapping[str, float]) -> None:
        """Take a sample.

        Args:
            at_s: when; not before the last one.
            values: by name of FIELDS, all of them.
        """
        row = np.array([at_s, *(values[name] for name in FIELDS)])
        with self._lock:
            for step, ring in self._rings.items():
                if ring.taken == 0 or at_s // step > ring.last_s // step:
                    ring.add(row)

    def since(self, step_s: int, since_s: float) -> dict[str, Any]:
        """Samples after a time, for JSON, by columns.

        Args:
            step_s: one of STEPS_S.

        Returns: step, at: times of the samples, and columns: name of FIELDS -> a number for each
            time, or one number where it was the same at all. is_early: the last one is of now, and
            not one of those that are kept at this step.
        """
        with self._lock:
            rows = self._rings[step_s].rows_after(since_s)
            is_early = self._rings[1].last_s > self._rings[step_s].last_s
            if is_early:
                rows = np.concatenate([rows, self._rings[1].newest[None]])
        columns = {name: _column(rows[:, at + 1]) for at, name in enumerate(FIELDS)}
        at = np.round(rows[:, 0], 3).tolist()
        return {"step": step_s, "at": at, "is_early": is_early, "columns": columns}

    def span(self, seconds: float) -> Span:
        """The last so many seconds, or less where the history is shorter."""
        with self._lock:
            finest = self._rings[1]
            if not finest.taken:
                return Span(0.0, dict.fromkeys(FIELDS, 0.0))
            newest, start_s = finest.newest, finest.last_s - seconds
            oldest = newest
            for step, ring in self._rings.items():
                after = ring.rows_after(start_s - step / 2)
                oldest = after[0] if len(after) and after[0][0] < oldest[0] else oldest
                if STEPS_S[step] * step >= seconds:
                    break
            change = (newest - oldest).tolist()
        return Span(change[0], dict(zip(FIELDS, change[1:], strict=True)))


class _Ring:
    """Rows of a time and FIELDS, the oldest overwritten first."""

    def __init__(self, length: int) -> None:
        self._rows: Rows = np.zeros((length, 1 + len(FIELDS)))
        self.taken = 0
        self.last_s = 0.0

    def add(self, row: Rows) -> None:
        self._rows[self.taken % len(self._rows)] = row
        self.taken += 1
        self.last_s = float(row[0])

    @property
    def newest(self) -> Rows:
        row: Rows = self._rows[(self.taken - 1) % len(self._rows)].copy()
        return row

    def rows_after(self, at_s: float) -> Rows:
        """Copies, oldest first."""
        length = len(self._rows)
        if self.taken <= length:
            rows = self._rows[: self.taken]
        else:
            rows = np.roll(self._rows, -(self.taken % length), axis=0)
        after: Rows = rows[int(np.searchsorted(rows[:, 0], at_s, side="right")) :].copy()
        return after


def _column(values: Rows) -> list[float] | float:
    whole = values.astype(np.int64)
    numbers: list[float] = (whole if (whole == values).all() else values).tolist()
    return numbers[0] if numbers and (values == values[0]).all() else numbers


class Recorder:
    """Takes a sample each second, on a thread of its own.

    Args:
        read: the store's figures; may raise KvistError, then there is no sample.
        history: where they go.

    Attributes:
        latest: the last figures read, and when; None before the first.
    """

    def __init__(
        self,
        read: Callable[[], StoreStats],
        history: History,
        wall: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.latest: tuple[float, StoreStats] | None = None
        self._read = read
        self._history = history
        # A wall clock may jump; the history's times must not.
        self._now, self._start_s = now, wall() - now()
        self._taking = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvist-history", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Take no more; waits for a reading that is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_late(self) -> bool:
        """Whether the last sample is older than a page should show."""
        at_s = self.latest[0] if self.latest else 0.0
        return self._start_s + self._now() - at_s > LATE_S

    def take(self) -> None:
        """Take one sample now. Raises: KvistError when the store does not answer."""
        self.keep(self._read())

    def keep(self, stats: StoreStats) -> None:
        """Take figures that were read just now for a sample."""
        with self._taking:  # a sample of another thread may be the later one
            at_s = self._start_s + self._now()
            self._history.add(at_s, sample(stats))
            self.latest = (at_s, stats)

    def _run(self) -> None:
        due_s = self._now()
        while not self._stop.wait(max(0.0, due_s - self._now())):
            due_s = max(due_s + 1.0, self._now())
            try:
                self.take()
            except KvistError:
                continue
