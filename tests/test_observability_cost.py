"""The benchmark of what it costs to be observed: that it runs, and says of what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sim.models import tiny_llama

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "observability_cost.py"


def test_a_tiny_run_measures_both_sides_of_engine_and_service(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny")
    command = [sys.executable, "-P", str(SCRIPT), "--tiny", "--model", str(model)]
    done = subprocess.run([*command, "--pool", "16MiB"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert {"metrics", "page"} <= set(got["observed"])
    for name in ("engine_throughput", "service_throughput"):
        assert got[name].keys() == {"on", "off", "ratio", "quartiles"}
        assert got[name]["on"] > 0
        assert got[name]["off"] > 0
    assert got["look_ms"] > 0
