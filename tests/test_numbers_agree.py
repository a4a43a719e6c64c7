"""One real run, and everybody who counts it: answers, engines, sidecar, page and command line."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from sim.cluster import Cluster, cluster, complete, metrics, slots, wait_until
from sim.models import tiny_llama

from kvist.cachesvc.view import definitions as sidecar_list
from kvist.engine import definitions as engine_list
from kvist.engine.cli import main
from kvist.engine.local import LocalEngine, LocalProcess, LocalSidecar
from kvist.proto import cache_pb2
from kvist.proto.cache_pb2_grpc import CacheStub
from kvist.proto.keys import tenant_of
from kvist.proto.metrics import Definition
from kvist.proto.shm import MOVED_TIERS, TIERS

SIZE = 16
FLAGS = ("--block-size", str(SIZE), "--cache-overlap")
# 42 slots in DRAM, so that most of what is stored is on flash only.
SMALL = {"dram_bytes": "1MiB", "flash_bytes": "8MiB", "slot_bytes": "24KiB"}
ACME = "acme:secret"
BARE = "a salt without a name"
COMMON = "(common)"


@dataclass
class Run:
    """What was asked and what the answers' usage said.

    Attributes:
        hits: tenant -> tier -> tokens. requested: tenant -> tokens; bypassed ones apart.
    """

    sidecar: LocalSidecar
    engines: list[LocalEngine]
    hits: dict[str, Counter[str]] = field(default_factory=dict)
    requested: Counter[str] = field(default_factory=Counter)
    bypassed: int = 0
    generated: int = 0

    def ask(self, engine: LocalEngine, prompt: list[int], salt: str = "", **more: Any) -> None:
        """Ask, and add up what the answer says."""
        if salt:
            more["cache_salt"] = salt
        answer = complete(engine, prompt, 2, **more)
        assert answer.prompt_tokens == len(prompt)
        self.generated += answer.completion_tokens
        if more.get("kv_cache") == "bypass":
            self.bypassed += answer.prompt_tokens
            return
        tenant = tenant_of(salt) or COMMON
        self.requested[tenant] += answer.prompt_tokens
        self.hits.setdefault(tenant, Counter()).update(answer.cached)

    def settle(self) -> None:
        """Wait until every block is on flash and everything that was measured is told."""
        stats = self.sidecar.stats

        def settled() -> bool:
            now = stats()
            return now["reserved_slots"] == 0 and now["blocks"] == slots(self.sidecar, "flash")

        wait_until(settled, "all blocks to be on flash")

    def engine_sum(self, name: str) -> float:
        """Of a counter, over the engines that run."""
        found = [metrics(engine) for engine in self.engines if engine.running]
        return sum(n for one in found for key, n in one.items() if key.partition("{")[0] == name)


def tokens(seed: int, blocks: int) -> list[int]:
    """A prompt of so many blocks and three tokens more."""
    source = random.Random(seed)
    return [source.randrange(10, 200) for _ in range(SIZE * blocks + 3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("numbers")
    with cluster(folder, str(tiny_llama(folder / "tiny"))) as made:
        yield serve(made)


def serve(made: Cluster) -> Run:
    """Two tenants and a nameless one, hits of each tier, misses of several reasons."""
    events = json.dumps({"endpoint": f"ipc://{made.folder}/events"})
    sidecar = made.sidecar(**SMALL, kv_events_config=events)
    a = made.engine("a", str(sidecar.socket), *FLAGS)
    run = Run(sidecar, [a])
    long = tokens(1, 40)
    run.ask(a, long, ACME)
    run.ask(a, long, ACME)
    run.ask(a, tokens(2, 3), kv_cache="bypass")
    for seed in range(3, 8):
        run.ask(a, tokens(seed, 8))
    run.ask(a, tokens(3, 8), BARE)
    run.settle()
    b = made.engine("b", str(sidecar.socket), *FLAGS)
    run.engines.append(b)
    # The shorter one first: as long as b has measured no prefill it loads whatever is there.
    run.ask(b, tokens(7, 8))
    run.ask(b, long, ACME)
    run.settle()
    with grpc.insecure_channel(f"unix:{sidecar.socket}") as channel:
        CacheStub(channel).Clear(cache_pb2.ClearRequest())
    run.ask(b, tokens(4, 8))
    run.settle()
    told = ("load_seconds", "lookup_seconds", "store_seconds")

    def all_told() -> bool:
        """Engines tell what they measured within a second or two, also when nothing comes."""
        worth = {one["tier"]: one for one in sidecar.stats()["worth"]}
        saved_s = sum(one["saved_s"] for one in worth.values())
        engines_s = run.engine_sum("kvist_engine_saved_seconds_total")
        return (
            all(count(sidecar, name) for name in told)
            and worth["flash"]["load_s"] > 0
            and abs(saved_s - engines_s) < 1e-4
        )

    wait_until(all_told, "what was measured to be told")
    return run


def count(sidecar: LocalSidecar, name: str) -> int:
    """Values in a histogram of /stats.json."""
    histograms = sidecar.stats()["histograms"]
    return sum(sum(one["counts"]) for one in histograms if one["name"] == name)


def split(samples: dict[str, float], name: str, **labels: str) -> dict[str, float]:
    """Samples of a metric with these labels, by the value of the label that is left."""
    found: dict[str, float] = {}
    for key, value in samples.items():
        metric, _, rest = key.removesuffix("}").partition("{")
        given = dict(pair.split("=", 1) for pair in rest.split(",") if pair)
        if metric == name and labels.items() <= given.items():
            (other,) = given.keys() - labels.keys() or {""}
            found[given.get(other, "")] = value
    return found


def test_the_run_has_what_it_is_for(run: Run) -> None:
    stats = run.sidecar.stats()
    assert all(stats["hit_tokens"][tier] > 0 for tier in TIERS), stats["hit_tokens"]
    assert {why for why, n in stats["miss_tokens"].items() if n} >= {
        "never_stored", "tail", "cleared",
    }  # fmt: skip
    assert run.bypassed > 0


def test_answers_engines_sidecar_page_and_command_line_say_the_same(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    requested, hits = run.requested.total(), sum(run.hits.values(), Counter[str]())
    stats, shown = run.sidecar.stats(), metrics(run.sidecar)
    assert main(["cache", "stats", "--json", "--url", run.sidecar.url]) == 0
    told = json.loads(capsys.readouterr().out)

    assert stats["requested_tokens"] == told["requested_tokens"] == requested
    assert shown["kvist_requested_tokens_total"] == requested
    assert run.engine_sum("kvist_engine_queries_tokens_total") == requested
    for tier in TIERS:
        assert stats["hit_tokens"][tier] == told["hit_tokens"][tier] == hits[tier]
        assert shown[f"kvist_hit_tokens_total{{tier={tier}}}"] == hits[tier]
    assert split(shown, "kvist_miss_tokens_total") == stats["miss_tokens"] == told["miss_tokens"]
    assert requested == hits.total() + sum(stats["miss_tokens"].values())


def test_the_engines_reasons_are_the_sidecars(run: Run) -> None:
    by_tier: Counter[str] = Counter()
    by_reason: Counter[str] = Counter()
    for engine in run.engines:
        shown = metrics(engine)
        by_tier.update(split(shown, "kvist_engine_cached_tokens_total"))  # type: ignore[arg-type]
        by_reason.update(split(shown, "kvist_engine_missed_tokens_total"))  # type: ignore[arg-type]
    stats = run.sidecar.stats()
    assert dict(by_tier) == stats["hit_tokens"]
    assert +by_reason == {why: n for why, n in stats["miss_tokens"].items() if n}


def test_vllms_names_count_what_the_answers_usage_does(run: Run) -> None:
    hits = sum(run.hits.values(), Counter[str]())
    prompt = run.requested.total() + run.bypassed
    assert run.engine_sum("vllm:prompt_tokens_total") == prompt
    assert run.engine_sum("vllm:prompt_tokens_by_source_total") == prompt
    assert run.engine_sum("vllm:prompt_tokens_cached_total") == hits.total()
    assert run.engine_sum("vllm:request_prompt_tokens_sum") == prompt
    assert run.engine_sum("vllm:request_prefill_kv_computed_tokens_sum") == prompt - hits.total()
    assert run.engine_sum("vllm:generation_tokens_total") == run.generated
    assert run.engine_sum("vllm:prefix_cache_hits_total") == hits["hbm"]
    external = run.engine_sum("vllm:external_prefix_cache_hits_total")
    assert external == hits["dram"] + hits["flash"]


def test_each_tenants_tokens_are_its_answers(run: Run) -> None:
    stats, shown = run.sidecar.stats(), metrics(run.sidecar)
    tenants = {one["tenant"]: one for one in stats["tenants"] if one["lookups"]}
    assert set(tenants) == set(run.requested) == {"acme", COMMON, tenant_of(BARE)}
    assert all(one["namespace"].startswith("m-") for one in tenants.values())
    for tenant, one in tenants.items():
        assert one["requested_tokens"] == run.requested[tenant]
        assert one["hit_tokens"] == {tier: run.hits[tenant][tier] for tier in TIERS}
        misses = sum(one["miss_tokens"].values())
        assert one["requested_tokens"] == sum(one["hit_tokens"].values()) + misses
        who = {"namespace": one["namespace"], "tenant": tenant}
        assert split(shown, "kvist_tenant_hit_tokens_total", **who) == one["hit_tokens"]
        assert split(shown, "kvist_tenant_miss_tokens_total", **who) == one["miss_tokens"]
    for name in ("hit_tokens", "miss_tokens"):
        whole: Counter[str] = Counter()
        for one in tenants.values():
            whole.update(one[name])
        assert dict(whole) == stats[name]


def test_worth_is_what_its_parts_are_for_tiers_and_tenants(run: Run) -> None:
    stats, shown = run.sidecar.stats(), metrics(run.sidecar)
    worth = {one["tier"]: one for one in stats["worth"]}
    for tier, one in worth.items():
        assert one["net_s"] == pytest.approx(one["saved_s"] - one["load_s"] - one["store_s"])
        assert one["saved_tokens"] == stats["hit_tokens"][tier]
        assert shown[f"kvist_worth_net_seconds{{tier={tier}}}"] == one["net_s"]
        by_tenant = sum(each["saved_s"][tier] for each in stats["tenants"])
        assert by_tenant == pytest.approx(one["saved_s"])
    whole = sum(worth[tier]["net_s"] for tier in MOVED_TIERS)
    assert stats["spans"]["start"]["net_s"] == pytest.approx(whole, abs=1e-5)
    of_tenants = sum(each["net_s"] for each in stats["tenants"])
    assert of_tenants == pytest.approx(whole + worth["flash"]["store_s"])
    assert worth["hbm"]["saved_s"] > 0
    assert worth["hbm"]["load_s"] == worth["hbm"]["store_s"] == 0
    assert worth["flash"]["load_s"] > 0
    assert worth["flash"]["store_s"] == pytest.approx(stats["flash_busy_s"]["write"])
    engines = run.engine_sum("kvist_engine_saved_seconds_total")
    saved_s = sum(one["saved_s"] for one in worth.values())
    assert saved_s == pytest.approx(engines, abs=1e-4), "workers tell whole microseconds"


def test_every_metric_that_is_listed_is_served_and_no_other(run: Run) -> None:
    for process, definitions, beside in (
        (run.sidecar, sidecar_list.DEFINITIONS, set[str]()),
        (run.engines[0], engine_list.DEFINITIONS, {"vllm:cache_config_info"}),
    ):
        text = httpx.get(f"{process.url}/metrics").text
        served = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
        served = {name for name in served if not name.startswith(("process_", "python_"))}
        assert served == {one.name for one in definitions} | beside


def test_every_figure_of_the_sidecars_list_stands_in_stats_json(run: Run) -> None:
    stats = run.sidecar.stats()
    for one in sidecar_list.DEFINITIONS:
        if one.kind == "histogram":
            assert any(each["name"] == one.figure for each in stats["histograms"]), one.name
        elif one.figure.partition("[")[0] not in ("grpc_calls", "packet_calls"):
            assert stands(stats, one), one.name


def stands(stats: dict[str, Any], one: Definition) -> bool:
    """Whether a path leads somewhere, whatever labels say."""
    found: list[Any] = [stats]
    for step in one.figure.split("."):
        name, *brackets = step.split("[")
        found = [value[name] for value in found if not name or name in value]
        for _ in brackets:
            found = [
                item
                for value in found
                for item in (value.values() if isinstance(value, dict) else value)
            ]
    return bool(found)


@pytest.mark.parametrize("whose", ["sidecar", "engine"])
def test_promtool_finds_nothing_but_vllms_own_names(run: Run, whose: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    process: LocalProcess = run.sidecar if whose == "sidecar" else run.engines[0]
    text = httpx.get(f"{process.url}/metrics").text
    ours = "\n".join(line for line in text.splitlines() if "vllm:" not in line) + "\n"
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=ours, capture_output=True, text=True, check=False
    )
    assert checked.stdout + checked.stderr == ""
    assert checked.returncode == 0


def test_counts_outlive_the_engine_that_made_them(run: Run) -> None:
    before = run.sidecar.stats()
    run.engines[1].kill()
    wait_until(lambda: run.sidecar.stats()["sessions"] == 1, "the session to end")
    after = run.sidecar.stats()
    for name in ("requested_tokens", "hit_tokens", "miss_tokens"):
        assert after[name] == before[name]


def test_the_page_of_metrics_is_fresh() -> None:
    from kvist.engine.metric_page import page

    path = Path(__file__).parents[1] / "docs" / "metrics.md"
    assert path.read_text() == page(), "run: python -m kvist.engine.metric_page docs/metrics.md"
