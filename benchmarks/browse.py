"""How long List, Evict and Clear keep the sidecar's loop, in a cache of a million blocks.

The real index, block tables and placement without the arena, filled with conversations by
sidecar_memory. Every page of a whole listing is timed, and every call that evicts what stands on
the first block of some conversations, and at last the cut and every piece of a Clear of what is
left. What counts is the longest: so long a worker may wait.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sidecar_memory import SLOT_BYTES, NumberedSlots, fill, key_of, placement_of

from kvist.cachesvc.catalog.index import IndexWriter
from kvist.cachesvc.core.browse import Asked, Browser
from kvist.cachesvc.log import Log
from kvist.cachesvc.placing.clearing import Clearing

EVICTED_CONVERSATIONS = 20


def timed(times: list[float], call: Callable[[], Any]) -> Any:
    """The result of a call, whose milliseconds of the processor are added.

    Not those of the clock: on a busy machine they are mostly others' turns.
    """
    started = time.thread_time()
    result = call()
    times.append(1000 * (time.thread_time() - started))
    return result


def list_all(browser: Browser, **asked: Any) -> tuple[int, list[float]]:
    """Runs of a whole listing, and milliseconds of each page."""
    runs, start, times = 0, 0, list[float]()
    while True:
        page = timed(times, partial(browser.page, Asked(start=start, **asked)))
        runs += len(page.runs)
        start = page.next
        if not start:
            return runs, times


def clear_all(clearing: Clearing) -> tuple[list[float], list[float]]:
    """Milliseconds of the cut, and of each piece."""
    cut, pieces = list[float](), list[float]()
    timed(cut, partial(clearing.cut, None))
    while clearing.busy:
        timed(pieces, clearing.step)
    return cut, pieces


def told(times: list[float]) -> dict[str, float]:
    """Calls, and their milliseconds."""
    ordered = sorted(times)
    return {
        "calls": len(times),
        "median_ms": round(statistics.median(times), 3),
        "p99_ms": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
        "longest_ms": round(ordered[-1], 3),
    }


def measure(blocks: int, conversation: int) -> dict[str, Any]:
    """The figures for one length of conversations."""
    with tempfile.TemporaryDirectory(prefix="kvist-bench-", dir="/dev/shm") as folder:
        index = IndexWriter(Path(folder) / "index", blocks, 0, SLOT_BYTES, bytes(16))
        dram = NumberedSlots(blocks)
        placement = placement_of(index, dram, "lru")
        fill(placement, blocks, conversation)
        parts: Any = SimpleNamespace(
            index=index, dram=dram, flash=None, placement=placement, log=Log(io.StringIO())
        )
        browser = Browser(parts)
        runs, pages = list_all(browser)
        _, hottest = list_all(browser, min_uses=1)
        _, by_key = list_all(browser, key="ab1")
        evictions: list[float] = []
        for number in range(EVICTED_CONVERSATIONS):
            key, more = key_of(number * conversation), True
            while more:
                _, more = timed(evictions, partial(browser.evict, key, True))
        cut, pieces = clear_all(Clearing(placement))
        figures = {
            "conversation_blocks": conversation,
            "runs": runs,
            "list": told(pages),
            "list_used": told(hottest),
            "list_by_key": told(by_key),
            "evict": told(evictions),
            "clear_cut": told(cut),
            "clear_pieces": told(pieces),
        }
        index.close()
    return figures


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument(
        "--conversations", default="1,100,10000", help="blocks of each, with commas (%(default)s)"
    )
    flags = parser.parse_args()
    lengths = [int(word) for word in flags.conversations.split(",")]
    results = [measure(flags.blocks, length) for length in lengths]
    print(json.dumps({"benchmark": "browse", "blocks": flags.blocks, "results": results}))


if __name__ == "__main__":
    main()
