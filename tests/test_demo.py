"""What the demo says at its end."""

from __future__ import annotations

from kvist.engine.demo import Turn, savings
from kvist.engine.local import Answer


def turn(ttft_s: float, uncached_s: float, **cached: int) -> Turn:
    def answer(seconds: float, tiers: dict[str, int]) -> Answer:
        return Answer("text", seconds, seconds, 1000, 32, {"hbm": 0, "dram": 0, "flash": 0} | tiers)

    return Turn(1, 1, 0, [], "a:b", answer(ttft_s, cached), answer(uncached_s, {}))


def test_a_tiers_ratio_is_the_median_of_each_request_against_itself() -> None:
    turns = [
        turn(0.1, 1.0, hbm=960),
        turn(0.1, 2.0, hbm=960),
        turn(0.5, 10.0, hbm=960),
        turn(0.2, 8.0, flash=960),
        turn(3.0, 3.0),
    ]
    told = savings(turns)
    assert told[0] == "Prefill not computed: 3,840 of 5,000 prompt tokens (77%)."
    assert told[1] == "TTFT without a cache: 3,000 ms (median)."
    assert told[2] == "TTFT with the prefix in HBM: 100 ms, 20 times sooner (3 requests)."
    assert told[3] == "TTFT with the prefix in flash: 200 ms, 40 times sooner (1 request)."
    assert "against itself" in told[4]
