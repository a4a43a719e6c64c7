"""The document: all that a sidecar says of itself, in /stats.json and, if asked so, in Stats."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from kvist.cachesvc.core.store import StoreStats
from kvist.cachesvc.view.history import History, Recorder
from kvist.cachesvc.view.summary import summary


def stats_document(stats: StoreStats, version: str) -> dict[str, Any]:
    """The fields of StoreStats, bytes in hex, and the version."""
    document = dataclasses.asdict(stats)
    document["boot_epoch"] = stats.boot_epoch.hex()
    return {"version": version, **document}


class Document:
    """Makes it of the store's figures and of what they were. Any thread.

    Args:
        read: see below.
        version: of the program.
        settings: of the program that say where it is, as they are shown.

    Attributes:
        read: the store's figures; may raise KvistError.
        history: what the figures were. recorder: who keeps it up; where nobody starts it, only what
            was read here is kept, so that a minute is known to whoever looks on for a minute.
    """

    def __init__(
        self, read: Callable[[], StoreStats], version: str, settings: Mapping[str, str]
    ) -> None:
        self.history = History()
        self.recorder = Recorder(read, self.history)
        self.read = read
        self._version = version
        self._settings = dict(settings)

    def of(self, stats: StoreStats) -> dict[str, Any]:
        """Of figures that were read."""
        document = stats_document(stats, self._version)
        return document | {"settings": self._settings} | summary(stats, self.history)

    def now(self) -> dict[str, Any]:
        """Of this moment. Raises: KvistError, as read does."""
        stats = self.read()
        if self.recorder.is_late:
            self.recorder.keep(stats)
        return self.of(stats)

    def text(self) -> str:
        """The same as JSON. Raises: KvistError."""
        return json.dumps(self.now(), separators=(",", ":"))
