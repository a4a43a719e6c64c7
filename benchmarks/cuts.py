"""How long a damaged block and a TTL keep the sidecar's loop when a million blocks go with them.

The real index, block tables, placement, clearing and expiry without the arena, filled with one
first block on which conversations stand, as under a common system prompt. Then that block proves to
be damaged, or all are over their time. Timed are the look that finds it out and every piece of the
work that is left; what counts is the longest, for so long a worker may wait.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from browse import timed, told
from sidecar_memory import SLOT_BYTES, NumberedSlots, key_of, placement_of

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.cachesvc.catalog.index import IndexWriter, Location
from kvist.cachesvc.placing.clearing import Clearing
from kvist.cachesvc.placing.expiry import Expiry
from kvist.cachesvc.placing.placement import Placement
from kvist.cachesvc.placing.tenancy import Limits
from kvist.cachesvc.policy.eviction import POLICIES, PolicyName

TTL_S = 60
NAMESPACE = bytes(32)


class UnwipedSlots(NumberedSlots):
    """Slots without memory have nothing to overwrite."""

    def wipe(self, slot: int) -> None:
        """See DramTier."""


def fill(placement: Placement, blocks: int, conversation: int) -> int:
    """Store conversations on top of one block until there are so many; the row of that block."""
    first = row = NO_ROW
    for number in range(blocks):
        location = Location(placement.allocate_dram(None), None)
        row = placement.insert(key_of(number), row, NAMESPACE, location)
        placement.uses.stored(row)
        if first == NO_ROW:
            first = row
        if not number % conversation or number == blocks - 1:
            placement.uses.tell_stored()
            placement.offer(row)
            row = first
    return first


def measure(what: str, blocks: int, conversation: int, policy: PolicyName) -> dict[str, Any]:
    """The figures for one length of conversations."""
    with tempfile.TemporaryDirectory(prefix="kvist-bench-", dir="/dev/shm") as folder:
        index = IndexWriter(Path(folder) / "index", blocks, 0, SLOT_BYTES, bytes(16))
        rules = {f"ns:{NAMESPACE.hex()[:8]}": Limits(ttl=TTL_S)} if what == "expiry" else {}
        placement = placement_of(index, UnwipedSlots(blocks), policy, rules)
        clearing, clock_s = Clearing(placement), [0.0]
        expiry = Expiry(placement, lambda: clock_s[0])
        first = fill(placement, blocks, conversation)
        idle, cut, pieces = list[float](), list[float](), list[float]()
        clock_s[0] += 1 + TTL_S / 2
        timed(idle, partial(expiry.tick, clock_s[0]))
        clock_s[0] += TTL_S
        if what == "expiry":
            timed(cut, partial(expiry.tick, clock_s[0]))
        else:
            timed(cut, partial(placement.drop_tree, first, "corrupt"))
        left = len(placement.blocks)
        while clearing.busy:
            timed(pieces, clearing.step)
        figures = {
            "what": what,
            "conversation_blocks": conversation,
            "left_after_the_cut": left,
            "idle_look_ms": told(idle)["longest_ms"],
            "cut_ms": told(cut)["longest_ms"],
            "pieces": told(pieces) if pieces else None,
            "blocks_in_the_end": index.used_rows,
        }
        index.close()
    return figures


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument(
        "--conversations", default="100,10000", help="blocks of each, with commas (%(default)s)"
    )
    parser.add_argument("--policy", choices=POLICIES, default="rgg")
    flags = parser.parse_args()
    results = [
        measure(what, flags.blocks, int(length), flags.policy)
        for what in ("damage", "expiry")
        for length in flags.conversations.split(",")
    ]
    print(json.dumps({"bench": "cuts", "blocks": flags.blocks, "results": results}))


if __name__ == "__main__":
    main()
