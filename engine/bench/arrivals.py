"""When requests are due: a gamma process of a given rate, with or without a ramp."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvist.proto.errors import ConfigInvalid

RAMPS = ("linear", "exponential")


@dataclass(frozen=True, slots=True)
class Ramp:
    """A rate that changes from the first request to the last.

    Attributes:
        strategy: one of RAMPS: the rate grows by equal steps, or by equal factors.
        start_rps: requests per second at the first request, > 0.
        end_rps: at the last.
    """

    strategy: str
    start_rps: float
    end_rps: float

    def rate(self, number: int, count: int) -> float:
        """Requests per second when request number (from 0) of count is due."""
        progress = number / max(1, count - 1)
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return float(self.start_rps * (self.end_rps / self.start_rps) ** progress)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How requests arrive.

    Attributes:
        rate: requests per second; infinite sends everything at once.
        burstiness: shape of the gamma distribution of the gaps: 1 is a Poisson process, less is
            burstier, more is more even, infinite is a clock.
        ramp: takes the place of rate, if given.

    Raises:
        ConfigInvalid: a value is out of range; the message names the flag.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    ramp: Ramp | None = None

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigInvalid(f"--request-rate: {self.rate} is not over 0; give inf for no limit")
        if not self.burstiness > 0:
            raise ConfigInvalid(f"--burstiness: {self.burstiness} is not over 0; 1 is Poisson")
        if self.ramp is not None and not 0 < min(self.ramp.start_rps, self.ramp.end_rps) < math.inf:
            raise ConfigInvalid("--ramp-up-start-rps and --ramp-up-end-rps must be over 0")

    @property
    def scheduled(self) -> bool:
        """Requests have a time at which they are due; without one they go as soon as they may."""
        return self.ramp is not None or math.isfinite(self.rate)

    def due_s(self, count: int, seed: int) -> list[float]:
        """Seconds from the start at which each of count requests is due, never falling.

        At a fixed rate the gaps are stretched so that the last request is due at count / rate,
        as vLLM's benchmark does: the sum of random gaps is off by one or two percent, and so
        would be the throughput.
        """
        if not self.scheduled:
            return [0.0] * count
        rates = np.array([self._rate(number, count) for number in range(count)])
        if math.isinf(self.burstiness):
            gaps = 1 / rates
        else:
            draw = np.random.default_rng(seed)
            gaps = draw.gamma(self.burstiness, 1 / (rates * self.burstiness))
        due = np.cumsum(gaps)
        if self.ramp is None and count and due[-1] > 0:
            due *= count / self.rate / due[-1]
        times: list[float] = due.tolist()
        return times

    def _rate(self, number: int, count: int) -> float:
        return self.rate if self.ramp is None else self.ramp.rate(number, count)
