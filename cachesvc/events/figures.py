"""Prometheus metrics of KV events, read at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvist.cachesvc.events.publisher import Publisher


class EventFigures(Collector):
    """What a publisher has told.

    Args:
        registry: where to be found. publisher: that is read.
    """

    def __init__(self, registry: CollectorRegistry, publisher: Publisher) -> None:
        self._publisher = publisher
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """All families."""
        publisher = self._publisher
        told = CounterMetricFamily(
            "kvist_kv_event_blocks", "Blocks told to routers.", labels=["event", "medium"]
        )
        for (event, medium), count in sorted(publisher.events.copy().items()):
            told.add_metric([event, medium], count)
        yield told
        yield CounterMetricFamily(
            "kvist_kv_event_batches", "Messages to routers.", value=publisher.batches
        )
        answers = CounterMetricFamily(
            "kvist_kv_event_answers", "Requests of routers that were answered.", labels=["kind"]
        )
        for kind in ("replay", "snapshot"):
            answers.add_metric([kind], publisher.answers[kind])
        yield answers
        yield GaugeMetricFamily(
            "kvist_kv_event_pending", "Changes not told to routers yet.", value=publisher.pending
        )
