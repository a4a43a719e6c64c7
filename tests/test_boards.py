"""Grafana's boards: made from the lists of metrics, and every query answered by a real Prometheus.

The Prometheus has scraped a real sidecar and a real engine whose requests hit every tier.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sim.cluster import wait_until
from sim.models import tiny_llama
from sim.prometheus import MISSING, PROMETHEUS, Prometheus, values_of

from kvist.engine.local import LocalEngine, LocalProcess, LocalSidecar, ask

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "grafana"
Json = dict[str, Any]

BLOCK, PROMPT_TOKENS = 16, 1000
# A busy machine may find it cheaper to compute than to load from flash, at first.
ROUNDS_MIN, ROUNDS_MAX = 3, 10
SIDECAR = {
    "dram_bytes": "4MiB",  # 341 blocks, five prompts and a half
    "flash_bytes": "64MiB",
    "flash_admission": "always",
    "flash_write_bytes_per_day": "1GiB",
    "flash_write_burst_bytes": "1GiB",
}
ENGINE = (
    *("--threads", "1", "--dtype", "float32", "--block-size", str(BLOCK)),
    *("--kv-cache-memory-bytes", "1MiB"),  # 128 pages, two prompts
    *("--max-num-batched-tokens", "256", "--served-model-name", "tiny"),
)


def load_boards() -> Any:
    spec = importlib.util.spec_from_file_location("boards", FOLDER / "boards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


boards = load_boards()
BOARDS: dict[str, Json] = {
    board.uid: json.loads((FOLDER / "boards" / f"{board.uid}.json").read_text())
    for board in boards.BOARDS
}
each_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)


def panels(board: Json) -> list[Json]:
    return [panel for panel in board["panels"] if panel["type"] not in ("row", "text")]


def targets(board: Json) -> list[tuple[str, Json]]:
    return [(panel["title"], one) for panel in panels(board) for one in panel["targets"]]


def test_the_boards_that_are_checked_in_are_what_the_lists_of_metrics_give() -> None:
    for board in boards.BOARDS:
        file = FOLDER / "boards" / f"{board.uid}.json"
        assert file.read_text() == boards.text_of(board), f"{file} is not fresh: make boards"
    assert {path.stem for path in (FOLDER / "boards").iterdir()} == set(BOARDS)


def test_a_query_that_names_no_metric_is_refused() -> None:
    from board_parts.metrics import NoSuchMetric, selected

    for query in ("rate(kvist_hits_total[5m])", "kvist_load_seconds", "kvist_blocks_bucket"):
        with pytest.raises(NoSuchMetric):
            selected(query, {})


def test_selectors_follow_from_the_labels_of_a_metric() -> None:
    from board_parts.metrics import selected

    variables = {"sidecar": "instance", "tier": "tier", "engine": "instance"}
    assert selected("kvist_blocks", variables) == 'kvist_blocks{instance=~"$sidecar"}'
    assert (
        selected("sum(rate(kvist_hit_tokens_total[W]))", variables)
        == 'sum(rate(kvist_hit_tokens_total{instance=~"$sidecar", tier=~"$tier"}'
        "[$__rate_interval]))"
    )
    assert (
        selected('kvist_engine_loaded_bytes_total{tier="dram"}', variables)
        == 'kvist_engine_loaded_bytes_total{instance=~"$engine", tier="dram"}'
    )


@each_board
def test_panels_do_not_overlap_and_every_one_says_what_it_answers(board: Json) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        spot = panel["gridPos"]
        assert spot["x"] + spot["w"] <= 24
        cells = {
            (x, y)
            for x in range(spot["x"], spot["x"] + spot["w"])
            for y in range(spot["y"], spot["y"] + spot["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels(board):
        assert panel["title"], panel
        text, metrics = panel["description"].split("\n\n")
        assert text, panel["title"]
        assert metrics.startswith("* `"), panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@each_board
def test_every_variable_of_a_board_is_used_by_it_and_every_used_one_is_there(board: Json) -> None:
    there = {variable["name"] for variable in board["templating"]["list"]}
    text = json.dumps(board["panels"])
    used = set(re.findall(r"\$\{?(?!__)(\w+)", text))
    assert used == there


class Run:
    """A sidecar and an engine that worked, and a Prometheus that looked on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[LocalProcess] = []

    def start(self) -> None:
        """All three; the engine is started while the sidecar starts."""
        events = json.dumps({"endpoint": f"ipc://{self.folder}/events"})
        settings = {**SIDECAR, "shm_dir": str(self.folder / "shm"), "kv_events_config": events}
        self.sidecar = LocalSidecar(self.folder / "sidecar", settings)
        model = str(tiny_llama(self.folder / "model", 1))
        flags = ("--cache", str(self.sidecar.socket), *ENGINE)
        self.engine = LocalEngine(model, self.folder / "engine.log", flags)
        jobs = {"kvistd": self.sidecar, "kvist-engine": self.engine}
        addresses = {job: process.url.removeprefix("http://") for job, process in jobs.items()}
        self.prometheus = Prometheus(self.folder / "prometheus", addresses)
        self.processes = [self.sidecar, self.engine, self.prometheus]
        for process in self.processes:
            process.start()
        for process in self.processes:
            process.wait_ready()
        self.began_s = time.time()

    def ask(self, prompt: int) -> dict[str, int]:
        """Send the prompt of that number, as one of two tenants; returns tier -> cached tokens."""
        draw = random.Random(prompt)
        body = {
            "model": "tiny",
            "prompt": [draw.randrange(3, 256) for _ in range(PROMPT_TOKENS)],
            "max_tokens": 8,
            "ignore_eos": True,
            "temperature": 0,
            "cache_salt": f"tenant{prompt % 2}:secret",
        }
        return ask(self.engine.url, body).cached

    def work(self) -> None:
        """Requests that miss, and such as hit HBM, DRAM and flash, until all was scraped."""
        wait_until(lambda: bool(self.prometheus.now("kvist_engine_cache_attached == 1")), "attach")
        hits = dict.fromkeys(("hbm", "dram", "flash"), 0)
        rounds = 0
        while rounds < ROUNDS_MIN or not all(hits.values()):
            assert rounds < ROUNDS_MAX, hits
            rounds += 1
            # Eight prompts are more than DRAM holds: when the last is in, the first is on flash
            # only. The one before the last two has left HBM, and is in DRAM.
            for prompt in (*range(8), 7, 5, 0):
                found = self.ask(prompt)
                hits = {tier: tokens + found[tier] for tier, tokens in hits.items()}
            time.sleep(1.0)
        self.requests = 11 * rounds
        told = f"min(kvist_lookups_total) == {self.requests} and sum(kvist_what_if_hit_ratio) > 0"
        wait_until(lambda: bool(self.prometheus.now(told)), "the last figures to be scraped")
        time.sleep(2 * 1.0)  # two evaluations of the rules, which may take up each other's figures
        self.ended_s = time.time()

    def stop(self) -> None:
        """All that was started."""
        for process in self.processes:
            process.stop()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    if PROMETHEUS is None:
        pytest.skip(MISSING)
    made = Run(tmp_path_factory.mktemp("run"))
    try:
        made.start()
        made.work()
        yield made
    finally:
        made.stop()


