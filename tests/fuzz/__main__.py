"""The long run: `python -m tests.fuzz --inputs 100000`, in the repository's root."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# As pytest has it (pythonpath in pyproject.toml); and the rooms' bare names stay unimportable.
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:] = [str(ROOT / "tests")] + [p for p in sys.path if Path(p or ".").resolve() != ROOT]

from fuzz.target import fuzz  # noqa: E402
from fuzz.targets import TARGETS  # noqa: E402


def main() -> int:
    """Run every target, or the one named; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="per target (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the inputs; a new one each time if not given")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="default: all")
    arguments = parser.parse_args()
    seed = arguments.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    for name in arguments.target or TARGETS:
        print(f"{name}: {arguments.inputs} inputs, seed {seed} ...", flush=True)
        started = time.monotonic()
        fuzz(TARGETS[name], arguments.inputs, seed)
        print(f"{name}: nothing found in {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
