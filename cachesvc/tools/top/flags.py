"""The arguments of `kvist top`; needs nothing heavy."""

from __future__ import annotations

import argparse

from kvist.cachesvc.tools.door import add_door_flags
from kvist.cachesvc.view.stats_table import PAGE


def add_top_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist top`."""
    parser.add_argument(
        "--url", help=f"of the sidecar's page; {PAGE} where no socket is found nor said"
    )
    add_door_flags(parser)
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="(%(default)s)"
    )
    parser.add_argument(
        "--once", action="store_true", help="print the view once, as plain text, and end"
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help="lines without a terminal; default: no end"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line instead of the view"
    )
