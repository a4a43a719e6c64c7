"""A forward pass of vLLM that is broken off: vLLM's model runner hands its blocks over all the
same, and none of them may reach the cache. Runs with vLLM's Python only (make test-vllm)."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from sim.sidecar import Sidecar, wait_until
from sim.vllm_process import VllmProcess, sidecar_metric

# One step of some ten seconds.
PROMPT = [random.Random(31).randrange(100, 49000) for _ in range(4000)]


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path / "sidecar", ["--dram-bytes", "256MiB"])
    made.start()
    yield made
    made.close()


def test_nothing_of_a_step_is_stored_that_was_interrupted(
    model: Path, tmp_path: Path, sidecar: Sidecar
) -> None:
    engine = VllmProcess(model, sidecar.socket, tmp_path / "engine.log")
    engine.answers([PROMPT[:130]], tokens=1)
    wait_until(lambda: sidecar_metric(sidecar, "kvist_blocks") == 1, "a whole step's block")
    engine.send("generate", prompts=[PROMPT], max_tokens=1)
    time.sleep(1.0)
    engine.process.send_signal(signal.SIGINT)
    engine.process.wait(60.0)
    engine.close()
    assert "KeyboardInterrupt" in (tmp_path / "engine.log").read_text()
    wait_until(lambda: sidecar_metric(sidecar, "kvist_sessions") == 0, "its sessions to end")
    assert sidecar_metric(sidecar, "kvist_blocks") == 1
