"""The grammar of a board: panels, rows and variables, and the JSON that Grafana imports.

Written for Grafana 10 and 11 (schemaVersion 39). Boards hold nothing of one Grafana: the data
source is a variable, ids are left to the import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from board_parts.metrics import meanings, selected

Json = dict[str, Any]
Kind = Literal["stat", "lines", "stack", "share", "heat", "bars", "table", "states", "text"]
Steps = Sequence[tuple[float | None, str]]

SCHEMA_VERSION = 39
WIDTH = 24
GREEN: Steps = ((None, "green"),)
BAD_OVER_0: Steps = ((None, "green"), (1e-9, "red"))
GOOD_OVER_0: Steps = ((None, "red"), (1e-9, "green"))
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# The same colour for the same thing on every board.
COLOURS = {
    "hbm": "purple",
    "dram": "blue",
    "flash": "orange",
    "computed": "#808080",
    "saved": "green",
    "loads": "yellow",
    "stores": "red",
    "p50": "green",
    "p90": "yellow",
    "p99": "red",
    "mean": "blue",
}
_TIERS = ("hbm", "dram", "flash")


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture.

    Attributes:
        kind: stat: one large figure; lines, stack: over time; share: stacked, 0 to 1; heat: a
            histogram over time; bars: one bar per series, now; table: columns by legend, rows by
            the labels that all queries have; states: numbers that are names; text: Markdown.
        title: short; of a stat what the figure is.
        queries: legend -> PromQL as board_parts.metrics.selected takes it. A legend may hold
            {{label}}. Of a text nothing.
        text: what question it answers, and how to read it; the meanings of the metrics follow.
        unit: of Grafana: short, percentunit, s, bytes, Bps, binBps, ops, reqps.
        width: of 24. height: in rows of the grid.
        steps: thresholds, (from, colour).
        names: of kind states, number -> (name, colour); of kind table, column -> unit.
        low, high: of the axis.
    """

    kind: Kind
    title: str
    queries: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    unit: str = "short"
    width: int = 8
    height: int = 8
    steps: Steps = GREEN
    names: Mapping[Any, Any] = field(default_factory=dict)
    low: float | None = 0
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Variable:
    """What a person may choose at the top.

    Attributes:
        name: of it; those that begin with sidecar or engine select only the metrics of these.
        label: as it is shown, and the label of the series.
        metric: whose values there are.
    """

    name: str
    shown: str
    label: str
    metric: str


SIDECAR_JOB = Variable("sidecar_job", "Sidecar job", "job", "kvist_uptime_seconds")
SIDECAR = Variable("sidecar", "Sidecar", "instance", "kvist_uptime_seconds")
ENGINE_JOB = Variable("engine_job", "Engine job", "job", "vllm:num_requests_running")
ENGINE = Variable("engine", "Engine", "instance", "vllm:num_requests_running")
MODEL = Variable("model", "Model", "model_name", "vllm:num_requests_running")
NAMESPACE = Variable("namespace", "Namespace", "namespace", "kvist_tenant_lookups_total")
TENANT = Variable("tenant", "Tenant", "tenant", "kvist_tenant_lookups_total")
TIER = Variable("tier", "Tier", "tier", "kvist_hit_tokens_total")


@dataclass(frozen=True, slots=True)
class Board:
    """One page of Grafana.

    Attributes:
        uid: stable, so that a newer one replaces it; also the stem of its file.
        text: what it is for, one sentence.
        variables: in this order; each shows the values that fit those before it.
        rows: title -> panels, in reading order.
    """

    uid: str
    title: str
    text: str
    variables: Sequence[Variable]
    rows: Mapping[str, Sequence[Panel]]


