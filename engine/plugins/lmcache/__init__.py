"""Kvist under LMCache's server: the L2 adapter that --l2-adapter '{"type": "plugin", ...}' names.

Only adapter.py needs LMCache, and it is imported when the adapter is asked for; the rest is tested
without it.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "KvistL2Adapter":
        raise AttributeError(f"{__name__} has no {name}; class_name is KvistL2Adapter")
    from kvist.engine.plugins.lmcache.adapter import KvistL2Adapter

    return KvistL2Adapter
