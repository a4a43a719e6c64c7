"""SIGKILL for the sidecar and for writers, at random moments under load, and everything read back.

A real kvistd with a flash tier and a few writer processes. Writers store chains of blocks whose
bytes follow from a number, the same chains at the same time, and read and compare what was stored
before. Again and again one of them, or the sidecar, is killed and started anew.

A block is acknowledged when the shared index has shown a copy on flash twice in a row: the
sidecar writes that word only after the record is written and the transaction of the flash index
is committed. The flash tier is larger than all blocks together, so nothing acknowledged may ever
be missing afterwards; and nothing that is served, acknowledged or not, may differ in a byte.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvist.cachesvc.catalog.index import IndexReader, Location
from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.control import PROTOCOL_VERSION, GrpcControl
from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.local import LocalSidecar
from kvist.proto import cache_pb2
from kvist.proto.keys import NO_KEY, BlockKey, Namespace, block_keys
from kvist.proto.layout import BlockFormat
from kvist.proto.record import RecordShape, Wanted

BLOCK_TOKENS = 16
FORMAT = BlockFormat(1, 2, 32, "float32", BLOCK_TOKENS)
NAMESPACE = Namespace("crash-storm", FORMAT, "none", "none")
DIGEST = NAMESPACE.digest()
SHAPE = RecordShape(FORMAT.payload_bytes, BLOCK_TOKENS)
CHAIN_BLOCKS_MAX = 24
LOAD_WAIT_S = 5.0
SAMPLED_CHAINS = 12
PAUSE_S = 0.05  # of a writer, so that 200 kills fill half of the flash tier
QUIET = Log(sys.stderr, "error")
# A row of the table that each writer life fills, in 8-byte words.
CHAIN, STORED, READ, WRONG, ROW_WORDS = 0, 1, 2, 3, 4


def map_table(path: Path) -> memoryview:
    """The words that writers leave behind, however they end."""
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")


class Chain:
    """The blocks of a number; every third number continues the chain before it.

    Attributes:
        keys: one per block. items: to store. wanted: to load.
    """

    def __init__(self, number: int) -> None:
        draw = np.random.default_rng(number)
        tokens = _own_tokens(number)[: int(draw.integers(1, CHAIN_BLOCKS_MAX + 1)) * BLOCK_TOKENS]
        if number % 3 == 2:
            tokens = np.concatenate([_own_tokens(number - 1)[: 8 * BLOCK_TOKENS], tokens])
        self.keys = block_keys(DIGEST, tokens, BLOCK_TOKENS)
        own = [part.tobytes() for part in tokens.reshape(-1, BLOCK_TOKENS)]
        self.items = [
            StoreItem(
                key, self.keys[depth - 1] if depth else NO_KEY, DIGEST, depth, own[depth],
                np.random.default_rng(list(key)).integers(0, 256, SHAPE.payload_bytes, np.uint8),
            )
            for depth, key in enumerate(self.keys)
        ]  # fmt: skip
        self.wanted = [
            Wanted(item.key, DIGEST, item.tokens, SHAPE.payload_bytes) for item in self.items
        ]


def _own_tokens(number: int) -> np.ndarray:
    draw = np.random.default_rng([number, 1])
    return draw.integers(0, 50_000, CHAIN_BLOCKS_MAX * BLOCK_TOKENS).astype("<u4")


def read_chain(client: CacheClient, chain: Chain) -> tuple[dict[BlockKey, str | None], int]:
    """Load what is cached of a chain.

    Returns: key -> None when it was served, else the reason; how many bytes were wrong.
    """
    reasons: dict[BlockKey, str | None] = {}
    wrong = 0
    client.prefetch(chain.keys, client.lookup(chain.keys).blocks)
    for item, wanted in zip(chain.items, chain.wanted, strict=True):
        out = np.empty(SHAPE.payload_bytes, np.uint8)
        reason = client.load(wanted, out, time.monotonic() + LOAD_WAIT_S)
        reasons[item.key] = reason
        if reason is None:
            wrong += int(np.count_nonzero(out != item.payload))
    return reasons, wrong


def write(socket: str, table: Path, row: int, first: int) -> None:
    """A writer's life: store chain after chain from first on, read older ones, until killed."""
    words = map_table(table)[row * ROW_WORDS : (row + 1) * ROW_WORDS]
    draw = random.Random(row)
    client = open_cache(socket, NAMESPACE, f"writer-{row}", QUIET)
    client.wait_attached(LOAD_WAIT_S)
    for number in itertools.count(first):
        words[CHAIN] = number + 1
        words[STORED] += client.store(Chain(number).items).stored
        reasons, wrong = read_chain(client, Chain(draw.randrange(number + 1)))
        words[READ] += list(reasons.values()).count(None)
        words[WRONG] += wrong
        time.sleep(PAUSE_S)
        client.wait_attached(LOAD_WAIT_S)


