"""Kvist under vLLM: the connector that --kv-transfer-config names.

Only connector.py, plan.py and metrics.py need vLLM, and they are imported when the connector is
asked for; the rest is tested without it.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "KvistConnector":
        raise AttributeError(f"{__name__} has no {name}; kv_connector is KvistConnector")
    from kvist.engine.plugins.vllm.connector import KvistConnector

    return KvistConnector