def put(query: str, chosen: dict[str, str], seconds: float) -> str:
    """A query as Grafana would send it; its own windows are those of a scrape each second."""
    windows = {"__rate_interval": "4s", "__range": f"{math.ceil(seconds)}s"}
    for name, value in sorted({**windows, **chosen}.items(), reverse=True):  # the longer first
        query = query.replace(f"${name}", value)
    assert "$" not in query, query
    return query


def values(run: Run, variable: Json, chosen: dict[str, str]) -> list[str]:
    """What Grafana would offer for a variable."""
    match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
    assert match is not None, variable
    asked = {"match[]": put(match[1], chosen, 60), "start": run.began_s, "end": run.ended_s}
    found: list[str] = run.prometheus.get(f"label/{match[2]}/values", **asked)
    return found


def test_every_query_of_every_board_is_answered_with_numbers(run: Run) -> None:
    asked = [(board, title, one) for board in BOARDS.values() for title, one in targets(board)]
    empty = []
    for board, title, target in asked:
        query = put(target["expr"], everything(board), run.ended_s - run.began_s)
        if target["instant"]:
            found = run.prometheus.get("query", query=query, time=run.ended_s)["result"]
        else:
            found = run.prometheus.over(query, run.began_s, run.ended_s)
        if all(math.isnan(value) for series in found for value in values_of(series)):
            empty.append(f"{board['title']}, {title}: {query}")
        check_legends(title, target, found)
    assert not empty, "\n".join(empty)
    assert len(asked) > 100


