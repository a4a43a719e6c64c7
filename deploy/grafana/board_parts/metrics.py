"""Queries that know the metrics: names are checked, and selectors follow from the labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from kvist.cachesvc.view import definitions as sidecar
from kvist.engine import definitions as engine
from kvist.proto.metrics import Definition, all_labels

SIDECAR: Mapping[str, Definition] = {one.name: one for one in sidecar.DEFINITIONS}
ENGINE: Mapping[str, Definition] = {one.name: one for one in engine.DEFINITIONS}
# engine/stats.py: labels that vLLM's names have besides their own.
VLLM_LABELS = ("engine", "model_name")

_METRIC = re.compile(r"(?<![\w:])((?:kvist_|vllm:)\w+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!=|!~|=)")
_SUFFIXES = ("_bucket", "_sum", "_count")
_WINDOWS = {"[W]": "[$__rate_interval]", "[RANGE]": "[$__range]"}


class NoSuchMetric(Exception):
    """A query names a metric that is in neither list."""


def definition_of(series: str) -> Definition:
    """The metric that a series is of: itself, or the histogram that has it.

    Raises: NoSuchMetric: there is none of that name.
    """
    known = {**SIDECAR, **ENGINE}
    found = known.get(series)
    if found is not None and found.kind != "histogram":
        return found
    for suffix in _SUFFIXES:
        histogram = known.get(series.removesuffix(suffix))
        if series.endswith(suffix) and histogram is not None and histogram.kind == "histogram":
            return histogram
    raise NoSuchMetric(series)


def labels_of(definition: Definition) -> tuple[str, ...]:
    """Its labels, with those that Prometheus gives every series it scrapes."""
    own = all_labels(definition)
    vllm = VLLM_LABELS if definition.name.startswith("vllm:") else ()
    return ("job", "instance", *vllm, *own)


def named(expression: str) -> Iterator[tuple[str, Definition]]:
    """Series that a query names, each with its metric.

    Raises: NoSuchMetric: see definition_of.
    """
    for match in _METRIC.finditer(expression):
        yield match[1], definition_of(match[1])


def selected(expression: str, variables: Mapping[str, str]) -> str:
    """A query as Grafana gets it: every series with the selectors of the board's variables.

    Args:
        expression: PromQL without them. [W] is the window of rates, [RANGE] the board's range.
        variables: name of a variable -> the label that it selects by. Those that begin with
            `sidecar` and `engine` are for the metrics of these; a label that the query itself
            selects by is left to it.
    """

    def put(match: re.Match[str]) -> str:
        definition, own = definition_of(match[1]), match[2] or ""
        said = set(_LABEL.findall(own))
        other = "engine" if definition.name in SIDECAR else "sidecar"
        chosen = [
            f'{label}=~"${name}"'
            for name, label in variables.items()
            if label in labels_of(definition) and label not in said and not name.startswith(other)
        ]
        inside = ", ".join([*chosen, *([own] if own else [])])
        return f"{match[1]}{{{inside}}}" if inside else match[1]

    for short, long in _WINDOWS.items():
        expression = expression.replace(short, long)
    return _METRIC.sub(put, expression)


def meanings(expressions: Iterator[str]) -> list[str]:
    """A line of Markdown for each metric that the queries name, in that order."""
    seen = {
        definition.name: definition.text
        for expression in expressions
        for _, definition in named(expression)
    }
    return [f"* `{name}`: {text}" for name, text in seen.items()]


def quantile(share: float, histogram: str, by: str = "") -> str:
    """The value under which a share of what a histogram counted lies, for each of `by`."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({histogram}_bucket[W])))"


def quantiles(histogram: str, by: str = "") -> dict[str, str]:
    """Legend -> median and tail."""
    behind = f" {{{{{by}}}}}" if by else ""
    return {
        f"p{100 * share:.0f}{behind}": quantile(share, histogram, by) for share in (0.5, 0.9, 0.99)
    }


def mean(histogram: str, by: str = "") -> str:
    """The mean of what a histogram counted, for each of `by`."""
    over = f"sum by ({by})" if by else "sum"
    return f"{over} (rate({histogram}_sum[W])) / {over} (rate({histogram}_count[W]))"


def heat(histogram: str) -> dict[str, str]:
    """The counts of its buckets."""
    return {"{{le}}": f"sum by (le) (increase({histogram}_bucket[W]))"}
