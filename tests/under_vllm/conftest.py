"""The real model, converted once, and what the tests under vLLM count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sim.vllm_process import ROOT


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M as a folder."""
    out = ROOT / "build" / "smollm2-hf"
    script = ROOT / "benchmarks" / "peers" / "smollm2_folder.py"
    subprocess.run([sys.executable, str(script), str(out)], check=True)
    return out
