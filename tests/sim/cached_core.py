"""A core with a real cache that has a prompt which its pool has no more, and what it answers."""

from __future__ import annotations

import io
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvist.cachesvc.catalog.location import Location
from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.cost import Choice
from kvist.engine.config import EngineConfig
from kvist.engine.opening import open_parts
from kvist.proto.keys import BlockKey, KeyChain
from kvist.proto.record import header_length
from sim.core_thread import CoreThread

BLOCK_TOKENS = 16
POOL_BYTES = 1 << 20  # 128 pages, 2048 tokens
PROMPT_TOKENS = 500
BLOCKS = 31
VOCAB = 256
# Of an engine that such prompts fill.
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "block_tokens": BLOCK_TOKENS,
    "kv_cache_bytes": POOL_BYTES,
    "max_num_batched_tokens": 256,
    "threads": 1,
    "cache_dram_bytes": 16 << 20,
    "cache_flash_bytes": 0,
}
Answer = list[tuple[int, float]]


def prompt(seed: int, length: int = PROMPT_TOKENS) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB) for _ in range(length)]


class Cached:
    """A core whose cache has prompt(1), and whose pool has it no more.

    Attributes:
        expected: the answer of a full computation.
    """

    def __init__(self, model: str, folder: Path, cache: str = "embedded", **more: Any) -> None:
        config = {**SETTINGS, "cache": cache, **more}
        self.log = io.StringIO()
        parts = open_parts(EngineConfig(model=model, **config), Log(self.log), time.monotonic)
        self.core = CoreThread(folder, parts, **config)
        self.core.start()
        self.expected = self.answer(self.submit())
        self.core.settle()
        for seed in range(2, 7):
            self.core.generate(prompt(seed), 4, ignore_eos=True)
        self.core.settle()
        client = parts.connector._cache
        assert isinstance(client, CacheClient)
        self.client = client
        weigher = parts.connector.weigher
        assert weigher is not None
        # What is cheaper is measured elsewhere; here everything is loaded.
        weigher.cost.choose = lambda _first, tiers, *_more: Choice(len(tiers), 0, 0, 0)  # type: ignore[method-assign]

    def answer(self, request: str) -> Answer:
        """Tokens of a request and their log-probabilities, which tell of any wrong bit."""
        tokens = self.core.tokens(request)
        deltas = self.core.deltas[request]
        return list(zip(tokens, [p.chosen for d in deltas for p in d.logprobs], strict=True))

    def submit(self, tokens: list[int] | None = None) -> str:
        """Send prompt(1) or another."""
        return self.core.submit(tokens or prompt(1), 12, ignore_eos=True, logprobs=0)

    def ask(self, tokens: list[int] | None = None) -> tuple[Answer, int]:
        """The answer, and how many of its prompt tokens came from the cache."""
        request = self.submit(tokens)
        answer = self.answer(request)
        cached = self.core.deltas[request][0].cached
        assert cached is not None
        return answer, cached.dram + cached.flash

    @property
    def keys(self) -> list[BlockKey]:
        """Of the blocks of prompt(1)."""
        chain = KeyChain(self.core.parts.digests.of(""), BLOCK_TOKENS)
        chain.extend(prompt(1))
        return chain.keys[:BLOCKS]

    def place(self, block: int) -> Location:
        """Where a block is."""
        assert self.client._life is not None
        place = self.client._life.index.find(self.keys[block])
        assert place is not None
        return place

    def payload(self, block: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """A block's bytes in the arena."""
        life, slot = self.client._life, self.place(block).dram
        assert life is not None
        assert slot is not None
        start = header_length(4 * BLOCK_TOKENS)
        length = self.core.parts.format.payload_bytes
        return np.frombuffer(life.arena._slot(slot), np.uint8, length, start)
