"""What takes how long: ages of blocks, moves, a worker's meter; and how lists become metrics."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from sim.stores import Bench, Worker, chain, store_settled, worker_of

from kvist.cachesvc.worker.cost import CostModel
from kvist.cachesvc.worker.meter import Meter
from kvist.cachesvc.worker.storing import StoreResult
from kvist.engine.copying import Stored
from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.sequence import Limits, Sequence
from kvist.engine.step import Work
from kvist.engine.weighing import Weigher
from kvist.proto.exposition import exposition
from kvist.proto.histograms import (
    AGES_S,
    WORKER_HISTOGRAMS,
    Histogram,
    Shown,
    shown_of,
    words_of,
)
from kvist.proto.metrics import Definition, Sample, as_table, samples
from kvist.proto.shm import (
    COUNTERS,
    COUNTERS_OFFSET,
    RATES_OFFSET,
    SHM_VERSION,
    TENANT_COUNTERS,
    TENANT_COUNTERS_OFFSET,
    TENANT_ROW_BYTES,
    TOUCH,
)
from kvist.transfer.pace import Pace


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, dram_slots=8, flash_slots=24)
    yield made
    made.close()


@pytest.fixture
def worker(bench: Bench) -> Worker:
    return worker_of(bench)


def shown(bench: Bench, name: str, **labels: str) -> Shown:
    (found,) = (
        one
        for one in bench.store.stats().histograms
        if one.name == name and dict(one.labels) == labels
    )
    return found


def place(value: float) -> int:
    """Which count of AGES_S a value is in."""
    return int(np.searchsorted(AGES_S, value))


# Blocks.


def test_the_gap_between_two_uses_is_measured_for_each_block(bench: Bench, worker: Worker) -> None:
    keys = store_settled(bench, worker, 0, 3)
    for seconds in (20.0, 400.0):
        bench.clock_s += seconds
        worker.ring.push(TOUCH, 3, keys[-1])
        bench.store.tick()
    gaps = shown(bench, "reuse_gap_seconds")
    assert (gaps.counts[place(20)], gaps.counts[place(400)]) == (3, 3)
    assert sum(gaps.counts) == 6
    assert gaps.sum == pytest.approx(3 * 420)


def test_an_evicted_copy_says_how_long_it_lay_and_was_idle(bench: Bench, worker: Worker) -> None:
    keys = store_settled(bench, worker, 0, 8)
    bench.clock_s += 100.0
    worker.ring.push(TOUCH, 8, keys[-1])
    bench.store.tick()
    bench.clock_s += 10.0
    store_settled(bench, worker, 100, 2)
    evicted = bench.store.stats().tiers[0].evicted_blocks
    idle, lifetime = (
        shown(bench, name, tier="dram")
        for name in ("idle_before_evict_seconds", "lifetime_seconds")
    )
    assert evicted == idle.counts[place(10)] == lifetime.counts[place(110)] == 2
    assert idle.sum == pytest.approx(20)
    assert lifetime.sum == pytest.approx(220)
    assert not sum(shown(bench, "lifetime_seconds", tier="flash").counts)


def test_every_sink_and_rise_is_timed(bench: Bench, worker: Worker) -> None:
    keys = store_settled(bench, worker, 0, 8)
    store_settled(bench, worker, 100, 8)
    assert bench.store.prefetch(keys) > 0
    assert bench.store.stats().queued_blocks["read"] > 0
    bench.settle()
    stats = bench.store.stats()
    flash = stats.tiers[1]
    assert flash.read_blocks > 0
    assert sum(shown(bench, "sink_seconds").counts) == flash.written_blocks
    assert sum(shown(bench, "rise_seconds").counts) == flash.read_blocks
    assert sum(shown(bench, "flash_queue_seconds", way="read").counts) == flash.read_blocks
    assert stats.events["sinks_begun"] == flash.written_blocks
    assert stats.queued_blocks == {"read": 0, "write": 0}
    assert flash.written_bytes == flash.written_blocks * flash.slot_bytes


def test_a_move_takes_as_long_as_the_clock_says(bench: Bench, worker: Worker) -> None:
    worker.put(chain(0, 1))
    bench.clock_s += 2.0  # while its result waits to be delivered, or before a thread began
    bench.settle()
    assert shown(bench, "sink_seconds").sum == pytest.approx(2.0)
    busy_s = bench.store.stats().flash_busy_s["write"]
    queued_s = shown(bench, "flash_queue_seconds", way="write").sum
    assert busy_s + queued_s <= 2.0


# A worker.


def test_a_meter_tells_everything_once_in_words_of_the_ring() -> None:
    meter = Meter()
    assert not meter
    meter.observe("lookup_seconds", 3e-5)
    meter.observe("lookup_seconds", 1.0)
    meter.count("decisions.load", 2)
    meter.took("acme", "load_us.dram", 0.002)
    assert meter
    counts, by_tenant = meter.take()
    assert set(counts) <= set(COUNTERS)
    told = shown_of("lookup_seconds", counts)
    assert sum(told.counts) == 2
    assert told.counts[-1] == 1
    assert told.sum == pytest.approx(1.00003)
    assert counts["decisions.load"] == 2
    assert by_tenant == {"acme": {"load_us.dram": 2000}}
    assert not meter


@given(st.lists(st.floats(0, 1e6)))
def test_a_histogram_counts_each_value_in_the_first_bound_that_holds_it(
    values: list[float],
) -> None:
    histogram = Histogram(AGES_S)
    for value in values:
        histogram.add(value)
    bounds = (*AGES_S, float("inf"))
    for at, bound in enumerate(bounds):
        assert sum(histogram.counts[: at + 1]) == sum(value <= bound for value in values)


def test_hits_before_the_first_prefill_are_valued_when_one_was_measured() -> None:
    weigher = Weigher(2, 4096, 16)
    request = NewRequest("r", list(range(200)), SamplingParams(), "acme:x")
    sequence = Sequence(request, 1, Limits(1024, 16), bytes(32), 0.0)
    sequence.registered, sequence.found = 2, ("dram",)
    weigher.saved(sequence, 1)
    weigher.computed([Work(sequence, 48, 100, True, 0)], 0.2)
    assert "acme" not in weigher.meter.take()[1]
    weigher.computed([Work(sequence, 148, 1, True, 0)], 0.01)
    _, by_tenant = weigher.meter.take()
    assert by_tenant["acme"]["saved_us.hbm"] > by_tenant["acme"]["saved_us.dram"] > 0
    weigher.computed([Work(sequence, 149, 1, True, 0)], 0.01)
    assert "acme" not in weigher.meter.take()[1]


def test_hits_save_what_the_prefill_would_have_taken() -> None:
    weigher = Weigher(2, 4096, 16)
    prefill = weigher.cost.prefill
    for tokens in (64, 512, 128, 1024):
        prefill.observe(tokens, tokens**2 / 2, 1e-4 * tokens + 1e-8 * tokens**2)
    request = NewRequest("r", list(range(200)), SamplingParams(), "acme:x")
    sequence = Sequence(request, 1, Limits(1024, 16), bytes(32), 0.0)
    sequence.registered, sequence.found = 3, ("dram", "dram", "flash", "dram")
    sequence.rose = frozenset({4})
    weigher.saved(sequence, 4)
    _, by_tenant = weigher.meter.take()
    saved = {name: told / 1e6 for name, told in by_tenant["acme"].items()}

    def between(first: int, last: int) -> float:
        """Seconds of blocks first to last - 1, in the middle of a prompt."""
        start, end = 16 * first, 16 * last
        whole = prefill.seconds([end, start], [end**2 / 2, start**2 / 2])
        return float(whole[0] - whole[1])

    assert saved["saved_us.hbm"] == pytest.approx(between(0, 3), abs=2e-6)
    dram = between(3, 4) + between(6, 7)
    assert saved["saved_us.dram"] == pytest.approx(dram, abs=2e-6)
    assert saved["saved_us.flash"] == pytest.approx(between(4, 6), abs=2e-6)
    told = weigher.stats(Pace()).saved_s
    assert sum(told.values()) == pytest.approx(between(0, 7), abs=1e-9)


def test_a_batch_of_stores_is_shared_by_its_tenants_and_no_block_is_lost() -> None:
    weigher = Weigher(2, 4096, 16)
    result = StoreResult(7, 3, {})
    tenants = Counter({"a": 5, "b": 3, "c": 2})
    weigher.stored(Stored(result, list(range(10)), set(), 0.5, tenants))
    counts, by_tenant = weigher.meter.take()
    assert sum(shown_of("store_seconds", counts).counts) == 1
    assert [by_tenant[name]["store_us"] for name in "abc"] == [250_000, 150_000, 100_000]
    assert sum(told["stored_blocks"] for told in by_tenant.values()) == 7


def test_hits_save_nothing_before_a_prefill_was_measured() -> None:
    weigher = Weigher(2, 4096, 16)
    request = NewRequest("r", list(range(200)), SamplingParams())
    sequence = Sequence(request, 1, Limits(1024, 16), bytes(32), 0.0)
    sequence.registered = 3
    weigher.saved(sequence, 0)
    assert not weigher.meter
    assert not CostModel(4096, 16).prefill.steps


# Bytes and lists.


def test_words_of_the_ring_are_frozen_and_fit() -> None:
    """A change here is a new SHM_VERSION, and what is written below is of that one."""
    assert SHM_VERSION == 7
    words = "\n".join(
        [*COUNTERS, "", *TENANT_COUNTERS, "", repr(sorted(WORKER_HISTOGRAMS.items()))]
    )
    assert hashlib.sha256(words.encode()).hexdigest()[:16] == FROZEN
    assert COUNTERS_OFFSET + 8 * len(COUNTERS) <= RATES_OFFSET
    assert TENANT_COUNTERS_OFFSET + 8 * len(TENANT_COUNTERS) <= TENANT_ROW_BYTES
    assert len(set(COUNTERS)) == len(COUNTERS)
    assert all(set(words_of(name)) <= set(COUNTERS) for name in WORKER_HISTOGRAMS)


FROZEN = "b27676eb739b5e14"


@dataclass
class Thing:
    name: str
    size: float
    parts: dict[str, int]


FIGURES = {
    "n": 3,
    "gone": None,
    "by_kind": {"a": 1, "b": 2},
    "things": [Thing("x", 0.5, {"p": 1}), Thing("y", 8.0, {"p": 2, "q": 3})],
    "nested": {"dram": [Thing("x", 0.5, {})]},
    "id": b"\x01\xff",
    "histograms": [Shown("h", {"way": "in"}, (1.0, 2.0), (4, 0, 1), 9.5)],
}


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        (Definition("m", "gauge", "", "", "n"), [Sample((), 3)]),
        (Definition("m", "gauge", "", "", "gone.n"), []),
        (
            Definition("m", "counter", "", "", "by_kind[kind]", ("kind",), {"b": "two", "c": "no"}),
            [Sample(("two",), 2), Sample(("no",), 0)],
        ),
        (
            Definition("m", "counter", "", "", "things[name].parts[part]", ("name", "part")),
            [Sample(("x", "p"), 1), Sample(("y", "p"), 2), Sample(("y", "q"), 3)],
        ),
        (
            Definition("m", "gauge", "", "", "nested[tier][size].name", ("tier", "size")),
            [Sample(("dram", "0.5"), "x")],  # type: ignore[arg-type]
        ),
        (
            Definition("m", "states", "", "", "things[name].name", ("name",), states=("x", "z")),
            [Sample(("x", "x"), 1), Sample(("x", "z"), 0), Sample(("y", "x"), 0),
             Sample(("y", "z"), 0)],
        ),
        (Definition("m", "info", "", "", "id"), [Sample(("01ff",), 1)]),
    ],
)  # fmt: skip
def test_a_path_leads_to_its_figures(definition: Definition, expected: list[Sample]) -> None:
    assert list(samples(definition, FIGURES)) == expected


def test_a_histogram_is_served_cumulated_with_its_labels() -> None:
    one = Definition("h_seconds", "histogram", "seconds", "Text.", "h", ("way",))
    assert exposition([one], FIGURES, {"model": "m"}).splitlines() == [
        "# HELP h_seconds Text.",
        "# TYPE h_seconds histogram",
        'h_seconds_bucket{model="m",way="in",le="1.0"} 4.0',
        'h_seconds_bucket{model="m",way="in",le="2.0"} 4.0',
        'h_seconds_bucket{model="m",way="in",le="+Inf"} 5.0',
        'h_seconds_count{model="m",way="in"} 5.0',
        'h_seconds_sum{model="m",way="in"} 9.5',
    ]


@given(st.text(), st.floats(allow_nan=False))
def test_any_label_and_value_is_read_back(label: str, value: float) -> None:
    one = Definition("m", "gauge", "", "Text.", "by[what]", ("what",))
    text = exposition([one], {"by": {label: value}})
    # The parser cuts lines as Python does, at more than line ends.
    if len(text.splitlines()) == 3:
        (family,) = text_string_to_metric_families(text)
        (sample,) = family.samples
        assert (sample.labels, sample.value) == ({"what": label}, value)


def test_a_table_names_labels_and_figures() -> None:
    one = Definition(
        "m_total", "counter", "blocks", "Text.", "by_kind[kind]", ("kind",), {"a": "A"}
    )
    assert as_table([one])[-1] == "| `m_total` | counter | `kind` | Text. | `by_kind[kind]` (a) |"
