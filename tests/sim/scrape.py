"""One value of what a scrape of an engine gets."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from kvist.engine.stats import EngineMetrics


def sample(metrics: EngineMetrics, name: str, labels: Mapping[str, str]) -> float | None:
    """The value of a sample; None when there is none of that name with exactly these labels."""
    for family in text_string_to_metric_families(metrics.text().decode()):
        for one in family.samples:
            if (one.name, one.labels) == (name, dict(labels)):
                return float(one.value)
    return None
