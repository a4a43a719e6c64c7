"""Alerts and recording rules: promtool's checks and unit tests, and a runbook for each alert."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvist.engine.definitions import DEFINITIONS, figures_of
from kvist.engine.request import CoreStats
from kvist.proto.exposition import exposition

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "prometheus"
TESTS = sorted((FOLDER / "tests").glob("*.yml"))
SECTIONS = ("What it means", "How bad", "First look", "What to do", "What does not help")
RUNBOOKS = (ROOT / "docs" / "alerts.md").read_text()

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here: apt-get install prometheus"
)


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
each_alert = pytest.mark.parametrize("name", ALERTS)


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    run("promtool", "check", "rules", FOLDER / "rules.yml", FOLDER / "alerts.yml")
    run("promtool", "check", "config", FOLDER / "prometheus.yml")


@promtool
@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_alerts_fire_when_they_should_and_are_silent_when_they_should(file: Path) -> None:
    run("promtool", "test", "rules", file)


@each_alert
def test_an_alert_is_tested_when_it_fires_and_when_it_does_not(name: str) -> None:
    cases = [
        case
        for file in TESTS
        for group in yaml.safe_load(file.read_text())["tests"]
        for case in group["alert_rule_test"]
        if case["alertname"] == name
    ]
    assert {bool(case.get("exp_alerts")) for case in cases} == {True, False}


@each_alert
def test_an_alert_waits_says_how_bad_it_is_and_has_a_whole_runbook(name: str) -> None:
    alert = ALERTS[name]
    assert alert["for"]
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["runbook_url"] == f"docs/alerts.md#{name.lower()}"
    [runbook] = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", RUNBOOKS, re.M | re.S)
    assert tuple(re.findall(r"^\*\*(.*?)\.\*\*", runbook, re.M)) == SECTIONS


def test_every_runbook_is_of_an_alert() -> None:
    assert sorted(re.findall(r"^### (\w+)$", RUNBOOKS, re.M)) == sorted(ALERTS)


def test_runbooks_name_panels_that_there_are() -> None:
    boards = [file.read_text() for file in (ROOT / "deploy/grafana/boards").glob("*.json")]
    panels = re.findall(r"(?<!\*)\*([A-Z][^*]+?)\*(?!\*)", RUNBOOKS)
    assert panels
    missing = [name for name in panels if not any(f'"title": "{name}"' in text for text in boards)]
    assert not missing


def test_rules_name_metrics_that_there_are() -> None:
    spec = importlib.util.spec_from_file_location("boards", ROOT / "deploy/grafana/boards.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    from board_parts.metrics import labels_of, named

    recorded = {rule["record"] for rule in rules("rules.yml")}
    for rule in (*rules("rules.yml"), *rules("alerts.yml")):
        series = list(named(rule["expr"]))
        used = {name for name in recorded if name in rule["expr"]}
        assert series or used or "up{" in rule["expr"], rule
        known = {label for _, definition in series for label in labels_of(definition)}
        asked = set(re.findall(r'(\w+)\s*=~?"', rule["expr"])) - {"job"}
        assert asked <= known, rule


def test_counters_of_an_engine_are_there_before_their_first_event() -> None:
    shown = figures_of(CoreStats()) | {"finished": {}, "histograms": ()}
    text = exposition(DEFINITIONS, shown)
    for name, label in (
        ("kvist_engine_missed_tokens_total", 'reason="detached"'),
        ("kvist_engine_store_drops_total", 'reason="queue_full"'),
        ("kvist_engine_resumed_tokens_total", 'source="computed"'),
    ):
        assert f"{name}{{{label}}} 0.0" in text


def test_every_recorded_series_is_used_by_an_alert() -> None:
    expressions = " ".join(alert["expr"] for alert in ALERTS.values())
    used = set(re.findall(r"\w+:kvist_\w+:\w+|\w+:vllm_\w+:\w+", expressions))
    assert used == {rule["record"] for rule in rules("rules.yml")}
