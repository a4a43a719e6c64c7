"""What happened when, drawn: a row for each request, in a page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from kvist.engine.bench.client import Outcome
from kvist.proto.errors import ConfigInvalid

WIDTH = 1200
ROW_MAX, ROW_MIN, HEIGHT = 14, 3, 6000
WAITS, FIRST, FAILED = "#bbbbbb", "#636efa", "#000000"
GAPS = ("#109618", "#ff7f0e", "#d62728")

Part = tuple[float, float, str]
"""From, to (seconds), colour."""


def parse_thresholds(text: str) -> tuple[float, float]:
    """Milliseconds between the colours of inter-token latency.

    Raises:
        ConfigInvalid: they are not two numbers, the lower one first.
    """
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 < low <= high < math.inf:
        raise ConfigInvalid(
            f"--timeline-itl-thresholds: {text!r}; give two numbers of milliseconds, like 25,50"
        )
    return low, high


def timeline(outcomes: Sequence[Outcome], thresholds_ms: tuple[float, float]) -> str:
    """An HTML page with one SVG picture.

    Args:
        outcomes: of a run, in the order in which they were due.
        thresholds_ms: see parse_thresholds.
    """
    low, high = thresholds_ms
    row = min(ROW_MAX, max(ROW_MIN, HEIGHT // max(1, len(outcomes))))
    ends = [max(each.end_s, each.due_s) for each in outcomes]
    scale = WIDTH / max(1e-3, *ends, 0.0)
    legend = [
        (WAITS, "not sent yet"),
        (FIRST, "to the first token"),
        (GAPS[0], f"ITL < {low:g} ms"),
        (GAPS[1], f"{low:g} ms ≤ ITL < {high:g} ms"),
        (GAPS[2], f"ITL ≥ {high:g} ms"),
        (FAILED, "failed or broken off"),
    ]
    lines = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Requests over time</title>',
        "<style>body{font:14px sans-serif;margin:24px}i{display:inline-block;width:12px;"
        "height:12px;margin:0 6px 0 18px}text{font:11px sans-serif}</style>",
        f"<h1>{len(outcomes)} requests over time</h1><p>",
        *(f'<i style="background:{colour}"></i>{html.escape(text)}' for colour, text in legend),
        f'</p><svg width="{WIDTH + 60}" height="{len(outcomes) * row + 40}">',
        *_axis(max(ends, default=0.0), scale, len(outcomes) * row),
    ]
    for number, outcome in enumerate(outcomes):
        lines.append(f"<g><title>{html.escape(_about(number, outcome))}</title>")
        lines += [
            f'<rect x="{begin * scale:.1f}" y="{20 + number * row}" height="{row - 1}" '
            f'width="{max(0.5, (end - begin) * scale):.1f}" fill="{colour}"/>'
            for begin, end, colour in parts_of(outcome, thresholds_ms)
        ]
        lines.append("</g>")
    return "\n".join([*lines, "</svg></html>\n"])


def parts_of(outcome: Outcome, thresholds_ms: tuple[float, float]) -> list[Part]:
    """What a request's row is made of; gaps of one colour that follow each other are one part."""
    sent_s = outcome.due_s if outcome.sent_s is None else outcome.sent_s
    parts: list[Part] = [(outcome.due_s, sent_s, WAITS)] if sent_s > outcome.due_s else []
    if outcome.chunk_s:
        parts.append((sent_s, outcome.chunk_s[0], FIRST))
    for before, after in pairwise(outcome.chunk_s):
        gap_ms = 1e3 * (after - before)
        colour = GAPS[sum(gap_ms >= limit for limit in thresholds_ms)]
        if parts[-1][2] == colour:
            before, parts = parts[-1][0], parts[:-1]
        parts.append((before, after, colour))
    if not outcome.good:
        last = parts[-1][1] if parts else sent_s
        parts.append((last, max(last, outcome.end_s), FAILED))
    return parts


def _about(number: int, outcome: Outcome) -> str:
    words = [f"request {number}, due at {outcome.due_s:.3f} s"]
    if outcome.sent_s is not None and outcome.chunk_s:
        words.append(f"first token after {1e3 * (outcome.chunk_s[0] - outcome.sent_s):.1f} ms")
        words.append(f"ended after {1e3 * (outcome.end_s - outcome.sent_s):.1f} ms")
    words.append(f"{outcome.prompt_tokens} + {outcome.output_tokens} tokens")
    return "\n".join([*words, *([outcome.error] if outcome.error else [])])


def _axis(seconds: float, scale: float, height: int) -> Iterator[str]:
    """A line at every round number of seconds, at most ten."""
    step = 10.0 ** math.ceil(math.log10(max(seconds, 1e-3) / 10))
    step = next(s for s in (step / 5, step / 2, step) if seconds / s <= 10)
    for number in range(int(seconds / step) + 1):
        x = number * step * scale
        yield f'<text x="{x:.1f}" y="12">{number * step:g} s</text>'
        yield f'<path d="M{x:.1f} 16V{20 + height}" stroke="#dddddd"/>'
