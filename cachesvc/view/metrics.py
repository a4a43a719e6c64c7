"""Prometheus metrics of the sidecar: the store's figures, read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvist.cachesvc.core.store import StoreStats

TIER_STATES = ("ready", "rebuilding", "failed", "off")
# Name of an event of placement.Counts -> the label under which it is shown.
_NOT_SUNK = {
    "sinks_dropped": "no_room",
    "sinks_failed": "device",
    "sinks_first_use": "first_use",
    "sinks_over_budget": "budget",
}
_NOT_RISEN = {"rises_refused": "no_room", "rises_failed": "device"}
_CORRUPT = {"dram_corrupt": "dram", "flash_corrupt": "flash"}
_FLIGHTS = {"flights_got": "got", "flights_lost": "lost"}
_REFUSED = {"commits_refused": "commit", "index_refused": "index", "orphans_dropped": "orphan"}


class Metrics(Collector):
    """Everything that /metrics shows. Nothing is counted here, so nothing can be counted twice.

    Args:
        registry: where to be found.
        read: the store's figures; called at each scrape, from the scraper's thread.
        calls: calls so far by method, of each way: "grpc" and "packet" (cachesvc/api/calls.py).
        version: of the program.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        read: Callable[[], StoreStats],
        calls: Mapping[str, Mapping[str, int]],
        version: str,
    ) -> None:
        self._read = read
        self._calls = calls
        self._version = version
        registry.register(self)

    def describe(self) -> list[Metric]:
        """Nothing in advance, or registering would already read the store."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, from one reading."""
        stats = self._read()
        yield from self._tokens(stats)
        yield from self._workers(stats)
        yield from self._tiers(stats)
        yield from self._eviction(stats)
        yield from self._what_if(stats)
        yield from self._events(stats)
        yield from self._wear(stats)
        yield _counter(
            "kvist_flash_rebuilds",
            "Times that the flash index was missing or wrong and was made anew.",
            stats.events.get("flash_rebuilds", 0),
        )
        for event, text in (
            ("expired", "Blocks dropped because their tenant's TTL was over."),
            ("slots_wiped", "Slots overwritten when they were freed."),
            ("flash_let_go", "Blocks forgotten with a flash folder that failed for long."),
        ):
            yield _counter(f"kvist_{event}", text, stats.events.get(event, 0))
        for way, text in (("grpc", "Calls begun."), ("packet", "Calls of workers, not by gRPC.")):
            calls = dict(self._calls.get(way, {}))
            yield _counters(f"kvist_{way}_calls", text, "method", calls)
        yield _gauge("kvist_sessions", "Workers attached.", stats.sessions)
        yield _gauge(
            "kvist_reserved_slots", "Slots that workers are filling.", stats.reserved_slots
        )
        yield _gauge("kvist_blocks", "Blocks held, in whatever tier.", stats.blocks)
        yield _gauge("kvist_pinned_blocks", "Blocks pinned.", stats.pinned_blocks)
        yield _counter(
            "kvist_spared_blocks", "Pinned blocks passed over by eviction.", stats.spared_blocks
        )
        yield _gauge("kvist_uptime_seconds", "Seconds since the start.", stats.uptime_s)
        info = GaugeMetricFamily("kvist_build_info", "Always 1.", labels=["version"])
        info.add_metric([self._version], 1)
        yield info

    def _tokens(self, stats: StoreStats) -> Iterator[Metric]:
        # The sum and not the worker's own word for it: a worker adds to its counters one after
        # the other, and a scrape may come in between.
        requested = sum(stats.hit_tokens.values()) + sum(stats.miss_tokens.values())
        yield _counter("kvist_requested_tokens", "Prompt tokens that were asked for.", requested)
        yield _counters("kvist_hit_tokens", "Tokens found.", "tier", stats.hit_tokens)
        yield _counters("kvist_miss_tokens", "Tokens computed.", "reason", stats.miss_tokens)

    def _workers(self, stats: StoreStats) -> Iterator[Metric]:
        for name, text in (
            ("lookups", "Requests that asked the cache."),
            ("loaded_bytes", "Bytes that workers copied out."),
            ("stored_bytes", "Bytes that workers copied in."),
            ("ring_drops", "Reports of workers that found their ring full."),
            ("flight_tokens", "Tokens that came by waiting for another engine's computation."),
        ):
            yield _counter(f"kvist_{name}", text, stats.counters.get(name, 0))
        waits = {shown: stats.counters.get(name, 0) for name, shown in _FLIGHTS.items()}
        yield _counters(
            "kvist_flight_waits", "Waits for another engine's computation.", "outcome", waits
        )

    def _tiers(self, stats: StoreStats) -> Iterator[Metric]:
        tiers = {use.tier: use for use in stats.tiers}
        for field, text in (
            ("slots", "Slots there are."),
            ("used_slots", "Slots in use."),
            ("slot_bytes", "Bytes of a slot."),
            ("huge_bytes", "Bytes of the tier's memory in huge pages."),
            ("quarantined_slots", "Slots that gave wrong bytes and are not used again."),
        ):
            values = {tier: getattr(use, field) for tier, use in tiers.items()}
            yield _gauges(f"kvist_tier_{field}", text, "tier", values)
        for field, text in (
            ("evicted_blocks", "Copies dropped to make room."),
            ("written_blocks", "Blocks written."),
            ("read_blocks", "Blocks read by the sidecar; workers read DRAM by themselves."),
        ):
            values = {tier: getattr(use, field) for tier, use in tiers.items()}
            yield _counters(f"kvist_{field}", text, "tier", values)
        for name, field in (("written", "written_blocks"), ("read", "read_blocks")):
            values = {t: getattr(use, field) * use.slot_bytes for t, use in tiers.items()}
            yield _counters(f"kvist_{name}_bytes", f"Bytes {name}, whole slots.", "tier", values)
        state = GaugeMetricFamily(
            "kvist_tier_state", "1 for the state that the tier is in.", labels=["tier", "state"]
        )
        for tier, use in tiers.items():
            for name in TIER_STATES:
                state.add_metric([tier, name], float(use.state == name))
        yield state

    def _wear(self, stats: StoreStats) -> Iterator[Metric]:
        if stats.wear is None:
            return
        yield _counter(
            "kvist_flash_wear_bytes",
            "Bytes given to flash to write in this life, whole slots.",
            stats.wear.written_bytes,
        )
        yield _gauge(
            "kvist_flash_folder_wear_bytes",
            "The same in all lives of the folder.",
            stats.wear.folder_bytes,
        )
        if stats.wear.left_bytes is not None:
            yield _gauge(
                "kvist_flash_budget_left_bytes", "May be written now.", stats.wear.left_bytes
            )

    def _eviction(self, stats: StoreStats) -> Iterator[Metric]:
        tiers = {use.tier: use for use in stats.eviction}
        for field, text in (
            ("asked_blocks", "Blocks that requests found or stored."),
            ("hit_blocks", "Of those, blocks that the tier held; for flash, that any tier held."),
            ("lru_hit_blocks", "Of those, blocks that leaf-LRU in the tier would have held."),
        ):
            values = {tier: getattr(use, field) for tier, use in tiers.items()}
            yield _counters(f"kvist_eviction_{field}", text, "tier", values)
        points = {tier: use.points_over_lru for tier, use in tiers.items()}
        text = "Points of block hit ratio won over leaf-LRU in the last few thousand requests."
        yield _gauges("kvist_eviction_points_over_lru", text, "tier", points)
        falls = {tier: use.falls for tier, use in tiers.items()}
        text = "Times that the policy lost for long and leaf-LRU took over for a while."
        yield _counters("kvist_eviction_falls", text, "tier", falls)
        is_lru = {tier: float(use.is_lru) for tier, use in tiers.items()}
        yield _gauges("kvist_eviction_is_lru", "1 while that is so.", "tier", is_lru)

    def _what_if(self, stats: StoreStats) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "kvist_what_if_hit_ratio",
            "Share of blocks asked for that leaf-LRU would hit in a tier of another size.",
            labels=["tier", "multiple"],
        )
        for tier, estimates in stats.what_if.items():
            for estimate in estimates:
                family.add_metric([tier, f"{estimate.multiple:g}"], estimate.hit_ratio)
        yield family

    def _events(self, stats: StoreStats) -> Iterator[Metric]:
        for name, text, label, labels in (
            ("corrupt_blocks", "Copies found damaged and dropped.", "tier", _CORRUPT),
            ("sink_dropped", "Blocks that did not get a copy on flash.", "reason", _NOT_SUNK),
            ("rise_dropped", "Blocks that did not come up from flash.", "reason", _NOT_RISEN),
            ("refused_blocks", "Blocks that were not taken in.", "reason", _REFUSED),
        ):
            values = {shown: stats.events.get(event, 0) for event, shown in labels.items()}
            yield _counters(f"kvist_{name}", text, label, values)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counters(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for shown, value in values.items():
        family.add_metric([shown], value)
    return family


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for shown, value in values.items():
        family.add_metric([shown], value)
    return family
