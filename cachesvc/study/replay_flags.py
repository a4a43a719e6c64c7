"""The arguments of `kvist cache replay`; needs nothing heavy."""

from __future__ import annotations

import argparse

TRACE_HELP = (
    'JSON lines, perhaps .xz or .gz, one a request: {"timestamp": SECONDS, "input_length": TOKENS, '
    '"hash_ids": [ID, ...]}, an id for each block of the prompt, the same for the same tokens. To '
    "record one, have whatever sees the requests write the time, the length and a hash of each "
    "--block-tokens tokens"
)


def add_replay_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache replay`."""
    parser.add_argument("trace", metavar="TRACE", help=TRACE_HELP)
    parser.add_argument(
        "--capacity",
        metavar="SIZES",
        default="1%,2%,5%,10%,25%,50%",
        help="blocks, or percent of the trace's different blocks, with commas "
        "(1%%,2%%,5%%,10%%,25%%,50%%)",
    )
    parser.add_argument(
        "--policy", choices=("rgg", "lru"), default="rgg", help="beside lru and opt (%(default)s)"
    )
    parser.add_argument(
        "--block-tokens", type=int, default=512, metavar="N", help="of a block (%(default)s)"
    )
    parser.add_argument(
        "--ms",
        action="store_true",
        help="timestamps are milliseconds, as in Mooncake's traces; else they are seconds",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the policy (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
