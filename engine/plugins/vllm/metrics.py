"""Kvist's numbers in vLLM's /metrics and in its log lines."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

COUNTERS = {
    "hit_tokens": ("tier", "Prompt tokens that were not computed; hbm is vLLM's own cache."),
    "miss_tokens": ("reason", "Prompt tokens that were computed, by reason."),
    "unnamed_requests": ("reason", "Requests that can be neither looked up nor stored."),
    "rise_waits": ("", "Requests put off while their blocks rose from flash."),
    "rise_wait_seconds": ("", "Summed over these requests."),
    "load_blocks": ("", "Blocks brought into vLLM's memory, verified."),
    "load_bytes": ("", "Bytes of these blocks."),
    "load_seconds": ("", "Summed over loads, from the step they began in."),
    "load_failures": ("reason", "Loads that ended early; the rest was computed."),
    "save_blocks": ("", "Blocks stored."),
    "save_bytes": ("", "Bytes of these blocks."),
    "save_seconds": ("", "Summed over batches of them, from reserving to committing."),
    "save_present": ("", "Blocks that were there already."),
    "save_drops": ("reason", "Blocks that were not stored."),
}
"""name -> (label, meaning). In a count, a label's value stands behind a dot: hit_tokens.dram."""

PREFIX = "vllm:kvist_"


class KvistStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since the last time; data is one flat mapping of count -> number."""

    def reset(self) -> None:
        """See KVConnectorStats."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KvistStats:
        """See KVConnectorStats."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """See KVConnectorStats."""
        return {f"kvist {name}": round(count, 3) for name, count in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """See KVConnectorStats."""
        return not self.data


class KvistPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The counters of COUNTERS, one child per engine and label."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=f"{PREFIX}{name}",
                documentation=meaning,
                labelnames=[*labelnames, *([label] if label else [])],
            )
            for name, (label, meaning) in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """See KVConnectorPromMetrics."""
        for count, number in transfer_stats_data.items():
            name, dot, value = count.partition(".")
            labels = [*self.per_engine_labelvalues[engine_idx], *([value] if dot else [])]
            child: Counter = self._counters[name].labels(*labels)
            child.inc(number)
