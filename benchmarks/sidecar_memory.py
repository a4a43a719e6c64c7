"""What the sidecar keeps for a block outside the arena, and how long its collector pauses.

For each number of blocks a process of its own makes the real index, block tables, placement and
eviction, stores that many blocks in conversations, and uses some of them again. Only the
arena is left out: its slots have numbers and no bytes. Resident memory is read before the tables
are made and after the last block; pauses are those of Python's collector meanwhile, set as kvistd
sets it, and of full collections asked for at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from kvist.cachesvc.__main__ import freeze
from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.catalog.index import IndexWriter, Location
from kvist.cachesvc.placing.pins import Pins
from kvist.cachesvc.placing.placement import Placement
from kvist.cachesvc.placing.tenancy import Limits, Tenancy
from kvist.cachesvc.placing.wards import Rules
from kvist.cachesvc.policy.eviction import POLICIES, PolicyName
from kvist.cachesvc.policy.rgg import make_policy
from kvist.proto.keys import BlockKey
from kvist.tiers.dram import DramTier
from kvist.tiers.slots import FreeSlots

FULL_COLLECTIONS = 5
SLOT_BYTES = 8192
SESSION = 1


class NumberedSlots(DramTier):
    """The DRAM tier's books without its memory."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.slot_bytes = SLOT_BYTES
        self._free = FreeSlots(slots)

    def allocate(self) -> int:
        """See DramTier."""
        return self._free.pop()

    def free(self, slot: int) -> None:
        """See DramTier."""
        self._free.push(slot)


def placement_of(
    index: IndexWriter,
    dram: DramTier,
    policy: PolicyName,
    rules: Mapping[str, Limits] | None = None,
) -> Placement:
    """The real placement over DRAM alone, with limits of tenants by name."""
    return Placement(
        index,
        dram,
        None,
        lambda tree, history, capacity: make_policy(policy, tree, history, capacity, 0),
        lambda _: False,
        time.monotonic,
        Rules(Tenancy(rules or {}), Pins(index.rows, dram.slots // 4, time.monotonic)),
    )


class Pauses:
    """Times every run of the collector."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.count = 0
        self._started_s = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._started_s = time.perf_counter()
        else:
            self.count += 1
            self.longest_s = max(self.longest_s, time.perf_counter() - self._started_s)


def resident_bytes() -> int:
    """Of this process, shared pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def key_of(number: int) -> BlockKey:
    """A key as evenly spread as a hash."""
    low = number * 0x9E3779B97F4A7C15 % 2**64
    return BlockKey(
        low.to_bytes(8, "little") + (low * 0xD1342543DE82EF95 % 2**64).to_bytes(8, "little")
    )


def fill(placement: Placement, blocks: int, conversation: int) -> None:
    """Store conversations until there are so many blocks; each tenth one is used again."""
    number = 0
    while number < blocks:
        row = NO_ROW
        for _ in range(min(conversation, blocks - number)):
            location = Location(placement.allocate_dram(None), None)
            row = placement.insert(key_of(number), row, bytes(32), location)
            placement.uses.stored(row)
            number += 1
        placement.uses.tell_stored()
        placement.offer(row)
        if number // conversation % 10 == 0:
            placement.uses.touched(SESSION, row)


def measure(blocks: int, conversation: int, policy: PolicyName) -> dict[str, float]:
    """The figures for one number of blocks, in this process."""
    with tempfile.TemporaryDirectory(prefix="kvist-bench-", dir="/dev/shm") as folder:
        freeze()
        before = resident_bytes()
        pauses = Pauses()
        started = time.perf_counter()
        index = IndexWriter(Path(folder) / "index", blocks, 0, SLOT_BYTES, bytes(16))
        placement = placement_of(index, NumberedSlots(blocks), policy)
        freeze()  # as kvistd does
        fill(placement, blocks, conversation)
        took = time.perf_counter() - started
        grown = resident_bytes() - before
        for _ in range(FULL_COLLECTIONS):
            gc.collect()
        figures = {
            "blocks": len(placement.blocks),
            "bytes_per_block": round(grown / len(placement.blocks), 1),
            "index_bytes_per_block": round(index.path.stat().st_size / len(placement.blocks), 1),
            "longest_pause_ms": round(1000 * pauses.longest_s, 2),
            "collections": pauses.count,
            "us_per_block": round(1e6 * took / len(placement.blocks), 1),
        }
        index.close()
    return figures


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument(
        "--conversation", type=int, default=32, help="blocks of one; 1 is the most leaves"
    )
    parser.add_argument("--policy", choices=POLICIES, default="rgg")
    parser.add_argument("--here", action="store_true", help="one size, in this process")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.blocks[0], arguments.conversation, arguments.policy)))
        return
    sizes = []
    for blocks in arguments.blocks:
        command = [sys.executable, __file__, "--here", "--blocks", str(blocks)]
        command += ["--conversation", str(arguments.conversation), "--policy", arguments.policy]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        sizes.append(json.loads(done.stdout))
    print(
        json.dumps(
            {
                "bench": "sidecar_memory",
                "limit_bytes_per_block": 200,
                "conversation_blocks": arguments.conversation,
                "policy": arguments.policy,
                "sizes": sizes,
            }
        )
    )


if __name__ == "__main__":
    main()
