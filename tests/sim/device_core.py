"""An engine on a device for a test: in Triton's interpreter, or on a GPU, behind the real wire."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

from kvist.cachesvc.log import Log
from kvist.engine.config import EngineConfig
from kvist.engine.opening import open_parts
from sim.core_thread import CoreThread
from sim.device import DEVICE

BLOCK_TOKENS = 8
WHERE = "interpreter" if DEVICE.type == "cpu" else "cuda"


class DeviceCores:
    """Starts cores that the interpreter can bear, and ends them.

    Args:
        model: folder of a tiny model.
        folder: for their sockets.
    """

    def __init__(self, model: str, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._running: list[CoreThread] = []

    def __call__(self, **more: Any) -> CoreThread:
        """A core that is ready.

        Args:
            more: fields of EngineConfig.
        """
        folder = self._folder / f"core-{len(self._running)}"
        folder.mkdir()
        chosen = {
            "device": WHERE,
            "dtype": "float32",
            "block_tokens": BLOCK_TOKENS,
            "max_model_len": 64,
            "max_num_batched_tokens": 24,
            "max_num_seqs": 4,
            "kv_cache_bytes": 1 << 20,
            "cache": "off",
            **more,
        }
        log = Log(io.StringIO())
        parts = open_parts(EngineConfig(model=self._model, **chosen), log, time.monotonic)
        core = CoreThread(folder, parts, **chosen)
        self._running.append(core)
        return core.start()

    def stop(self) -> None:
        """End all; those that have ended are left alone."""
        for core in self._running:
            core.stop()
