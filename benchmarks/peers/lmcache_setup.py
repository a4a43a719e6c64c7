"""An environment with LMCache's server and vLLM's CPU build: a copy of the one with vLLM alone.

    python benchmarks/peers/lmcache_setup.py .venv-vllm .venv-vllm-lmcache

Files are shared with the first environment by hard links where nothing changes. LMCache's CUDA
parts are left out; its server runs without. One line of vLLM 0.32 is guarded in the copy: with
numba loaded, as LMCache loads it, its search for Triton kernels meets an object whose __dict__ is
no mapping, and vLLM does not start.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

LMCACHE = "lmcache==0.5.6"
# Of what it requires, what vLLM has not already and is not for CUDA or for stores not used here.
REQUIRES = (
    "aiofile", "aiofiles", "awscrt", "blake3", "cachetools", "cryptography", "google-api-core",
    "httptools", "nvtx", "opentelemetry-api", "opentelemetry-exporter-otlp",
    "opentelemetry-exporter-prometheus", "opentelemetry-sdk", "py-cpuinfo", "redis",
    "sortedcontainers",
)  # fmt: skip
SEARCH = '            if hasattr(value, "__dict__"):\n'
GUARDED = (
    '            if type(getattr(value, "__dict__", None)).__name__ in ("dict", "mappingproxy"):\n'
)


def guard(venv: Path) -> None:
    """Write the one changed file of vLLM anew, so that the other environment keeps its own."""
    (file,) = venv.glob("lib/python3*/site-packages/vllm/triton_utils/dispatcher.py")
    text = file.read_text()
    if GUARDED in text:
        return
    if text.count(SEARCH) != 1:
        raise SystemExit(f"{file} is of another release than vLLM 0.32")
    other = file.with_suffix(".new")
    other.write_text(text.replace(SEARCH, GUARDED))
    os.replace(other, file)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vllm_venv", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if not arguments.out.exists():
        subprocess.run(["cp", "-al", str(arguments.vllm_venv), str(arguments.out)], check=True)
    pip = [str(arguments.out / "bin" / "python"), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "--no-deps", LMCACHE], check=True)
    subprocess.run([*pip, "--no-warn-conflicts", *REQUIRES], check=True)
    guard(arguments.out)


if __name__ == "__main__":
    main()
