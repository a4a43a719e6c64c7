"""Families of prometheus_client, made from definitions (proto/metrics)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from kvist.proto.histograms import Shown
from kvist.proto.metrics import Definition, all_labels, samples


def families(
    definitions: Iterable[Definition],
    figures: Mapping[str, Any],
    constant: Mapping[str, str] | None = None,
) -> Iterator[Metric]:
    """All families of one reading.

    Args:
        figures: what the definitions' paths begin at.
        constant: labels that every sample gets, before its own.
    """
    names, values = tuple(constant or {}), tuple((constant or {}).values())
    for one in definitions:
        family = _family(one, (*names, *all_labels(one)))
        for sample in samples(one, figures):
            labels = (*values, *sample.labels)
            if isinstance(sample.value, Shown):
                _add_histogram(family, labels, sample.value)
            else:
                family.add_metric(labels, sample.value)
        yield family


def _family(one: Definition, labels: tuple[str, ...]) -> Any:
    if one.kind == "counter":
        return CounterMetricFamily(one.name.removesuffix("_total"), one.text, labels=labels)
    if one.kind == "histogram":
        return HistogramMetricFamily(one.name, one.text, labels=labels)
    return GaugeMetricFamily(one.name, one.text, labels=labels)


def _add_histogram(family: HistogramMetricFamily, labels: tuple[str, ...], shown: Shown) -> None:
    bounds = [*(str(bound) for bound in shown.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(shown.counts), strict=True))
    family.add_metric(labels, buckets, shown.sum)
