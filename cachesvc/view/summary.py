"""The summary: what the last minute, the last hour and all since the start came to; the health.

Worth it: tokens that came from the sidecar's tiers were not computed. What that saved is their
number divided by the rate at which the workers were measured to compute prompts; what it cost is
the bytes that were loaded and stored divided by the rates at which they were measured to move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kvist.cachesvc.core.report import StoreStats
from kvist.cachesvc.view.advice import RECENT_S, Seen, advise, in_words
from kvist.cachesvc.view.history import HELD, History, Span, sample

SPANS_S: Mapping[str, float] = {"minute": 60.0, "hour": 3600.0}


def summary(stats: StoreStats, history: History) -> dict[str, Any]:
    """What /stats.json and the page say beyond the figures themselves.

    Returns:
        spans: by "minute", "hour" and "start": seconds, requested, hit_tokens, miss_tokens,
            prefill_saved_s, moving_s; the last two are None until a worker has measured.
        health: in words; advice: see advice.Advice.
    """
    life = Span(stats.uptime_s, sample(stats))
    spans = {name: history.span(seconds) for name, seconds in SPANS_S.items()} | {"start": life}
    told = {name: _told(span, stats) for name, span in spans.items()}
    start = told["start"]
    saved = None if start["moving_s"] is None else start["prefill_saved_s"] - start["moving_s"]
    advice = advise(Seen(stats, history.span(RECENT_S), life, saved))
    return {
        "spans": told,
        "health": in_words(advice),
        "advice": [asdict(each) for each in advice],
    }


def _told(span: Span, stats: StoreStats) -> dict[str, Any]:
    hits = {tier: round(span.change[f"hit_tokens.{tier}"]) for tier in stats.hit_tokens}
    misses = {why: round(span.change[f"miss_tokens.{why}"]) for why in stats.miss_tokens}
    return {
        "seconds": round(span.seconds, 1),
        "requested": sum(hits.values()) + sum(misses.values()),
        "hit_tokens": hits,
        "miss_tokens": misses,
        "prefill_saved_s": _per(
            sum(hits[tier] for tier in HELD), _rate(stats, "prefill_tokens_per_s.2048")
        ),
        "moving_s": _moving_s(span, stats),
    }


def _moving_s(span: Span, stats: StoreStats) -> float | None:
    loading = _per(span.change["loaded_bytes"], _rate(stats, "load_bytes_per_s.dram"))
    storing = _per(span.change["stored_bytes"], _rate(stats, "store_bytes_per_s.dram"))
    return None if loading is None or storing is None else loading + storing


def _rate(stats: StoreStats, name: str) -> float:
    """Mean of what the workers measured; 0 when none has."""
    rates = [worker.rates[name] for worker in stats.workers if name in worker.rates]
    return sum(rates) / len(rates) if rates else 0.0


def _per(amount: float, rate: float) -> float | None:
    if not amount:
        return 0.0
    return amount / rate if rate else None
