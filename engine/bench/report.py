"""What a person reads of a run: a table in the shape of vLLM's, and the file that scripts read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from kvist.engine.bench.summary import METRICS
from kvist.proto.errors import ConfigInvalid

COLUMNS = 50
TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
SHORT = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}


def table(figures: Mapping[str, Any]) -> str:
    """All lines of a run's report."""
    lines = [" Serving Benchmark Result ".center(COLUMNS, "=")]
    lines += [_row(label, value) for label, value in _head(figures)]
    cached = list(_cached(figures))
    if cached:
        lines.append("Prompt Tokens by Origin".center(COLUMNS, "-"))
        lines += [_row(label, value) for label, value in cached]
    for name in METRICS:
        rows = list(_metric(figures, name))
        if rows:
            lines.append(TITLES[name].center(COLUMNS, "-"))
            lines += [_row(label, value) for label, value in rows]
    lines.append("=" * COLUMNS)
    lines += [f"{count} x {text}" for text, count in figures["errors"].items()]
    return "\n".join(lines)


def _row(label: str, value: float) -> str:
    shown = f"{value:<10}" if isinstance(value, int) else f"{value:<10.2f}"
    return f"{label + ':':<40} {shown}"


def _head(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    yield "Successful requests", figures["completed"]
    yield "Failed requests", figures["failed"]
    if figures["interrupted"]:
        yield "Interrupted requests", figures["interrupted"]
    if figures["max_concurrency"] is not None:
        yield "Maximum request concurrency", figures["max_concurrency"]
    rate = figures["request_rate"]
    if isinstance(rate, float) and math.isfinite(rate):
        yield "Request rate configured (RPS)", rate
    yield "Benchmark duration (s)", figures["duration"]
    yield "Total input tokens", figures["total_input_tokens"]
    yield "Total generated tokens", figures["total_output_tokens"]
    yield "Request throughput (req/s)", figures["request_throughput"]
    if figures["request_goodput"] is not None:
        yield "Request goodput (req/s)", figures["request_goodput"]
    yield "Output token throughput (tok/s)", figures["output_throughput"]
    yield "Peak output token throughput (tok/s)", figures["max_output_tokens_per_s"]
    yield "Peak concurrent requests", figures["max_concurrent_requests"]
    yield "Total token throughput (tok/s)", figures["total_token_throughput"]
    if "mean_send_delay_ms" in figures:
        yield "Mean delay until sent (ms)", figures["mean_send_delay_ms"]


def _cached(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    tiers = figures["cached_tokens_by_tier"]
    if tiers is None:
        return
    yield "Computed", figures["computed_tokens"]
    for tier, tokens in tiers.items():
        yield "Cached" if tier == "any" else f"Cached in {tier}", tokens
    total = figures["computed_tokens"] + figures["cached_tokens"]
    if total:
        yield "Cached (%)", 100.0 * figures["cached_tokens"] / total


def _metric(figures: Mapping[str, Any], name: str) -> Iterator[tuple[str, float]]:
    for key, value in figures.items():
        kind, _, rest = key.partition("_")
        if rest == f"{name}_ms":
            label = kind.upper() if kind[0] == "p" else kind.capitalize()
            yield f"{label} {SHORT[name]} (ms)", value


def result_path(folder: str | None, name: str | None, figures: Mapping[str, Any]) -> Path:
    """Where a result goes: as told, else named by backend, rate, concurrency, model and time."""
    if name is None:
        limit = figures["max_concurrency"]
        model = str(figures["model_id"]).rsplit("/", maxsplit=1)[-1]
        parts = [str(figures["backend"]), f"{figures['request_rate']}qps"]
        parts += [] if limit is None else [f"concurrency{limit}"]
        name = "-".join([*parts, model, str(figures["date"])]) + ".json"
    return Path(folder or ".") / name


def save(path: Path, text: str, append: bool = False) -> None:
    """Write a file, or with append to its end.

    Raises:
        ConfigInvalid: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigInvalid(f"--result-filename: {path}: {error.strerror}") from None


def as_json(figures: Mapping[str, Any]) -> str:
    """One line; infinities, which JSON does not have, as text."""
    return json.dumps({key: _plain(value) for key, value in figures.items()}, allow_nan=False)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def stamp(now: datetime) -> str:
    """A time as in the names of results."""
    return now.strftime("%Y%m%d-%H%M%S")
