"""A scripted engine core: the real messages over the real wire, tokens without a model.

An answer repeats the prompt's own tokens from a place that the prompt and the seed decide, so it is
natural text, always the same for greedy requests, and needs no tokenizer. Full blocks of prompts
seen before count as cached in HBM. What goes wrong is asked for:

    KVIST_SIM=fatal       says Fatal instead of Ready
    KVIST_SIM=exit        ends before it says anything
    cache_salt "fail"     the request ends with finish_reason "error"

Run as `core.py serve MODEL ...` it is `kvist serve` with this core; run with an endpoint and a
process id, as the server does, it is the core.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvist.engine.config import EngineConfig, add_serve_flags, config_from_flags
from kvist.engine.ipc import ApiLink
from kvist.engine.process import CoreProcess, run_as_core
from kvist.engine.request import (
    CACHE_BYPASS,
    Abort,
    CachedTokens,
    CoreStats,
    Delta,
    Loading,
    NewRequest,
    Outputs,
    Ready,
    TokenLogprobs,
)
from kvist.engine.serve import serve
from kvist.proto.errors import KvistError

STEP_SECONDS = 0.002
PAGES = 256
TOKEN_BYTES = 1024
CONTEXT_TOKENS = 4096
SIM_COMMAND = (sys.executable, "-P", str(Path(__file__).resolve()))


class SimRequest:
    """A request on its way: which token comes next."""

    def __init__(self, asked: NewRequest, cached: int) -> None:
        params = asked.params
        digest = hashlib.sha256(repr(asked.prompt).encode()).digest()
        seed = params.seed if params.temperature > 0 else 0
        self.asked = asked
        self.cached = cached
        self.sent = 0
        draw = random.Random(digest if seed == 0 else digest + repr(seed).encode())
        self._offset = draw.randrange(len(asked.prompt))

    def step(self) -> Delta:
        """The next token."""
        params = self.asked.params
        prompt = self.asked.prompt
        token = prompt[(self._offset + self.sent) % len(prompt)]
        self.sent += 1
        reason = None
        if token in params.stop_token_ids:
            reason = "stop"
        elif self.sent == params.max_tokens:
            reason = "length"
        logprobs = []
        if params.logprobs is not None:
            top = [(other, -0.5 - i) for i, other in enumerate([token, *prompt][: params.logprobs])]
            logprobs = [TokenLogprobs(-0.5, top)]
        first = self.sent == 1
        cached = CachedTokens(hbm=self.cached) if first else None
        return Delta(
            self.asked.id, [token], logprobs, reason, None, cached, 0.001 * first, 0.002 * first
        )


class SimCore:
    """The loop: take messages, step every request, send."""

    def __init__(self, config: EngineConfig, link: ApiLink) -> None:
        self._config = config
        self._link = link
        self._live: dict[str, SimRequest] = {}
        self._seen: set[tuple[str, tuple[int, ...]]] = set()
        self._stats = CoreStats(pages_total=PAGES, hits_tokens={"hbm": 0, "dram": 0, "flash": 0})

    def run(self) -> None:
        """Until the process is told to end."""
        context = min(self._config.max_model_len or CONTEXT_TOKENS, CONTEXT_TOKENS)
        self._link.send(Loading(1, 2))
        size = self._config.block_tokens
        self._link.send(
            Ready(context, size, PAGES, size * TOKEN_BYTES, "float32", "bfloat16", "51" * 32)
        )
        while True:
            before = len(self._live)
            for message in self._link.receive(STEP_SECONDS if self._live else None):
                if isinstance(message, Abort):
                    self._live.pop(message.id, None)
                elif message.cache_salt == "fail":
                    self._send([Delta(message.id, [], [], "error", "the simulated core refuses")])
                else:
                    self._live[message.id] = SimRequest(message, self._look_up(message))
            deltas = [request.step() for request in list(self._live.values())]
            for delta in deltas:
                if delta.finish_reason is not None:
                    del self._live[delta.id]
            if deltas or before != len(self._live):
                self._send(deltas)

    def _look_up(self, request: NewRequest) -> int:
        """Cached tokens of a prompt; a hit never covers it whole, as in the real core."""
        stats, size = self._stats, self._config.block_tokens
        tokens = len(request.prompt)
        cached = 0
        if request.cache == CACHE_BYPASS or not self._config.enable_prefix_caching:
            self._stats = msgspec.structs.replace(
                stats, computed_tokens=stats.computed_tokens + tokens
            )
            return 0
        for end in range(size, tokens + 1, size):
            key = (request.cache_salt, tuple(request.prompt[:end]))
            if key in self._seen and end < tokens:
                cached = end
            self._seen.add(key)
        misses = stats.misses_tokens.get("never_seen", 0) + tokens - cached
        self._stats = msgspec.structs.replace(
            stats,
            queries_tokens=stats.queries_tokens + tokens,
            hits_tokens={**stats.hits_tokens, "hbm": stats.hits_tokens["hbm"] + cached},
            misses_tokens={"never_seen": misses},
            computed_tokens=stats.computed_tokens + tokens - cached,
        )
        return cached

    def _send(self, deltas: list[Delta]) -> None:
        self._stats = msgspec.structs.replace(
            self._stats,
            running=len(self._live),
            pages_used=min(PAGES, len(self._live)),
            steps=self._stats.steps + 1,
            step_tokens=len(deltas),
            generated_tokens=self._stats.generated_tokens + len(deltas),
        )
        self._link.send(Outputs(deltas, self._stats))


def run_sim_core(config: EngineConfig, endpoint: str) -> None:
    """The simulated core's main; the shape of the real one's."""
    trouble = os.environ.get("KVIST_SIM")
    if trouble == "fatal":
        raise KvistError("the simulated model is too large")
    if trouble == "exit":
        raise SystemExit(3)
    link = ApiLink(endpoint)
    try:
        SimCore(config, link).run()
    finally:
        link.close()


def main(arguments: Sequence[str]) -> int:
    """Be the server or be its core."""
    if arguments[0] != "serve":
        return run_as_core(arguments, sys.stdin.buffer.read(), run_sim_core)
    parser = argparse.ArgumentParser()
    add_serve_flags(parser)
    return serve(config_from_flags(parser.parse_args(arguments[1:])), CoreProcess(SIM_COMMAND))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
