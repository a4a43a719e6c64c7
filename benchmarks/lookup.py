"""From a token array to the longest cached prefix, in a process apart from the sidecar.

A real kvistd holds every block of the prompt (with payloads of one page, because a look-up never
touches them). This process attaches, hashes the tokens into block keys and searches the shared
index: no call is made while it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.local import LocalSidecar
from kvist.proto.keys import NO_KEY, Namespace, Tokens, block_keys
from kvist.proto.layout import BlockFormat


def fill(client: CacheClient, digest: bytes, tokens: Tokens, shape: BlockFormat) -> int:
    """Store every block of the prompt; return how many."""
    block_tokens = shape.block_tokens
    keys = block_keys(digest, tokens, block_tokens)
    payload = np.zeros(shape.payload_bytes, dtype=np.uint8)
    items = [
        StoreItem(
            key=key,
            parent=keys[depth - 1] if depth else NO_KEY,
            namespace=digest,
            depth=depth,
            tokens=tokens[depth * block_tokens : (depth + 1) * block_tokens].tobytes(),
            payload=payload,
        )
        for depth, key in enumerate(keys)
    ]
    for start in range(0, len(items), 64):
        result = client.store(items[start : start + 64])
        if result.dropped:
            raise SystemExit(f"blocks were not stored: {result.dropped}")
    return len(keys)


def measure(
    client: CacheClient, digest: bytes, tokens: Tokens, block_tokens: int, repeats: int
) -> dict[str, object]:
    """Hash and search repeatedly; every search must find the whole prefix."""
    hash_us, search_us, found = [], [], 0
    calls = client.rpc_calls
    for _ in range(repeats):
        started = time.perf_counter()
        keys = block_keys(digest, tokens, block_tokens)
        hashed = time.perf_counter()
        found = client.lookup(keys).blocks
        searched = time.perf_counter()
        hash_us.append((hashed - started) * 1e6)
        search_us.append((searched - hashed) * 1e6)
    total = [a + b for a, b in zip(hash_us, search_us, strict=True)]
    return {
        "bench": "lookup",
        "tokens": len(tokens),
        "blocks": len(tokens) // block_tokens,
        "found_blocks": found,
        "total_us": round(statistics.median(total), 1),
        "hash_us": round(statistics.median(hash_us), 1),
        "search_us": round(statistics.median(search_us), 1),
        "spread_total_us": [round(min(total), 1), round(max(total), 1)],
        "rpc_calls": client.rpc_calls - calls,
        "repeats": repeats,
    }


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=100_000, help="prompt (%(default)s)")
    parser.add_argument("--block-tokens", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=200, help="(%(default)s)")
    arguments = parser.parse_args()
    shape = BlockFormat(1, 1, 1, "float32", arguments.block_tokens)
    namespace = Namespace("benchmark", shape, "none", "none")
    tokens = np.random.default_rng(0).integers(0, 49152, arguments.tokens).astype("<u4")
    with tempfile.TemporaryDirectory(prefix="kvist-bench-") as folder:
        settings = {"dram_bytes": "64MiB", "flash_path": "", "reservation_share": "1.0"}
        sidecar = LocalSidecar(Path(folder) / "sidecar", settings)
        sidecar.start()
        try:
            sidecar.wait_ready()
            client = open_cache(
                str(sidecar.socket), namespace, "benchmark", Log(sys.stderr, "warning")
            )
            if not client.wait_attached(10.0):
                raise SystemExit(f"not attached:\n{sidecar.tail()}")
            digest = namespace.digest()
            fill(client, digest, tokens, shape)
            result = measure(client, digest, tokens, arguments.block_tokens, arguments.repeats)
            client.close()
        finally:
            sidecar.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
