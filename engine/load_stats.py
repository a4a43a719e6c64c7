"""Prometheus metrics of how blocks come and go beside the steps; see request.LoadStats."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvist.engine.request import LoadStats
from kvist.proto.shm import NEVER


def load_metrics(loads: LoadStats) -> Iterator[Metric]:
    """Counters of decisions, waits and caps; gauges of the measured rates."""
    for name, text, value in (
        ("loads_undone", "Loads that failed beside the computation.", loads.undone),
        ("load_wait_seconds", "Time that steps waited for layers.", loads.gate_wait_s),
        ("load_waits", "Times that a step waited for a layer.", loads.gate_waits),
        ("load_busy_seconds", "Time that loads took.", loads.load_s),
        ("load_estimated_seconds", "Time that they were estimated.", loads.estimated_load_s),
        (
            "load_compute_estimated_seconds",
            "Estimated time to compute what was not loaded of the same prompts.",
            loads.estimated_compute_s,
        ),
        ("store_yields", "Store copies that let loads go first.", loads.store_yields),
    ):
        yield CounterMetricFamily(f"kvist_engine_{name}", text, value=value)
    for name, text, label, values in (
        ("load_decisions", "Found prefixes, by what was done.", "decision", loads.decisions),
        ("loads", "Loads, beside the computation or before it.", "way", loads.ways),
        ("throttled_seconds", "Time waited for a cap.", "direction", loads.throttled_s),
    ):
        split = CounterMetricFamily(f"kvist_engine_{name}", text, labels=(label,))
        for key, value in values.items():
            split.add_metric((key,), value)
        yield split
    yield from _rates(loads)


def _rates(loads: LoadStats) -> Iterator[Metric]:
    for kind, label, text in (
        ("load_bytes_per_s", "tier", "Measured rate of loads."),
        ("store_bytes_per_s", "tier", "Measured rate of stores."),
        ("prefill_tokens_per_s", "tokens", "Measured rate of a prompt of so many tokens."),
        (
            "break_even_tokens",
            "tier",
            "Tokens from which loading beats computing; +Inf when never.",
        ),
    ):
        family = GaugeMetricFamily(f"kvist_engine_{kind}", text, labels=(label,))
        for name, value in loads.rates.items():
            measured, _, which = name.partition(".")
            if measured == kind:
                family.add_metric((which,), float("inf") if value == NEVER else float(value))
        yield family
