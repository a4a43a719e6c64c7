"""How blocks come and go beside the steps, as Prometheus and an API's user see it."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry
from sim.scrape import sample

from kvist.engine.replies import usage
from kvist.engine.request import CachedTokens, CoreStats, LoadCost, LoadStats, Outputs
from kvist.engine.stats import EngineMetrics
from kvist.proto.shm import NEVER


def test_decisions_waits_caps_and_rates_are_shown() -> None:
    metrics = EngineMetrics(CollectorRegistry(), "m", lambda: 0.0)
    loads = LoadStats(
        decisions={"load": 3, "part": 1, "compute": 2},
        ways={"layers": 3, "blocks": 1},
        undone=1,
        load_s=0.5,
        gate_wait_s=0.25,
        throttled_s={"load": 1.5, "store": 0.0},
        rates={"load_bytes_per_s.dram": 5, "break_even_tokens.flash": NEVER},
    )
    metrics.observe_outputs(Outputs([], CoreStats(loads=loads)))

    def shown(name: str, **labels: str) -> float | None:
        return sample(metrics, f"kvist_engine_{name}", labels)

    assert shown("load_decisions_total", decision="part") == 1
    assert shown("loads_total", way="layers") == 3
    assert shown("loads_undone_total") == 1
    assert shown("load_wait_seconds_total") == 0.25
    assert shown("throttled_seconds_total", direction="load") == 1.5
    assert shown("load_bytes_per_second", tier="dram") == 5
    assert shown("break_even_tokens", tier="flash") == float("inf")
    assert shown("break_even_tokens", tier="dram") is None


def test_usage_tells_the_cost_of_a_load_and_nothing_where_there_was_none() -> None:
    cost = LoadCost(0.01, 0.2, 0.012, 3)
    loaded = msgspec.to_builtins(usage(100, 5, [CachedTokens(dram=64)] * 2, [cost, None]))
    (told,) = loaded["prompt_tokens_details"]["cache_loads"]
    assert told == {
        "estimated_load_s": 0.01, "estimated_compute_s": 0.2, "load_s": 0.012, "skipped_blocks": 3,
    }  # fmt: skip
    none = msgspec.to_builtins(usage(100, 5, [CachedTokens()], [None]))
    assert "cache_loads" not in none["prompt_tokens_details"]