def as_json(board: Board) -> Json:
    """The board as Grafana imports it."""
    return {
        "uid": board.uid,
        "title": f"Kvist: {board.title}",
        "description": board.text,
        "tags": ["kvist"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "timezone": "browser",
        "time": {"from": "now-3h", "to": "now"},
        "timepicker": {"refresh_intervals": ["5s", "30s", "1m", "5m", "15m"]},
        "links": [
            {
                "type": "dashboards",
                "title": "Kvist",
                "tags": ["kvist"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
            }
        ],
        "annotations": {"list": [_restarts(board)]},
        "templating": {"list": _variables(board)},
        "panels": _panels(board),
    }


def _selectors(variables: Sequence[Variable]) -> dict[str, str]:
    return {one.name: one.label for one in variables}


def _restarts(board: Board) -> Json:
    expression = selected("kvist_uptime_seconds < 60", _selectors(board.variables))
    return {
        "name": "Sidecar started",
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "purple",
        "expr": expression,
        "step": "60s",
        "titleFormat": "sidecar {{instance}} started",
        "useValueForTime": False,
    }


def _variables(board: Board) -> list[Json]:
    source: Json = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "refresh": 1,
        "options": [],
    }
    made = [source]
    for at, one in enumerate(board.variables):
        before = _selectors(board.variables[:at])
        query = f"label_values({selected(one.metric, before)}, {one.label})"
        made.append(
            {
                "name": one.name,
                "label": one.shown,
                "type": "query",
                "datasource": SOURCE,
                "definition": query,
                "query": {"query": query, "refId": f"variable-{one.name}"},
                "hide": 0,
                "includeAll": True,
                "allValue": ".+",
                "multi": True,
                "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
                "refresh": 2,
                "sort": 1,
                "options": [],
            }
        )
    return made


def _panels(board: Board) -> list[Json]:
    made: list[Json] = []
    top = 0
    for title, panels in board.rows.items():
        spot = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        made.append({"type": "row", "title": title, "collapsed": False, "gridPos": spot})
        made[-1] |= {"id": len(made), "panels": []}
        top, left, tallest = top + 1, 0, 0
        for panel in panels:
            if left + panel.width > WIDTH:
                top, left, tallest = top + tallest, 0, 0
            spot = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            made.append(_panel(panel, board) | {"id": len(made) + 1, "gridPos": spot})
            left, tallest = left + panel.width, max(tallest, panel.height)
        top += tallest
    return made


def _panel(panel: Panel, board: Board) -> Json:
    if panel.kind == "text":
        options = {"mode": "markdown", "content": panel.text}
        return {"type": "text", "title": panel.title, "options": options}
    kind, options = _SHAPES[panel.kind]
    text = "\n".join([panel.text, "", *meanings(iter(panel.queries.values()))])
    made: Json = {
        "type": kind,
        "title": panel.title,
        "description": text,
        "datasource": SOURCE,
        "targets": _targets(panel, _selectors(board.variables)),
        "fieldConfig": {"defaults": _defaults(panel), "overrides": _overrides(panel)},
        "options": options,
    }
    if panel.kind == "heat":
        made["options"] = options | {"yAxis": {"unit": panel.unit}}
    if panel.kind == "table":
        made["transformations"] = _merged(panel)
    return made


def _targets(panel: Panel, variables: Mapping[str, str]) -> list[Json]:
    instant = panel.kind in ("stat", "bars", "table")
    shape = {"heat": "heatmap", "table": "table"}.get(panel.kind, "time_series")
    return [
        {
            "refId": chr(ord("A") + at),
            "datasource": SOURCE,
            "expr": selected(query, variables),
            "legendFormat": "{{le}}" if panel.kind == "heat" else legend,
            "format": shape,
            "instant": instant,
            "range": not instant,
            "editorMode": "code",
        }
        for at, (legend, query) in enumerate(panel.queries.items())
    ]


def _defaults(panel: Panel) -> Json:
    steps = [{"value": value, "color": colour} for value, colour in panel.steps]
    made: Json = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "palette-classic"},
        "mappings": [],
    }
    if panel.low is not None and panel.kind != "stat":
        made["min"] = panel.low
    if panel.high is not None:
        made["max"] = panel.high
    if panel.kind in ("stat", "bars", "states"):
        made["color"] = {"mode": "thresholds"}
    if panel.kind == "states":
        names = {
            str(number): {"text": name, "color": colour, "index": at}
            for at, (number, (name, colour)) in enumerate(panel.names.items())
        }
        made["mappings"] = [{"type": "value", "options": names}]
        made["custom"] = {"fillOpacity": 70, "lineWidth": 0}
    if panel.kind in ("lines", "stack", "share"):
        stacked = panel.kind != "lines"
        made["custom"] = {
            "drawStyle": "line",
            "lineInterpolation": "linear",
            "lineWidth": 1,
            "fillOpacity": 40 if stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "line" if len(panel.steps) > 1 else "off"},
        }
    return made


def _overrides(panel: Panel) -> list[Json]:
    if panel.kind == "table":
        return [
            {
                "matcher": {"id": "byName", "options": column},
                "properties": [{"id": "unit", "value": unit}],
            }
            for column, unit in panel.names.items()
        ]
    if panel.kind not in ("lines", "stack", "share"):
        return []
    names = {*panel.queries, *(_TIERS if "{{tier}}" in panel.queries else ())}
    return [
        {
            "matcher": {"id": "byName", "options": name},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
        }
        for name, colour in COLOURS.items()
        if name in names
    ]


def _merged(panel: Panel) -> list[Json]:
    columns = {f"Value #{chr(ord('A') + at)}": name for at, name in enumerate(panel.queries)}
    tidy = {"excludeByName": {"Time": True}, "renameByName": columns}
    return [{"id": "merge", "options": {}}, {"id": "organize", "options": tidy}]


_LATEST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OVER_TIME: Json = {
    "legend": {
        "showLegend": True,
        "displayMode": "table",
        "placement": "bottom",
        "calcs": ["mean", "max", "lastNotNull"],
    },
    "tooltip": {"mode": "multi", "sort": "desc"},
}
_SHAPES: Mapping[str, tuple[str, Json]] = {
    "stat": (
        "stat",
        {
            "reduceOptions": _LATEST,
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "textMode": "auto",
            "orientation": "auto",
        },
    ),
    "lines": ("timeseries", _OVER_TIME),
    "stack": ("timeseries", _OVER_TIME),
    "share": ("timeseries", _OVER_TIME),
    "bars": (
        "bargauge",
        {
            "reduceOptions": _LATEST,
            "orientation": "horizontal",
            "displayMode": "basic",
            "valueMode": "text",
            "showUnfilled": True,
        },
    ),
    "heat": (
        "heatmap",
        {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "legend": {"show": True},
            "tooltip": {"show": True, "yHistogram": False},
            "filterValues": {"le": 1e-9},
        },
    ),
    "table": (
        "table",
        {
            "showHeader": True,
            "cellHeight": "sm",
            "footer": {"show": False, "reducer": ["sum"], "countRows": False, "fields": ""},
        },
    ),
    "states": (
        "state-timeline",
        {
            "mergeValues": True,
            "showValue": "auto",
            "rowHeight": 0.8,
            "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "single", "sort": "none"},
        },
    ),
}
