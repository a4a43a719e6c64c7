"""Kvist under SGLang: the storage that --hicache-storage-backend dynamic names.

Only storage.py needs SGLang, and it is imported when the storage is asked for; the rest is tested
without it.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "KvistStorage":
        raise AttributeError(f"{__name__} has no {name}; class_name is KvistStorage")
    from kvist.engine.plugins.sglang.storage import KvistStorage

    return KvistStorage
