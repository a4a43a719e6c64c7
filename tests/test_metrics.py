"""What /metrics says: every figure of the store once, and sums that agree in every scrape."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvist.cachesvc.core.report import EvictionUse, TierUse
from kvist.cachesvc.core.store import StoreStats
from kvist.cachesvc.events.figures import EventUse
from kvist.cachesvc.placing.counts import Counts
from kvist.cachesvc.study.whatif import Estimate
from kvist.cachesvc.view import dashboard
from kvist.cachesvc.view.definitions import TIER_STATES
from kvist.cachesvc.view.document import stats_document
from kvist.cachesvc.view.metrics import Metrics
from kvist.proto.errors import Detached
from kvist.proto.shm import COUNTERS, MISS_REASONS, TIERS


def stats(**changes: object) -> StoreStats:
    full = StoreStats(
        boot_epoch=bytes(16),
        uptime_s=12.5,
        tiers=(
            TierUse("dram", "ready", 100, 40, 4096, 5, 45, 1, written_bytes=45 * 4096),
            TierUse("flash", "failed", 1000, 400, 4096, 6, 46, 2, read_bytes=2 * 4096),
        ),
        sessions=2,
        reserved_slots=3,
        requested_tokens=1000,
        hit_tokens={"hbm": 100, "dram": 500, "flash": 50},
        miss_tokens=dict.fromkeys(MISS_REASONS, 0) | {"tail": 50, "never_stored": 300},
        blocks=420,
        counters={name: number for number, name in enumerate(COUNTERS)},
        events=dataclasses.asdict(Counts(sinks_dropped=7, flash_corrupt=8)),
        what_if={"dram": (Estimate(0.5, 50, 0.21), Estimate(8.0, 800, 0.4))},
        eviction=(EvictionUse("dram", 1000, 310, 280, 2.5, False, 1),),
    )
    return dataclasses.replace(full, **changes)  # type: ignore[arg-type]


def scrape(now: StoreStats) -> dict[tuple[str, ...], float]:
    calls = {"grpc": {"Attach": 2}, "packet": {"Commit": 3}}
    text = Metrics(lambda: now, calls, "1.2.3").text().decode()
    samples: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = (sample.name, *sample.labels.values())
            assert name not in samples
            samples[name] = sample.value
    return samples


def test_every_figure_of_the_store_is_shown() -> None:
    seen = scrape(stats())
    assert seen["kvist_sessions",] == 2
    assert seen["kvist_reserved_slots",] == 3
    assert seen["kvist_blocks",] == 420
    assert seen["kvist_tier_slots", "flash"] == 1000
    assert seen["kvist_tier_used_slots", "dram"] == 40
    assert seen["kvist_evicted_blocks_total", "flash"] == 6
    assert seen["kvist_written_bytes_total", "dram"] == 45 * 4096
    assert seen["kvist_read_bytes_total", "flash"] == 2 * 4096
    assert seen["kvist_corrupt_blocks_total", "flash"] == 8
    assert seen["kvist_sink_dropped_total", "no_room"] == 7
    assert seen["kvist_build_info", "1.2.3"] == 1
    assert seen["kvist_epoch_info", "00" * 16] == 1


def test_points_won_over_leaf_lru_are_shown() -> None:
    seen = scrape(stats())
    assert seen["kvist_eviction_hit_blocks_total", "dram"] == 310
    assert seen["kvist_eviction_lru_hit_blocks_total", "dram"] == 280
    assert seen["kvist_eviction_asked_blocks_total", "dram"] == 1000
    assert seen["kvist_eviction_points_over_lru", "dram"] == 2.5
    assert seen["kvist_eviction_falls_total", "dram"] == 1
    assert seen["kvist_eviction_is_lru", "dram"] == 0


def test_what_if_curve_is_shown() -> None:
    seen = scrape(stats())
    assert seen["kvist_what_if_hit_ratio", "0.5", "dram"] == 0.21
    assert seen["kvist_what_if_hit_ratio", "8", "dram"] == 0.4
    document = stats_document(stats(), "1")
    assert json.loads(json.dumps(document))["what_if"]["dram"][0]["capacity_blocks"] == 50


def test_what_routers_were_told_is_shown_where_events_are_on() -> None:
    told = {"stored": {"CPU": 7, "STORAGE": 0}, "removed": {"CPU": 2, "STORAGE": 0}}
    use = EventUse(told, clears=1, batches=12, answers={"replay": 3, "snapshot": 0}, pending=5)
    seen = scrape(stats(kv_events=use))
    assert seen["kvist_kv_event_blocks_total", "stored", "CPU"] == 7
    assert seen["kvist_kv_event_blocks_total", "removed", "STORAGE"] == 0, "from the start"
    assert seen["kvist_kv_event_clears_total",] == 1
    assert seen["kvist_kv_event_batches_total",] == 12
    assert seen["kvist_kv_event_answers_total", "replay"] == 3
    assert seen["kvist_kv_event_pending",] == 5
    assert stats_document(stats(kv_events=use), "1")["kv_events"]["blocks"] == told
    assert not any(name[0].startswith("kvist_kv_event") for name in scrape(stats()))


def test_a_tier_is_in_exactly_one_state() -> None:
    seen = scrape(stats())
    for tier, state in (("dram", "ready"), ("flash", "failed")):
        for name in TIER_STATES:
            assert seen["kvist_tier_state", name, tier] == (name == state)


def test_every_tier_and_reason_has_its_tokens() -> None:
    seen = scrape(stats())
    hits = sum(seen["kvist_hit_tokens_total", tier] for tier in TIERS)
    misses = sum(seen["kvist_miss_tokens_total", reason] for reason in MISS_REASONS)
    assert seen["kvist_requested_tokens_total",] == hits + misses == 1000


def test_a_store_without_tiers_yet_can_be_scraped() -> None:
    seen = scrape(stats(tiers=(), counters={}, events={}))
    assert seen["kvist_lookups_total",] == 0
    assert not any(name[0] == "kvist_tier_slots" for name in seen)


def test_every_event_of_the_store_has_a_metric() -> None:
    numbers = {name: 100_000 + at for at, name in enumerate(dataclasses.asdict(Counts()))}
    shown = set(scrape(stats(tiers=(), events=numbers)).values())
    by_tier = {f"{tier}_{what}" for tier in ("dram", "flash") for what in TIER_EVENTS}
    assert {name for name, number in numbers.items() if number not in shown} == by_tier


TIER_EVENTS = ("written", "read", "evicted")


def test_nothing_is_read_before_a_scrape_and_a_store_that_is_gone_is_an_error() -> None:
    def gone() -> StoreStats:
        raise Detached("the store has stopped")

    metrics = Metrics(gone, {}, "1")
    with pytest.raises(Detached):
        metrics.text()


def test_stats_document_has_the_fields_of_the_store_in_plain_json_types() -> None:
    document = stats_document(stats(), "1.2.3")
    assert document["boot_epoch"] == "00" * 16
    assert document["version"] == "1.2.3"
    assert document["tiers"][0]["used_slots"] == 40
    assert document["miss_tokens"]["tail"] == 50


def test_the_page_has_words_for_every_reason_and_tier() -> None:
    words = (Path(dashboard.__file__).parent / "page" / "words.js").read_text()
    for name in (*MISS_REASONS, *TIERS):
        assert f" {name}: " in words
