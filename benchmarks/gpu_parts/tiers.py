"""Blocks between the cache's arena and pages, by the engine's own code: rates, what they add to a
step, and what hits save."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gpu_parts.clock import Clock, Result, Sizes, percent
from gpu_parts.engine import Engine
from gpu_parts.model import Steps, pages_for
from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.embedded import DirectControl, StoreConfig
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.storing import StoreItem
from kvist.engine.models.llama_cuda import CudaLlama
from kvist.engine.trial_page import PoolPage
from kvist.proto.keys import NO_KEY, BlockKey, Namespace, block_keys
from kvist.proto.layout import BlockFormat
from kvist.proto.record import Wanted
from kvist.transfer.cuda import CudaCopies
from kvist.transfer.delayed import DelayedCopies
from kvist.transfer.pages import DevicePages

# As many as the engine has: engine/copying.
LOADERS = 2
MORE_LOADERS = (1, 2, 4)
RUN_BYTES = (64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20)
# A hit's last tokens are computed: the rest of a block, and the token that logits are wanted of.
TAIL_TOKENS = 16
PIN_WAIT_S = 60.0


class Tiers:
    """The cache in this process, and the pool's pages as ends of its copies.

    Attributes:
        pages: the ends.
        namespace: of the blocks.
        client: of the cache; closed by close.
        pinned_bytes: of the arena; what is not is copied through parts that are.
        why: it is not all pinned; "" when it is.
        dropped: why blocks were not stored or did not come, and how many.
        pin_s: from the opening until it was, or it was not waited for any longer.
    """

    def __init__(
        self, sizes: Sizes, clock: Clock, pool: torch.Tensor, compute: str, blocks: int
    ) -> None:
        _, layers, _, kv_heads, block_tokens, head_dim = pool.shape
        dtype = str(sizes.dtype).removeprefix("torch.")
        format = BlockFormat(layers, kv_heads, head_dim, dtype, block_tokens)
        self.block_bytes = format.payload_bytes
        self._sizes = sizes
        self.pool = pool
        self.pinned_bytes, self.why = 0, ""
        self.dropped: Counter[str] = Counter()
        self._pinned = threading.Event()
        self.link = CudaCopies(pool) if clock.cuda else DelayedCopies(pool)
        self.pages = DevicePages(self.link, format.payload_bytes, self._told)
        self.namespace = Namespace("random", format, "", compute)
        self.log = Log(sys.stderr)
        began = time.perf_counter()
        folder = Path()  # of the store's own choice: in /dev/shm where that has room
        room = blocks * (format.payload_bytes + (8 << 10))
        store = StoreConfig(folder, folder, room, None, 0, None)
        control = DirectControl(store, self.log)
        self.client = CacheClient(control, self.namespace, "bench", self.log)
        self.client.trial = PoolPage(format, pinner=self.pages)
        self.client.start()
        assert self.client.wait_attached(60.0), "the cache did not open"
        self._pinned.wait(PIN_WAIT_S)
        self.pin_s = time.perf_counter() - began
        # Threads that stay, as an engine's do: each has a stream of its own.
        self._loaders = ThreadPoolExecutor(max(MORE_LOADERS), "loader")

    def _told(self, done: int, total: int, why: str) -> None:
        self.pinned_bytes, self.why = done, why
        if why or done == total:
            self._pinned.set()

    def items(self, seed: int, pages: list[int]) -> list[StoreItem]:
        """Blocks of a prompt that the seed names, to be stored from these pages."""
        size, digest = self._sizes.block_tokens, self.namespace.digest()
        tokens = [(seed * 7919 + place * 31) % 65521 for place in range(len(pages) * size)]
        keys = block_keys(digest, tokens, size)
        made = []
        for depth, page in enumerate(pages):
            own = b"".join(
                token.to_bytes(4, "little") for token in tokens[depth * size : (depth + 1) * size]
            )
            parent: BlockKey = keys[depth - 1] if depth else NO_KEY
            source = self.pages.source(page)
            made.append(StoreItem(keys[depth], parent, digest, depth, own, source))
        return made

    def store(self, items: list[StoreItem]) -> int:
        """Store blocks and wait until they are committed: how many are."""
        result = self.client.store(items)
        self.dropped.update(result.dropped)
        return result.stored

    def load(self, items: list[StoreItem], pages: list[int], loaders: int = LOADERS) -> int:
        """Load blocks into pages, by as many threads as an engine has; all are verified then. How
        many came."""
        todo, lost = list(zip(items, pages, strict=True)), []

        def run() -> None:
            while todo:
                try:
                    item, page = todo.pop()
                except IndexError:
                    return
                wanted = Wanted(item.key, item.namespace, item.tokens, self.block_bytes)
                reason = self.client.load(wanted, self.pages.target(page), time.monotonic() + 5)
                if reason is not None:
                    lost.append(reason)

        for ended in [self._loaders.submit(run) for _ in range(loaders)]:
            ended.result()
        self.dropped.update(lost)
        return len(items) - len(lost)

    def close(self) -> None:
        """End the cache."""
        self._loaders.shutdown()
        self.client.close()


def arena_blocks(sizes: Sizes) -> int:
    """Blocks of an arena in which all that the phases look for stays."""
    return sizes.slots + max(sizes.hits) // sizes.block_tokens + 8


def moved_right(tiers: Tiers, seed: int = 1) -> bool:
    """Whether a page that went through a slot is the same, bit for bit."""
    page = tiers.pool[0].view(torch.uint8).clone()
    if page.is_cuda:
        torch.cuda.synchronize()  # a store begins when the step that wrote the page has ended
    items = tiers.items(seed, [0])
    tiers.store(items)
    tiers.pool[0].zero_()
    if page.is_cuda:
        torch.cuda.synchronize()
    tiers.load(items, [0])
    return torch.equal(tiers.pool[0].view(torch.uint8), page)


def tier_rates(sizes: Sizes, tiers: Tiers) -> Result:
    """GB/s of loads and stores, each block verified and committed, and whether what comes back is
    what went."""
    pages = list(range(min(sizes.slots, len(tiers.pool))))
    result: Result = {
        "block_bytes": sizes.page_bytes,
        "pinned_bytes": tiers.pinned_bytes,
        "pin_s": tiers.pin_s,
        "not_pinned_because": tiers.why,
        "right": moved_right(tiers),
    }
    rates: dict[str, list[float]] = {"load": [], "store": []}
    for turn in range(max(3, sizes.repeats // 4)):
        tiers.client.clear()  # nothing has to make room
        items = tiers.items(10 + turn, pages)
        began = time.perf_counter()
        stored = tiers.store(items)
        middle = time.perf_counter()
        loaded = tiers.load(items, pages)
        rates["load"].append(loaded * sizes.page_bytes / (time.perf_counter() - middle) / 1e9)
        rates["store"].append(stored * sizes.page_bytes / (middle - began) / 1e9)
    for name, measured in rates.items():
        result[f"{name}_gb_per_s"] = statistics.median(measured)
        result[f"{name}_spread_percent"] = percent(
            max(measured) - min(measured), statistics.median(measured)
        )
    result["load_gb_per_s_by_loaders"] = {
        loaders: _load_rate(tiers, items, pages, loaders) for loaders in MORE_LOADERS
    }
    result["dropped"] = dict(tiers.dropped)
    result["runs"] = {count: _run_rate(tiers, count) for count in RUN_BYTES}
    return result


def _load_rate(tiers: Tiers, items: list[StoreItem], pages: list[int], loaders: int) -> float:
    """GB/s of blocks by so many threads, after a first time in which the threads begin."""
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        loaded = tiers.load(items, pages, loaders)
        rates.append(loaded * tiers.block_bytes / (time.perf_counter() - began) / 1e9)
    return max(rates)


def _run_rate(tiers: Tiers, count: int) -> Result:
    """Copies of so many bytes from pinned memory to pages by one lane: GB/s, and what each costs
    the host to ask for."""
    count = min(count, tiers.block_bytes)
    lane, source = tiers.link.lane(), tiers.link.staging(count)
    pages = min(len(tiers.pool), 16)
    lane.load(source, 0, 0)
    lane.mark().wait()
    began = time.perf_counter()
    for page in range(pages):
        for first in range(0, tiers.block_bytes - count + 1, count):
            lane.load(source, page, first)
    asked = time.perf_counter()
    lane.mark().wait()
    copies = pages * (tiers.block_bytes // count)
    return {
        "gb_per_s": copies * count / (time.perf_counter() - began) / 1e9,
        "ask_us": 1e6 * (asked - began) / copies,
    }


class Mover:
    """A thread that moves blocks until it is left, and counts them."""

    def __init__(self, move: Callable[[], int]) -> None:
        self._move = move
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.blocks = 0
        self.error = ""

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.blocks += self._move()
        except Exception as error:
            self.error = repr(error)

    def __enter__(self) -> Mover:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def step_inflation(sizes: Sizes, steps: Steps, tiers: Tiers) -> Result:
    """How much longer a decode step is while blocks are loaded or stored beside it."""
    rows = max(rows for rows in sizes.rows if steps.fits(rows, sizes.contexts[0]))
    result: Result = {"rows": rows, "context": sizes.contexts[0]}
    # The last pages of the pool: the first ones are being read.
    pages = list(range(len(tiers.pool) - min(16, sizes.slots), len(tiers.pool)))
    tiers.client.clear()
    loaded, seeds = tiers.items(5, pages), iter(range(1000, 1 << 20))
    tiers.store(loaded)

    def load() -> int:
        return tiers.load(loaded, pages)

    def store() -> int:
        return tiers.store(tiers.items(next(seeds), pages))

    for name, move in (("load", load), ("store", store)):
        alone = steps.time_ms(rows, sizes.contexts[0])
        with Mover(move) as mover:
            began, before = time.perf_counter(), mover.blocks
            beside = steps.time_ms(rows, sizes.contexts[0])
            moved, seconds = mover.blocks - before, time.perf_counter() - began
        assert not mover.error, mover.error
        result[name] = {
            "alone_ms": alone,
            "beside_copies_ms": beside,
            "inflation_percent": percent(beside - alone, alone),
            "gb_per_s_beside": moved * sizes.page_bytes / seconds / 1e9,
        }
    return result


def hits(sizes: Sizes, model: CudaLlama, pool: torch.Tensor, tiers: Tiers) -> Result:
    """TTFT of a prompt whose blocks are in DRAM, and of the same prompt computed: by the engine's
    core, scheduler and connector, blocks loaded layer by layer beside the computation."""
    result: Result = {}
    for tokens in sizes.hits:
        if len(pages_for(sizes, 0, tokens)) + 1 > len(pool):
            result[str(tokens)] = {"skipped": "the pool is too small"}
            continue
        cached = (tokens - TAIL_TOKENS) // sizes.block_tokens * sizes.block_tokens
        prompt = [(p * 37 + tokens) % sizes.model.vocab for p in range(tokens)]
        times: dict[str, list[float]] = {"recompute": [], "dram_hit": []}
        from_dram = cached
        tiers.client.clear()
        with Engine(sizes, model, pool, tiers) as first:
            first.ttft_ms(prompt[:cached], "on")
            first.settle()
        for turn in range(max(2, sizes.repeats // 4) + 1):
            # A core of its own has nothing in its pool.
            with Engine(sizes, model, pool, tiers) as engine:
                computed, _ = engine.ttft_ms(prompt, "bypass")
                hit, came = engine.ttft_ms(prompt, "on")
                from_dram = min(from_dram, came)
            if turn:  # the first one compiles
                times["recompute"].append(computed)
                times["dram_hit"].append(hit)
        middle = {name: statistics.median(taken) for name, taken in times.items()}
        result[str(tokens)] = {
            "recompute_ms": middle["recompute"],
            "dram_hit_ms": middle["dram_hit"],
            "tokens_from_dram": from_dram,
            "times_sooner": round(middle["recompute"] / middle["dram_hit"], 2),
        }
    return result
