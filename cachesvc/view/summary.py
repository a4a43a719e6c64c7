"""The summary: what the last minute, the last hour and all since the start came to; the health.

What the sidecar is worth is that of its own tiers, as core/accounts.worth_s defines it: hits in HBM
would be there without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from kvist.cachesvc.core.accounts import worth_s
from kvist.cachesvc.core.report import StoreStats
from kvist.cachesvc.view.advice import RECENT_S, Seen, advise, in_words
from kvist.cachesvc.view.history import History, Span, sample
from kvist.proto.shm import MISS_REASONS, MOVED_TIERS, TIERS

SPANS_S: Mapping[str, float] = {"minute": 60.0, "hour": 3600.0}


def summary(stats: StoreStats, history: History) -> dict[str, Any]:
    """What /stats.json and the page say beyond the figures themselves.

    Returns:
        spans: by "minute", "hour" and "start": seconds, requested, hit_tokens, miss_tokens, and of
            the sidecar's tiers saved_tokens, saved_s, load_s, store_s and net_s.
        ttft: by tier that the cached tokens came from mostly, "none" for few or none: requests,
            mean_s since the start, exact; without those that nobody measured. (The buckets of the
            histogram are too wide for a median: one request of 2.5 s showed as 1.75 s.)
        health: in words; advice: see advice.Advice.
    """
    life = Span(stats.uptime_s, sample(stats))
    spans = {name: history.span(seconds) for name, seconds in SPANS_S.items()} | {"start": life}
    told = {name: _told(span) for name, span in spans.items()}
    advice = advise(Seen(stats, history.span(RECENT_S), life, told["start"]["net_s"]))
    return {
        "spans": told,
        "ttft": list(_ttft(stats)),
        "health": in_words(advice),
        "advice": [asdict(each) for each in advice],
    }


def _told(span: Span) -> dict[str, Any]:
    hits = {tier: round(span.change[f"hit_tokens.{tier}"]) for tier in TIERS}
    misses = {why: round(span.change[f"miss_tokens.{why}"]) for why in MISS_REASONS}
    saved_s, load_s, store_s = (
        sum(span.change[f"{what}_s.{tier}"] for tier in MOVED_TIERS)
        for what in ("saved", "load", "store")
    )
    return {
        "seconds": round(span.seconds, 1),
        "requested": sum(hits.values()) + sum(misses.values()),
        "hit_tokens": hits,
        "miss_tokens": misses,
        "saved_tokens": sum(hits[tier] for tier in MOVED_TIERS),
        "saved_s": round(saved_s, 6),
        "load_s": round(load_s, 6),
        "store_s": round(store_s, 6),
        "net_s": round(worth_s(saved_s, load_s, store_s), 6),
    }


def _ttft(stats: StoreStats) -> Iterator[dict[str, Any]]:
    for shown in stats.histograms:
        requests = sum(shown.counts)
        if shown.name == "ttft_seconds" and requests:
            yield {
                "tier": shown.labels["tier"],
                "requests": requests,
                "mean_s": round(shown.sum / requests, 6),
            }
