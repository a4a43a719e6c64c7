"""A small crash storm: benchmarks/crash_storm.py with a few kills, and that it would see a loss."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "crash_storm.py"
SMALL = ["--flash-bytes", "64MiB", "--writers", "2", "--kills", "6", "--seed", "1"]


@pytest.fixture
def storms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crash_storm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kills_lose_nothing_acknowledged_and_no_byte_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == found["sidecar_kills"] + found["writer_kills"] == 6
    assert found["acknowledged"] > 0
    assert found["blocks_read"] > 0
    assert found["wrong_bytes"] == found["acknowledged_lost"] == found["leaked_slots"] == 0
    assert not list(tmp_path.iterdir())


def test_a_storm_sees_blocks_that_are_lost(tmp_path: Path, storms: ModuleType) -> None:
    with storms.opened(storms.parse([*SMALL, "--folder", str(tmp_path)])) as storm:
        storm.start()
        deadline = time.monotonic() + 60.0
        while len(storm.watch.acknowledged) < 10:
            assert time.monotonic() < deadline
            storm.watch.look(storm.chains)
        storm.stop_writers()  # one that came late would store the first chains anew
        storm.sidecar.kill()
        for segment in tmp_path.rglob("segment-*"):
            segment.write_bytes(b"")
        storm.start_sidecar()
        storm.read_back(list(range(storm.chains)))
        assert storm.lost
        assert storm.found["wrong_bytes"] == 0
