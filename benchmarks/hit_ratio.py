"""Block hit ratio of the service's eviction on a trace, beside leaf-LRU and the optimum.

The same code as in the service, by way of study/replay: hits are the leading cached blocks of
each prompt, in percent of all blocks asked for; capacities are in percent of the trace's different
blocks. The *_compute lists weigh each block by the operations that it takes to compute.
ns_per_event is the processor time of a replay with our policy over its block events (hits and
stores, with all evictions and learning), at the capacity where it is highest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kvist.cachesvc.policy.eviction import POLICIES, PolicyName
from kvist.cachesvc.study.replay import Contender, Score, replay_policy
from kvist.cachesvc.study.replay_table import Progress
from kvist.cachesvc.study.trace import Trace, read_trace
from kvist.proto.errors import ConfigInvalid

CAPACITY_PERCENT = (1, 2, 5, 10, 25, 50)


def measure(trace: Trace, ours: PolicyName, seed: int, progress: Progress) -> dict[str, object]:
    """Replay at each capacity."""
    scores: dict[str, list[Score]] = {"lru": [], ours: [], "opt": []}
    for percent in CAPACITY_PERCENT:
        capacity = max(1, round(trace.distinct * percent / 100))
        contenders: tuple[Contender, ...] = ("lru", ours, "opt")
        for policy in dict.fromkeys(contenders):
            progress.begin(f"{policy} with {capacity} blocks", trace.requests)
            score = replay_policy(trace, capacity, policy, 512, seed, progress.at)
            scores[policy].append(score)
    progress.end()
    event_ns = [1e9 * score.seconds / len(trace.blocks) for score in scores[ours]]
    return {
        "bench": "hit_ratio",
        "trace": trace.name,
        "policy": ours,
        "block_events": len(trace.blocks),
        "capacity_percent": list(CAPACITY_PERCENT),
        "lru": [round(score.blocks, 2) for score in scores["lru"]],
        "ours": [round(score.blocks, 2) for score in scores[ours]],
        "opt": [round(score.blocks, 2) for score in scores["opt"]],
        "ours_over_lru": [
            round(mine.blocks - lru.blocks, 2)
            for mine, lru in zip(scores[ours], scores["lru"], strict=True)
        ],
        "lru_compute": [round(score.work, 2) for score in scores["lru"]],
        "ours_compute": [round(score.work, 2) for score in scores[ours]],
        "opt_compute": [round(score.work, 2) for score in scores["opt"]],
        "lru_as_told_by_ours": [round(score.shadow or 0.0, 2) for score in scores[ours]],
        "ns_per_event": round(max(event_ns)),
        "ns_per_event_by_capacity": [round(each) for each in event_ns],
        "seed": seed,
    }


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("trace", type=Path, help="JSON lines, perhaps .xz or .gz")
    parser.add_argument("--ms", action="store_true", help="timestamps are milliseconds")
    parser.add_argument("--policy", choices=POLICIES, default="rgg", help="ours (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the policy (%(default)s)")
    arguments = parser.parse_args()
    progress = Progress()
    try:
        trace = read_trace(arguments.trace, arguments.ms, progress.say)
    except ConfigInvalid as error:
        sys.exit(f"hit_ratio: {error}")
    print(json.dumps(measure(trace, arguments.policy, arguments.seed, progress)))


if __name__ == "__main__":
    main()
