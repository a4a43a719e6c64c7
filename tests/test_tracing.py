"""One trace per request: over HTTP, the API process, the core, its threads and the sidecar."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("opentelemetry.proto", reason="needs the extra otel")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)
from sim.collector import Collector, Span
from sim.models import tiny_llama
from sim.sidecar import Prompt, Sidecar

from kvist.cachesvc.tracer import Tracer, open_tracer
from kvist.engine.local import LocalEngine
from kvist.proto import cache_pb2, cache_pb2_grpc
from kvist.proto.errors import ConfigInvalid
from kvist.proto.trace import SpanNote, TraceContext, parse_traceparent

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
PROMPT = "The index and the arena are shared memory, so a lookup needs no call. " * 4
FLAGS = ("--block-size", "16", "--served-model-name", "tiny", "--threads", "1")
SMALL = ("--kv-cache-memory-bytes", "4MiB", "--log-level", "warning")


class Site:
    """A collector, a sidecar and an engine at a time, all real.

    Attributes:
        first, second: traceparents of the same request, the second to a new engine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.collector = Collector()
        self.sidecar = Sidecar(
            folder / "sidecar",
            ["--otlp-endpoint", self.collector.endpoint, "--listen", "127.0.0.1:0"],
        )
        self.model = tiny_llama(folder / "model", 1)
        self.engine: LocalEngine | None = None

    def start_engine(self, name: str) -> None:
        where = ("--cache", self.sidecar.address, "--otlp-traces-endpoint", self.collector.endpoint)
        log = self.folder / name
        self.engine = LocalEngine(str(self.model), log, (*FLAGS, *SMALL, *where))
        self.engine.start()
        self.engine.wait_ready()

    def stop_engine(self) -> None:
        if self.engine is not None:
            assert self.engine.stop() == 0, self.engine.tail()
            self.engine = None

    def ask(self, traceparent: str = "", **more: object) -> httpx.Response:
        assert self.engine is not None
        body = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, "temperature": 0, **more}
        headers = {"traceparent": traceparent} if traceparent else {}
        return httpx.post(
            f"{self.engine.url}/v1/completions", json=body, headers=headers, timeout=60
        )

    def wait(self, found: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20.0
        while not found():
            assert time.monotonic() < deadline, [span.name for span in self.collector.spans]
            time.sleep(0.05)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.stop()
        self.sidecar.close()
        self.collector.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    patch = pytest.MonkeyPatch()
    patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.sidecar.start()
        site.start_engine("one")
        assert site.ask(TRACEPARENT).status_code == 200
        site.wait(lambda: site.collector.named("kvist.store"))
        site.stop_engine()
        site.start_engine("two")  # its own pool is empty: what it reuses comes from DRAM
        assert site.ask(second(), n=2).status_code == 200
        site.wait(lambda: len(site.collector.named("llm_request")) == 2)
        yield site
    finally:
        site.close()
        patch.undo()


def second() -> str:
    return f"00-{'1' * 32}-{CALLER}-01"


def root(site: Site, trace: str) -> Span:
    (span,) = [span for span in site.collector.named("llm_request") if span.trace == trace]
    return span


def one(spans: list[Span], name: str) -> Span:
    (span,) = [span for span in spans if span.name == name]
    return span


def adds_up(whole: Span, parts: list[Span]) -> None:
    """The parts follow one another and are the whole, within 2 %."""
    assert sum(part.length for part in parts) == pytest.approx(whole.length, rel=0.02)
    for before, after in pairwise(parts):
        assert abs(after.start - before.end) < 0.02 * whole.length


def test_a_request_is_a_tree_under_its_callers_span_and_its_spans_add_up(site: Site) -> None:
    whole = root(site, TRACE)
    assert (whole.parent, whole.kind, whole.service) == (CALLER, 2, "kvist")
    assert {span.trace for span in site.collector.spans if span.id == whole.id} == {TRACE}
    parts = site.collector.under(whole)
    assert [part.name for part in parts] == ["kvist.prepare", "kvist.generate", "kvist.reply"]
    adds_up(whole, parts)
    answer = parts[1]
    steps = [part for part in site.collector.under(answer) if part.name != "kvist.store"]
    assert [step.name for step in steps] == ["kvist.queue", "kvist.prefill", "kvist.decode"]
    adds_up(answer, steps)
    for span in site.collector.spans:
        assert span.end >= span.start


def test_attributes_have_vllms_names_and_ours(site: Site) -> None:
    about = root(site, TRACE).attributes
    assert about["gen_ai.usage.completion_tokens"] == 20
    assert about["gen_ai.request.max_tokens"] == 20
    assert about["gen_ai.usage.prompt_tokens"] > 100
    assert about["http.response.status_code"] == 200
    parts = [
        about[f"gen_ai.latency.time_in_{part}"]
        for part in ("queue", "model_prefill", "model_decode")
    ]
    assert 0.0 < sum(parts) < about["gen_ai.latency.e2e"]
    assert about["gen_ai.latency.time_to_first_token"] < about["gen_ai.latency.e2e"]
    answer = one(site.collector.under(root(site, TRACE)), "kvist.generate")
    queue = one(site.collector.under(answer), "kvist.queue")
    looked = one(site.collector.under(queue), "kvist.lookup").attributes
    misses = {name: n for name, n in looked.items() if name.startswith("kvist.miss_tokens.")}
    assert misses["kvist.miss_tokens.never_stored"] >= 16
    assert sum(misses.values()) == looked["kvist.requested_tokens"]


def told(site: Site) -> Counter[str]:
    """The sidecar's account, by the names that traces give its parts."""
    stats = json.loads(site.sidecar.get("stats.json"))
    parts = {f"{kind}_tokens.{name}": n for kind in ("hit", "miss") for name, n in
             stats[f"{kind}_tokens"].items()}  # fmt: skip
    return Counter({"requested_tokens": stats["requested_tokens"], **parts})


def test_a_traces_tokens_are_those_of_the_answer_and_of_the_sidecar(site: Site) -> None:
    before, trace = told(site), "8" * 32
    usage = site.ask(f"00-{trace}-{CALLER}-01").json()["usage"]
    site.wait(lambda: [s for s in site.collector.named("llm_request") if s.trace == trace])
    looked = one([s for s in site.collector.spans if s.trace == trace], "kvist.lookup").attributes
    named = {name.removeprefix("kvist."): n for name, n in looked.items() if "_tokens" in name}
    site.wait(lambda: told(site)["requested_tokens"] > before["requested_tokens"])
    assert +Counter(named) == told(site) - before
    assert named["requested_tokens"] == usage["prompt_tokens"]
    by_tier = usage["prompt_tokens_details"]["cached_tokens_by_tier"]
    for tier in ("hbm", "dram", "flash"):
        assert root(site, trace).attributes[f"kvist.cached_tokens.{tier}"] == by_tier[tier]
        assert named.get(f"hit_tokens.{tier}", 0) == by_tier[tier]


def test_the_sidecars_calls_are_part_of_the_store(site: Site) -> None:
    answer = one(site.collector.under(root(site, TRACE)), "kvist.generate")
    store = one(site.collector.under(answer), "kvist.store")
    site.wait(lambda: len(site.collector.under(store)) >= 2)
    calls = site.collector.under(store)
    assert {call.name for call in calls} == {"kvistd.Reserve", "kvistd.Commit"}
    assert {call.service for call in calls} == {"kvistd"}
    blocks = store.attributes["kvist.blocks"]
    for name in ("kvistd.Reserve", "kvistd.Commit"):
        named = [call for call in calls if call.name == name]
        assert 0 < sum(call.attributes["kvist.blocks"] for call in named) <= blocks


def test_a_load_tells_its_tier_the_decision_the_estimate_and_what_came(site: Site) -> None:
    whole = root(site, "1" * 32)
    answers = [p for p in site.collector.under(whole) if p.name == "kvist.generate"]
    assert len(answers) == 2
    assert whole.attributes["gen_ai.request.n"] == 2
    assert whole.attributes["kvist.cached_tokens.dram"] >= 96
    loads = [
        load
        for load in site.collector.named("kvist.load")
        if load.trace == whole.trace and load.attributes.get("kvist.blocks.dram", 0) >= 6
    ]
    assert loads
    about = loads[0].attributes
    assert about["kvist.decision"] == "load"
    assert about["kvist.estimate.compute_s"] >= 0.0
    assert about["kvist.load_s"] > 0.0
    for answer in answers:
        parts = [part for part in site.collector.under(answer) if part.name != "kvist.store"]
        adds_up(answer, parts)


def test_a_refused_request_has_a_trace_and_an_unsampled_one_has_none(site: Site) -> None:
    seen = len(site.collector.named("llm_request"))
    assert site.ask(f"00-{'2' * 32}-{CALLER}-00").status_code == 200
    assert site.ask(f"00-{'3' * 32}-{CALLER}-01", max_tokens=10**6).status_code == 400
    site.wait(lambda: len(site.collector.named("llm_request")) == seen + 1)
    refused = root(site, "3" * 32)
    assert refused.attributes["http.response.status_code"] == 400
    assert [part.name for part in site.collector.under(refused)] == ["kvist.prepare"]
    assert not [span for span in site.collector.spans if span.trace == "2" * 32]


def test_an_answer_that_ends_at_a_stop_string_is_whole_too(site: Site) -> None:
    text = site.ask().json()["choices"][0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    assert site.ask(f"00-{'4' * 32}-{CALLER}-01", stop=[stop]).status_code == 200
    site.wait(lambda: [span for span in site.collector.spans if span.trace == "4" * 32])
    whole = root(site, "4" * 32)
    site.wait(
        lambda: len(site.collector.under(one(site.collector.under(whole), "kvist.generate"))) >= 3
    )


def test_grpc_calls_with_a_traceparent_are_spans_of_the_sidecar(site: Site) -> None:
    keys = Prompt(1, 2).keys
    with site.sidecar.channel(site.sidecar.said("listen")) as channel:
        stub = cache_pb2_grpc.CacheStub(channel)
        metadata = (("traceparent", f"00-{'5' * 32}-{CALLER}-01"),)
        stub.Lookup(cache_pb2.LookupRequest(keys=keys), metadata=metadata)
        stub.Lookup(cache_pb2.LookupRequest(keys=keys))
        list(stub.Read(cache_pb2.ReadRequest(keys=[]), metadata=metadata))
    site.wait(lambda: [span for span in site.collector.spans if span.trace == "5" * 32])
    (span,) = site.collector.named("kvistd.Lookup")
    assert (span.parent, span.service, span.kind) == (CALLER, "kvistd", 2)
    site.wait(lambda: site.collector.named("kvistd.Read"))


def test_a_collector_that_is_not_there_costs_nobody_an_answer(tmp_path: Path) -> None:
    sidecar = Sidecar(tmp_path, ["--otlp-endpoint", "http://127.0.0.1:1"])
    sidecar.start()
    try:
        with sidecar.channel() as channel:
            stub = cache_pb2_grpc.CacheStub(channel)
            request = cache_pb2.LookupRequest(keys=Prompt(1, 2).keys)
            reply = stub.Lookup(request, metadata=(("traceparent", TRACEPARENT),))
        assert reply.miss_reason == "never_stored"
        assert sidecar.stop() == 0
    finally:
        sidecar.close()


def test_what_is_off_is_not_imported() -> None:
    code = """
import sys
import kvist.cachesvc.__main__
from kvist.cachesvc.tracer import open_tracer
assert open_tracer("otlp_endpoint", "", "kvistd") is None
assert "zmq" not in sys.modules, "events are off"
import kvist.engine.serve
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def test_the_sampler_of_the_environment_decides(
    monkeypatch: pytest.MonkeyPatch, exporter: InMemorySpanExporter
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    tracer = Tracer(exporter, "kvist")
    begun = [tracer.begin("llm_request", None) for _ in range(400)]
    assert 40 < sum(place is not None for place in begun) < 180
    caller = TraceContext("a" * 32, "b" * 16)
    place = tracer.begin("llm_request", caller)
    assert place is not None
    assert place.trace == caller.trace
    assert tracer.begin("llm_request", TraceContext("a" * 32, "b" * 16, sampled=False)) is None
    tracer.emit(SpanNote("part", place.child(), place.span, 1.0, 2.5, {"kvist.blocks": 3}))
    tracer.close()
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == "mine"
    assert span.end_time - span.start_time == pytest.approx(1.5e9, abs=1000)


def test_a_missing_package_and_a_wrong_protocol_are_errors_that_say_the_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigInvalid, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'kafka'"):
        open_tracer("x", "http://a:1", "kvist", {"OTEL_EXPORTER_OTLP_PROTOCOL": "kafka"})
    assert open_tracer("x", "http://a:1", "kvist", {"OTEL_SDK_DISABLED": "true"}) is None
    name = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigInvalid, match=r"--otlp: .*pip install '\.\[otel\]'"):
        open_tracer("--otlp", "http://127.0.0.1:1", "kvist", {})


@given(st.text(alphabet="0123456789abcdef-g", max_size=70))
def test_a_traceparent_is_understood_or_ignored(text: str) -> None:
    place = parse_traceparent(text)
    if place is not None:
        again = parse_traceparent(str(place))
        assert again == place


def test_traceparents_of_the_specification() -> None:
    assert parse_traceparent(TRACEPARENT) == TraceContext(TRACE, CALLER)
    assert str(TraceContext(TRACE, CALLER)) == TRACEPARENT
    assert parse_traceparent(f"cc-{TRACE}-{CALLER}-01-what-comes") == TraceContext(TRACE, CALLER)
    for wrong in (
        f"00-{TRACE}-{CALLER}-01-more", f"ff-{TRACE}-{CALLER}-01", f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{CALLER}-01", "",
    ):  # fmt: skip
        assert parse_traceparent(wrong) is None