def test_every_board_marks_when_a_sidecar_began(run: Run) -> None:
    for board in BOARDS.values():
        [note] = board["annotations"]["list"]
        query = put(note["expr"], everything(board), 60)
        assert run.prometheus.over(query, run.began_s, run.ended_s), query


def check_legends(title: str, target: Json, found: list[Json]) -> None:
    """Every label of a legend is there, and no two series look the same."""
    names = re.findall(r"{{(\w+)}}", target["legendFormat"])
    for series in found:
        assert set(names) <= set(series["metric"]), f"{title}: {target['expr']}"
    if target["format"] == "time_series":
        seen = [tuple(series["metric"][name] for name in names) for series in found]
        assert len(set(seen)) == len(seen), f"{title}: {target['expr']}"


def variables(board: Json) -> list[Json]:
    return [one for one in board["templating"]["list"] if one["type"] == "query"]


def everything(board: Json) -> dict[str, str]:
    """All variables of a board at "All"."""
    return {one["name"]: one["allValue"] for one in variables(board)}


def test_each_choice_of_a_variable_leaves_something_to_see(run: Run) -> None:
    for board in BOARDS.values():
        for variable in variables(board):
            name = variable["name"]
            using = [one for _, one in targets(board) if f'"${name}"' in one["expr"]]
            offered = values(run, variable, everything(board))
            assert offered, name
            for value in offered:
                # As Grafana does: a regular expression, inside a string of PromQL.
                chosen = {**everything(board), name: re.escape(value).replace("\\", "\\\\")}
                seen = [run.prometheus.now(put(one["expr"], chosen, 60)) for one in using]
                assert any(seen), f"{board['title']}: {name} = {value}"


def states(run: Run) -> dict[str, str]:
    """Alert -> inactive, pending or firing."""
    groups = run.prometheus.get("rules", type="alert")["groups"]
    return {rule["name"]: rule["state"] for group in groups for rule in group["rules"]}


def test_every_rule_is_evaluated_and_nothing_seems_wrong_in_a_healthy_run(run: Run) -> None:
    groups = run.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    for rule in rules:
        if rule["type"] == "recording":
            assert run.prometheus.now(rule["name"]), rule["name"]
    # These say something of sizes and speed, and a tiny cache on a busy machine is no example.
    of_size = {"KvistMoreMemoryWouldPay", "KvistCostsMoreThanItSaves"}
    of_size |= {"KvistFirstTokenSlow", "KvistFlashQueueDropping"}
    assert {name for name, state in states(run).items() if state != "inactive"} <= of_size


def test_boards_and_the_sidecar_agree(run: Run) -> None:
    stats = run.sidecar.stats()
    for tier, tokens in stats["hit_tokens"].items():
        [series] = run.prometheus.now(f'kvist_hit_tokens_total{{tier="{tier}"}}')
        assert values_of(series) == [tokens]
    assert stats["requested_tokens"] == run.requests * PROMPT_TOKENS


def test_a_sidecar_that_stops_is_seen_by_its_alerts(run: Run) -> None:
    run.sidecar.stop()
    run.ask(8)
    expected = {"KvistSidecarDown", "KvistEngineDetached"}
    wait_until(
        lambda: expected <= {name for name, state in states(run).items() if state == "pending"},
        "the alerts to see it",
    )
