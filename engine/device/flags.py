"""Flags of `kvist serve` that say where it computes."""

from __future__ import annotations

import argparse
import re

DEVICES = re.compile(r"auto|cpu|interpreter|cuda(:\d{1,3})?")


def add_device_flags(group: argparse._ArgumentGroup) -> None:
    """Add --device and what matters on a device only; names and defaults are vLLM's."""
    group.add_argument(
        "--device",
        default="auto",
        metavar="WHERE",
        help="auto (cuda where torch sees one), cpu, cuda or cuda:N (%(default)s)",
    )
    group.add_argument(
        "--enforce-eager",
        action="store_true",
        help="capture no CUDA graphs: a shorter start, slower decode steps",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of a device's memory that weights, steps and the paged pool take together, if "
        "--kv-cache-memory-bytes does not size the pool (%(default)s)",
    )
