"""What a metric is, and how a list of definitions becomes what Prometheus reads.

A program has one list of definitions; /metrics, docs/metrics.md and the dashboards are made from
it, so a figure has one name and one meaning. A definition says where its figure stands, as a path
into the program's figures:

    sessions                                   an attribute, or a key of a mapping
    hit_tokens[tier]                           each value of a mapping, whose key is the label tier
    tiers[tier].slots                          each item of a sequence, whose own tier is the label
    tenants[namespace,tenant].hit_tokens[tier] and so on

What is None has no sample, a key that a mapping lacks is 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from kvist.proto.histograms import Shown

Kind = Literal["counter", "gauge", "histogram", "states", "info"]
Unit = Literal["", "tokens", "blocks", "bytes", "seconds", "ratio", "requests", "slots"]
Labels = tuple[str, ...]

_STEP = re.compile(r"(\w*)((?:\[[\w,]+\])*)")


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric.

    Attributes:
        name: as Prometheus shows it, "_total" included.
        kind: counter, gauge, histogram; states: a gauge that is 1 for the state that holds; info: a
            gauge of 1 whose label is the figure.
        unit: of a value.
        text: what it means, one sentence.
        figure: path, see the top of the file. Of a histogram the name of the Shown.
        labels: names, in the order in which the path names them.
        keys: of the last mapping of the path, those to show -> the label's value; none is all.
        states: of kind states, all there are.
    """

    name: str
    kind: Kind
    unit: Unit
    text: str
    figure: str
    labels: Labels = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    states: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A value, or a histogram, with the values of its labels."""

    labels: Labels
    value: float | Shown


def samples(definition: Definition, figures: Mapping[str, Any]) -> Iterator[Sample]:
    """What a definition shows of the figures of a moment."""
    if definition.kind == "histogram":
        for shown in figures["histograms"]:
            if shown.name == definition.figure:
                labels = tuple(shown.labels[name] for name in definition.labels)
                yield Sample(labels, shown)
        return
    for labels, value in _walk([((), figures)], definition):
        if definition.kind == "states":
            for state in definition.states:
                yield Sample((*labels, state), float(value == state))
        elif definition.kind == "info":
            yield Sample((*labels, _word(value)), 1.0)
        else:
            yield Sample(labels, value)


@cache
def _steps(figure: str) -> tuple[tuple[str, tuple[Labels, ...]], ...]:
    """A path's names, each with the labels in brackets behind it."""
    steps = []
    for step in figure.split("."):
        match = _STEP.fullmatch(step)
        assert match is not None, figure
        brackets = tuple(tuple(names.split(",")) for names in re.findall(r"[\w,]+", match[2]))
        steps.append((match[1], brackets))
    return tuple(steps)


def _walk(found: list[tuple[Labels, Any]], definition: Definition) -> Iterable[tuple[Labels, Any]]:
    for name, brackets in _steps(definition.figure):
        if name:
            found = [(labels, _get(value, name)) for labels, value in found]
        for names in brackets:
            found = [one for each in found for one in _each(each, names, definition)]
        found = [(labels, value) for labels, value in found if value is not None]
    return found


def _get(value: Any, name: str) -> Any:
    return value.get(name, 0) if isinstance(value, Mapping) else getattr(value, name)


def _each(
    found: tuple[Labels, Any], names: Sequence[str], definition: Definition
) -> Iterator[tuple[Labels, Any]]:
    labels, value = found
    if isinstance(value, Mapping):
        is_last = len(labels) + 1 == len(definition.labels)
        keys = definition.keys if is_last and definition.keys else {key: key for key in value}
        for key, label in keys.items():
            yield (*labels, label), value.get(key, 0)
    else:
        for item in value:
            yield (*labels, *(_word(getattr(item, name)) for name in names)), item


def _word(value: Any) -> str:
    """A label's value."""
    if isinstance(value, bytes):
        return value.hex()
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_table(definitions: Iterable[Definition]) -> list[str]:
    """Lines of a Markdown table, for people."""
    lines = ["| metric | kind | labels | meaning | figure |", "|---|---|---|---|---|"]
    for one in definitions:
        labels = ", ".join(f"`{name}`" for name in all_labels(one)) or "-"
        figure = f"histograms, `{one.figure}`" if one.kind == "histogram" else f"`{one.figure}`"
        if one.keys:
            figure += f" ({', '.join(one.keys)})"
        kind = "gauge" if one.kind in ("states", "info") else one.kind
        lines.append(f"| `{one.name}` | {kind} | {labels} | {one.text} | {figure} |")
    return lines


def all_labels(definition: Definition) -> Labels:
    """Names of all labels of a metric, that of a state or of an information included."""
    if definition.kind == "states":
        return (*definition.labels, "state")
    if definition.kind == "info":
        return (*definition.labels, definition.figure.rpartition(".")[2])
    return definition.labels
