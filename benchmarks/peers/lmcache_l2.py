"""LMCache's own `bench l2` over Kvist's adapter and over LMCache's `fs` adapter, in turns.

Each turn is a process of LMCache's and, for Kvist, a new sidecar whose memory is populated. `fs`
writes files without a sync, so to the page cache, and verifies nothing on the way back; Kvist
verifies each object that it brings, and keeps it in DRAM. Figures are medians, over turns, of the
median round; a round is --keys objects. It runs with Kvist's Python; make test-lmcache makes an
environment with LMCache's command. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvist.engine.local import LocalSidecar
from kvist.proto.record import PAGE_BYTES

OPERATIONS = {"op_0": "store", "op_1": "lookup", "op_2": "load"}
POPULATE_S = 120.0


def one_turn(flags: argparse.Namespace, adapter: dict[str, Any], kib: int, out: Path) -> Any:
    """LMCache's account of one run."""
    command = [
        str(flags.lmcache), "bench", "l2", "--l2-adapter", json.dumps(adapter),
        "--num-keys", str(flags.keys), "--data-size-kb", str(kib),
        "--rounds", str(flags.rounds), "--format", "json", "--output", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(out.read_text())["metrics"]


def over_kvist(flags: argparse.Namespace, kib: int, folder: Path) -> Any:
    """With a sidecar of its own: objects of one size."""
    # The object, and a header with the name that stands in for its tokens.
    settings = {
        "dram_bytes": f"{flags.dram_mib}MiB",
        "slot_bytes": str((kib << 10) + 2 * PAGE_BYTES),
    }
    sidecar = LocalSidecar(folder / "sidecar", settings)
    sidecar.start()
    try:
        sidecar.wait_ready()
        until = time.monotonic() + POPULATE_S
        while "arena populated" not in (folder / "sidecar" / "kvistd.log").read_text():
            if time.monotonic() > until:
                raise SystemExit("the sidecar did not populate its memory")
            time.sleep(0.1)
        adapter = {
            "type": "plugin",
            "module_path": "kvist.engine.plugins.lmcache",
            "class_name": "KvistL2Adapter",
            "adapter_params": {"kvist.cache": str(sidecar.socket)},
        }
        return one_turn(flags, adapter, kib, folder / "out.json")
    finally:
        sidecar.stop()


def over_files(flags: argparse.Namespace, kib: int, folder: Path) -> Any:
    """With LMCache's own adapter."""
    (folder / "files").mkdir()
    adapter = {"type": "fs", "base_path": str(folder / "files")}
    return one_turn(flags, adapter, kib, folder / "out.json")


def measure(flags: argparse.Namespace, kib: int) -> dict[str, Any]:
    """One size of object."""
    times: dict[str, dict[str, list[float]]] = {"kvist": {}, "fs": {}}
    for turn in range(flags.turns):
        order = [("kvist", over_kvist), ("fs", over_files)]
        for name, run in order if turn % 2 else reversed(order):
            with tempfile.TemporaryDirectory(prefix="kvist-l2-") as folder:
                found = run(flags, kib, Path(folder))
            wanted = flags.keys * flags.rounds
            for key, operation in OPERATIONS.items():
                if operation != "lookup" and found[key]["total_success"] != wanted:
                    raise SystemExit(f"{name}: {operation} failed: {found[key]}")
                times[name].setdefault(operation, []).append(found[key]["duration_p50_ms"])
    row: dict[str, Any] = {"object_kib": kib, "round_mib": flags.keys * kib / 1024}
    for name, operations in times.items():
        row[name] = {
            f"{operation}_ms": {"median": statistics.median(all_of), "of": sorted(all_of)}
            for operation, all_of in operations.items()
        }
    row["times_as_fast_as_fs"] = {
        operation: round(
            row["fs"][f"{operation}_ms"]["median"] / row["kvist"][f"{operation}_ms"]["median"], 2
        )
        for operation in OPERATIONS.values()
    }
    return row


def main() -> int:
    """Print one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lmcache", type=Path, default=Path(".venv-lmcache/bin/lmcache"))
    parser.add_argument("--sizes-kib", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--keys", type=int, default=16, help="objects of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="of a turn (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of each (%(default)s)")
    parser.add_argument("--dram-mib", type=int, default=2048, help="of the sidecar (%(default)s)")
    flags = parser.parse_args()
    flags.lmcache = flags.lmcache.absolute()
    if not flags.lmcache.exists():
        parser.error(f"--lmcache: {flags.lmcache} is not there; make test-lmcache sets it up")
    rows = []
    for kib in flags.sizes_kib:
        rows.append(measure(flags, kib))
        print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"benchmark": "lmcache_l2", "sizes": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
