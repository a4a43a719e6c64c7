"""A sidecar and engines for one test, and the figures that they publish."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from kvist.engine.local import Answer, LocalEngine, LocalProcess, LocalSidecar, ask


def metrics(process: LocalProcess) -> dict[str, float]:
    """Every sample of /metrics: "name" or "name{label=value,...}" -> value."""
    text = httpx.get(f"{process.url}/metrics", timeout=5.0).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(
                f"{key}={value}"
                for key, value in sorted(sample.labels.items())
                if key not in ("model_name", "engine")
            )
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def wait_until(ready: Callable[[], bool], what: str, timeout_s: float = 20.0) -> float:
    """Poll until ready; returns the seconds it took, fails the test after timeout_s."""
    started = time.monotonic()
    while not ready():
        assert time.monotonic() - started < timeout_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)
    return time.monotonic() - started


def attached(engine: LocalEngine) -> bool:
    """The engine says that it reaches its cache."""
    return metrics(engine).get("kvist_engine_cache_attached") == 1.0


def slots(sidecar: LocalSidecar, tier: str) -> int:
    """Blocks that a tier of the sidecar holds."""
    return sum(row["used_slots"] for row in sidecar.stats()["tiers"] if row["tier"] == tier)


def settled(sidecar: LocalSidecar) -> bool:
    """Nothing is being stored, and what is in DRAM is on flash too."""
    return sidecar.stats()["reserved_slots"] == 0 and (
        slots(sidecar, "flash") >= slots(sidecar, "dram") > 0
    )


class Cluster:
    """Child processes under one folder; all of them end with the test."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.model = model
        self.processes: list[LocalProcess] = []

    def sidecar(self, **settings: str) -> LocalSidecar:
        """Start a sidecar; its folder is the same each time, so a second one finds the flash."""
        sizes = {"dram_bytes": "256MiB", "flash_bytes": "512MiB"}
        sidecar = LocalSidecar(self.folder / "sidecar", {**sizes, **settings})
        self.processes.append(sidecar)
        sidecar.start()
        sidecar.wait_ready()
        return sidecar

    def engine(self, name: str, cache: str, *flags: str) -> LocalEngine:
        """Start an engine and wait until it serves and reaches its cache."""
        base = ["--cache", cache, "--threads", "1", "--kv-cache-memory-bytes", "256MiB"]
        base += ["--served-model-name", "m", "--cache-flash-bytes", "512MiB"]
        engine = LocalEngine(self.model, self.folder / f"{name}.log", [*base, *flags])
        self.processes.append(engine)
        engine.start()
        self.ready(engine, cache)
        return engine

    @staticmethod
    def ready(engine: LocalEngine, cache: str = "on") -> None:
        """Wait until the engine serves and, unless the cache is off, has attached."""
        engine.wait_ready()
        if cache != "off":
            wait_until(lambda: attached(engine), "the engine to attach")

    @staticmethod
    def restart(process: LocalProcess) -> None:
        """Stop it and start it again on the same port and folder."""
        process.stop()
        process.start()
        process.wait_ready()

    def stop(self) -> None:
        """End whatever runs."""
        for process in reversed(self.processes):
            if process.running:
                process.stop()


@contextlib.contextmanager
def cluster(folder: Path, model: str) -> Iterator[Cluster]:
    """A cluster that is gone when the block ends; prints the logs if it ends by an error."""
    made = Cluster(folder, model)
    try:
        yield made
    except BaseException:
        for process in made.processes:
            print(f"--- {process.log.name}\n{process.tail(40)}")
        raise
    finally:
        made.stop()


def complete(engine: LocalEngine, prompt: list[int] | str, tokens: int = 8, **more: Any) -> Answer:
    """A greedy completion of exactly so many tokens."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return ask(engine.url, {**body, "ignore_eos": True, **more})
