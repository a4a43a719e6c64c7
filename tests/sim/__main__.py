"""Long runs: `python -m tests.sim --seeds 100000`, in the repository's root."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# As pytest has it (pythonpath in pyproject.toml); and the rooms' bare names stay unimportable.
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:] = [str(ROOT / "tests")] + [p for p in sys.path if Path(p or ".").resolve() != ROOT]

from sim.world.run import run  # noqa: E402

BATCH = 50
SAY_S = 10.0


_stop = multiprocessing.get_context("fork").Event()


def run_batch(seeds: range) -> tuple[int, dict[int, str]]:
    """How many were run, fewer after a Ctrl-C; and what was wrong, by seed, of those that fail."""
    failed = {}
    for count, seed in enumerate(seeds):
        if _stop.is_set():
            return count, failed
        try:
            run(seed)
        except Exception as error:
            failed[seed] = f"{type(error).__name__}: {error}"
    return len(seeds), failed


def batches(first: int, seeds: int) -> Iterator[range]:
    """The seeds in pieces for processes."""
    for start in range(first, first + seeds, BATCH):
        yield range(start, min(start + BATCH, first + seeds))


def run_many(first: int, seeds: int, jobs: int) -> int:
    """Run seeds, say what fails when it does; returns how many. A Ctrl-C ends it early."""
    started = said = time.monotonic()
    done = failures = 0

    def stop(*_: object) -> None:
        _stop.set()  # each process ends its seed and so leaves nothing behind

    signal.signal(signal.SIGINT, stop)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for count, failed in pool.imap_unordered(run_batch, batches(first, seeds)):
            done += count
            failures += len(failed)
            for seed, what in failed.items():
                print(f"seed {seed}: {what}", flush=True)
            if time.monotonic() - said > SAY_S and not _stop.is_set():
                said = time.monotonic()
                print(_progress(done, seeds, failures, said - started), flush=True)
    print(_progress(done, seeds, failures, time.monotonic() - started), flush=True)
    return failures


def _progress(done: int, seeds: int, failures: int, seconds: float) -> str:
    rate = done / seconds
    left = f", {(seeds - done) / rate / 60:.0f} min left" if rate and done < seeds else ""
    stopped = ", stopped" if _stop.is_set() else left
    return f"{done}/{seeds} seeds, {failures} failed, {rate:.0f} a second{stopped}"


def main() -> int:
    """Run many seeds, or one; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument("--seed", type=int, help="replay this one only")
    parser.add_argument("--verbose", action="store_true", help="with --seed: show every step")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        run(arguments.seed, print if arguments.verbose else None)
        print(f"seed {arguments.seed}: nothing found")
        return 0
    failures = run_many(arguments.first, arguments.seeds, arguments.jobs)
    return 130 if _stop.is_set() else int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
