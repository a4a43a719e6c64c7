"""Opening events: a journal for a store, and the publisher that tells what is in it."""

from __future__ import annotations

from dataclasses import replace

from kvist.cachesvc.core.parts import StoreConfig
from kvist.cachesvc.events.journal import Journal
from kvist.cachesvc.events.publisher import Publisher
from kvist.cachesvc.events.settings import KvEventsConfig
from kvist.cachesvc.log import Log


def open_events(
    store: StoreConfig, config: KvEventsConfig, log: Log
) -> tuple[StoreConfig, Publisher]:
    """A store's settings with a journal in them, and its publisher, to be closed after the store.

    Raises:
        ConfigInvalid: an address cannot be bound.
    """
    journal = Journal()
    publisher = Publisher(config, journal, log)
    log.info(
        "kv events on", endpoint=config.endpoint, replay=config.replay_endpoint or "off",
        topic=config.topic,
    )  # fmt: skip
    return replace(store, journal=journal), publisher
