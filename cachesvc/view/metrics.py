"""Prometheus metrics of the sidecar: the store's figures, read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from kvist.cachesvc.core.store import StoreStats
from kvist.cachesvc.view.definitions import DEFINITIONS
from kvist.proto.exposition import exposition


class Metrics:
    """Everything that /metrics shows, as view/definitions says. Nothing is counted here, so nothing
    can be counted twice.

    Args:
        read: the store's figures; called at each scrape, from the scraper's thread.
        calls: calls so far by method, of each way: "grpc" and "packet" (cachesvc/api/calls.py).
        version: of the program.
    """

    def __init__(
        self,
        read: Callable[[], StoreStats],
        calls: Mapping[str, Mapping[str, int]],
        version: str,
    ) -> None:
        self._read = read
        self._calls = calls
        self._version = version

    def text(self) -> bytes:
        """What a scrape gets, from one reading. Raises: KvistError, as read does."""
        calls = {f"{way}_calls": dict(self._calls.get(way, {})) for way in ("grpc", "packet")}
        figures = figures_of(self._read()) | calls | {"version": self._version}
        return exposition(DEFINITIONS, figures).encode()


def figures_of(stats: StoreStats) -> dict[str, Any]:
    """The fields of StoreStats by name, where definitions look for their figures."""
    return {one.name: getattr(stats, one.name) for one in fields(stats)}