class Watch:
    """Looks at the shared index of the running sidecar, as any worker may.

    Attributes:
        acknowledged: keys that were seen on flash, ever.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._control: GrpcControl | None = None
        self._index: IndexReader | None = None
        self._chains: list[list[BlockKey]] = []
        self._seen: set[BlockKey] = set()
        self.acknowledged: set[BlockKey] = set()

    def attach(self) -> None:
        """Map the index of this life. Raises: KvistError, OSError."""
        self.detach()
        self._control = GrpcControl(f"unix:{self._socket}")
        reply = self._control.attach(
            cache_pb2.AttachRequest(
                protocol_version=PROTOCOL_VERSION, client="watch", pid=os.getpid(),
                namespace=DIGEST, payload_bytes=SHAPE.payload_bytes, block_tokens=BLOCK_TOKENS,
            )
        )  # fmt: skip
        self._index = IndexReader(Path(reply.index_path))

    def detach(self) -> None:
        """Let it go."""
        if self._control is not None:
            self._control.close()
        if self._index is not None:
            self._index.close()
        self._control = self._index = None

    def find(self, key: BlockKey) -> Location:
        """What the index shows of a block."""
        found = self._index.find(key) if self._index is not None else None
        return found or Location(None, None)

    def on_flash(self, key: BlockKey) -> bool:
        """Whether that is a copy on flash."""
        return self.find(key).flash is not None

    def keys(self, chains: int) -> Iterator[BlockKey]:
        """Every key of the first chains; may come twice."""
        while len(self._chains) < chains:
            self._chains.append(Chain(len(self._chains)).keys)
        for keys in self._chains[:chains]:
            yield from keys

    def look(self, chains: int) -> None:
        """Note what has reached flash. Twice in a row, as a row may change hands under a look."""
        now = {
            key for key in self.keys(chains) if key not in self.acknowledged and self.on_flash(key)
        }
        self.acknowledged |= now & self._seen
        self._seen = now


class Storm:
    """Everything that runs, and what was found.

    Args:
        folder: for the sidecar; empty.
        arguments: of the command line.

    Attributes:
        found: what was counted.
        lost: acknowledged blocks that were gone.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        settings = {
            "dram_bytes": arguments.dram_bytes,
            "flash_bytes": arguments.flash_bytes,
            "slot_bytes": str(SHAPE.record_bytes),
        }
        self.sidecar = LocalSidecar(folder, settings)
        self.found: Counter[str] = Counter()
        self.lost: set[BlockKey] = set()
        self.watch = Watch(self.sidecar.socket)
        self._random = random.Random(arguments.seed)
        self._table = folder / "writers"
        self._table.write_bytes(bytes((arguments.kills + arguments.writers) * ROW_WORDS * 8))
        self._words = map_table(self._table)
        self._writers: list[subprocess.Popen[bytes]] = []
        self._lives = 0
        self._writer_count = arguments.writers

    @property
    def chains(self) -> int:
        """Chains that somebody has begun to store."""
        return max(self._words[CHAIN::ROW_WORDS])

    def total(self, word: int) -> int:
        """Sum over all writers' lives."""
        return sum(self._words[word::ROW_WORDS])

    def start(self) -> None:
        """Sidecar and writers."""
        self.start_sidecar()
        while len(self._writers) < self._writer_count:
            self._start_writer()

    def start_sidecar(self) -> None:
        """And wait until it has read its flash."""
        self.sidecar.start()
        self.sidecar.wait_ready()
        while self.sidecar.stats()["tiers"][1]["state"] == "rebuilding":
            time.sleep(0.01)
        self.watch.attach()

    def _start_writer(self) -> None:
        words = [self.sidecar.socket, self._table, self._lives, self.chains]
        command = [sys.executable, str(Path(__file__).resolve()), "--writer", *map(str, words)]
        self._writers.append(subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"}))
        self._lives += 1

    def step(self) -> str:
        """Let it run for a moment, kill somebody; what was done, in words."""
        until = time.monotonic() + self._random.uniform(0.05, 0.8)
        while time.monotonic() < until:
            self.watch.look(self.chains)
            time.sleep(0.005)
        if self._random.random() < 0.5:
            self.found["writer_kills"] += 1
            self._kill_writer(self._random.randrange(len(self._writers)))
            self._start_writer()
            return "a writer"
        self.found["sidecar_kills"] += 1
        self.sidecar.kill()
        if self._random.random() < 0.2:  # once more, amid its start
            self.sidecar.start()
            time.sleep(self._random.uniform(0.0, 0.6))
            self.sidecar.kill()
        self.start_sidecar()
        self.check_acknowledged()
        chains = range(self.chains)
        self.read_back(self._random.sample(chains, min(len(chains), SAMPLED_CHAINS)))
        return "the sidecar"

    def _kill_writer(self, which: int) -> None:
        writer = self._writers.pop(which)
        writer.send_signal(signal.SIGKILL)
        writer.wait()

    def stop_writers(self) -> None:
        """Kill all of them."""
        while self._writers:
            self._kill_writer(0)

    def check_acknowledged(self) -> None:
        """What has ever been seen on flash is there in this life too."""
        self.lost |= {key for key in self.watch.acknowledged if not self.watch.on_flash(key)}

    def read_back(self, numbers: list[int]) -> None:
        """Load chains and compare; an acknowledged block that does not come is lost."""
        client = open_cache(str(self.sidecar.socket), NAMESPACE, "reader", QUIET)
        try:
            if not client.wait_attached(LOAD_WAIT_S):
                raise RuntimeError(f"not attached:\n{self.sidecar.tail()}")
            for number in numbers:
                reasons, wrong = read_chain(client, Chain(number))
                served = {key for key, reason in reasons.items() if reason is None}
                self.found["blocks_read"] += len(served)
                self.found["wrong_bytes"] += wrong
                self.lost |= (reasons.keys() & self.watch.acknowledged) - served
        finally:
            client.close()

    def finish(self) -> None:
        """End the writers, restart once more, read everything, look for slots that leaked."""
        self.stop_writers()
        self.watch.look(self.chains)
        self.sidecar.kill()
        self.start_sidecar()
        self.check_acknowledged()
        self.read_back(list(range(self.chains)))
        deadline = time.monotonic() + LOAD_WAIT_S
        while (leaked := self._leaked_slots()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.found["leaked_slots"] = leaked
        self.found["flash_evicted"] = self.sidecar.stats()["tiers"][1]["evicted_blocks"]

    def _leaked_slots(self) -> int:
        """Slots in use that no block explains."""
        stats, keys = self.sidecar.stats(), set(self.watch.keys(self.chains))
        dram, flash = (int(tier["used_slots"]) for tier in stats["tiers"])
        in_dram = sum(self.watch.find(key).dram is not None for key in keys)
        on_flash = sum(map(self.watch.on_flash, keys))
        return abs(dram - in_dram) + abs(flash - on_flash) + int(stats["reserved_slots"])

    def close(self) -> None:
        """End whatever runs."""
        self.stop_writers()
        self.watch.detach()
        if self.sidecar.running:
            self.sidecar.stop()


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Storm]:
    """A storm in a folder of its own, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="kvist-storm-", dir=arguments.folder))
    storm = Storm(folder, arguments)
    try:
        yield storm
    finally:
        storm.close()
        shutil.rmtree(folder, ignore_errors=True)


def result(storm: Storm, arguments: argparse.Namespace, seconds: float) -> dict[str, object]:
    """What is printed."""
    return {
        "bench": "crash_storm",
        "kills": arguments.kills,
        "sidecar_kills": storm.found["sidecar_kills"],
        "writer_kills": storm.found["writer_kills"],
        "writers": arguments.writers,
        "block_bytes": SHAPE.payload_bytes,
        "blocks_stored": storm.total(STORED),
        "acknowledged": len(storm.watch.acknowledged),
        "blocks_read": storm.found["blocks_read"] + storm.total(READ),
        "wrong_bytes": storm.found["wrong_bytes"] + storm.total(WRONG),
        "acknowledged_lost": len(storm.lost),
        "leaked_slots": storm.found["leaked_slots"],
        "flash_evicted": storm.found["flash_evicted"],
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--writers", type=int, default=3, help="processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--dram-bytes", default="4MiB", help="of the sidecar (%(default)s)")
    parser.add_argument("--flash-bytes", default="2GiB", help="of the sidecar (%(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to test; default: temporary")
    parser.add_argument("--writer", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    """Run the storm; the last line printed is one JSON object; 1 if anything was wrong."""
    arguments = parse()
    if arguments.writer is not None:
        socket, table, row, first = arguments.writer
        write(socket, Path(table), int(row), int(first))
        return 0
    started = time.monotonic()
    with opened(arguments) as storm:
        storm.start()
        for kill in range(1, arguments.kills + 1):
            who = storm.step()
            print(
                f"{kill}/{arguments.kills} killed {who}; {len(storm.watch.acknowledged)} blocks"
                f" acknowledged, {len(storm.lost)} of them lost",
                file=sys.stderr,
            )
        storm.finish()
        found = result(storm, arguments, time.monotonic() - started)
    print(json.dumps(found))
    return int(bool(found["wrong_bytes"] or found["acknowledged_lost"] or found["leaked_slots"]))


if __name__ == "__main__":
    sys.exit(main())
