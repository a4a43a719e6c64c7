"""Decoding with and without steps that overlap: tokens per second, and how long the model idles.

Two engine cores of one model in this process, one with --async-scheduling, one without, take turns
for --rounds rounds at each batch size; no HTTP, no cache below the pool. The gap of a step is the
time from the end of one forward pass to the beginning of the next: the schedule, the sampler, the
bookkeeping and the sending, as far as they are not done beside the computation.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvist.engine.process import SPIN_ROUNDS

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)  # as the core has it; before torch is loaded

import msgspec
import torch

from kvist.cachesvc.log import Log
from kvist.engine.config import EngineConfig
from kvist.engine.core import Core
from kvist.engine.models.base import Chunk, Model, ModelConfig
from kvist.engine.opening import open_parts
from kvist.engine.request import Abort, FromCore, NewRequest, SamplingParams, ToCore
from kvist.engine.runner import Runner
from kvist.engine.sampler import Sampler
from kvist.tiers.hbm import PagePool

if TYPE_CHECKING:
    from kvist.engine.opening import Parts

WARM_STEPS = 8
PROMPT_TOKENS = 64
Forward = Callable[..., torch.Tensor]


class Timed:
    """A model that notes when its forward passes begin and end."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.config: ModelConfig = model.config
        self.times: list[tuple[float, float]] = []

    def forward(
        self,
        chunks: Sequence[Chunk],
        pool: torch.Tensor,
        before_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """See Model.forward."""
        began_s = time.perf_counter()
        logits = self._model.forward(chunks, pool, before_layer)
        self.times.append((began_s, time.perf_counter()))
        return logits


class MemoryLink:
    """A link that encodes what is sent and keeps nothing."""

    def __init__(self) -> None:
        self.inbox: list[ToCore] = []
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, timeout_s: float | None = 0.0) -> list[ToCore]:
        """See core.Link; there is nobody to wait for."""
        del timeout_s
        taken, self.inbox = self.inbox, []
        return taken

    def send(self, message: FromCore) -> None:
        """See core.Link."""
        self._encoder.encode(message)


class Engine:
    """One core, stepped by hand."""

    def __init__(self, parts: Parts, config: EngineConfig, model: Timed) -> None:
        self.model = model
        self._link = MemoryLink()
        self._runner = parts.runner
        self._core = Core(self._link, parts, config, Log(io.StringIO()), time.monotonic)
        self._core.begin()

    def decode(self, batch: int, steps: int) -> tuple[float, float]:
        """Tokens per second and the median gap in microseconds, over so many steps."""
        draw = random.Random(0)
        params = SamplingParams(max_tokens=10**6, temperature=0.0, ignore_eos=True)
        for number in range(batch):
            prompt = [draw.randrange(3, self.model.config.vocab) for _ in range(PROMPT_TOKENS)]
            self._link.inbox.append(NewRequest(str(number), prompt, params, cache="bypass"))
        for _ in range(batch * PROMPT_TOKENS // 512 + WARM_STEPS):
            self._turn()
        self.model.times.clear()
        began_s = time.perf_counter()
        for _ in range(steps):
            self._turn()
        seconds = time.perf_counter() - began_s
        gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(self.model.times)]
        self._link.inbox += [Abort(str(number)) for number in range(batch)]
        for _ in range(3):
            self._turn()
        return batch * steps / seconds, statistics.median(gaps) * 1e6

    def close(self) -> None:
        """End its thread, if it has one."""
        self._runner.close()

    def _turn(self) -> None:
        self._core.turn()


def engines(arguments: argparse.Namespace) -> dict[bool, Engine]:
    """A core of each kind; they share the model's weights."""
    made: dict[bool, Engine] = {}
    model: Model | None = None
    for overlap in (False, True):
        config = EngineConfig(
            model=arguments.model,
            device="cpu",
            dtype=arguments.dtype,
            threads=arguments.threads,
            cache="off",
            kv_cache_bytes=256 << 20,
            async_scheduling=overlap,
        )
        parts = open_parts(config, Log(io.StringIO()), time.monotonic)
        model = parts.runner.model if model is None else model
        timed = Timed(model)
        pool = PagePool(parts.format, parts.pages.total)
        runner = Runner(timed, pool.tensor, Sampler(0))
        made[overlap] = Engine(dataclasses.replace(parts, runner=runner), config, timed)
    return made


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Rounds in which both take their turn, at each batch size."""
    pair = engines(arguments)
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for batch in arguments.batch:
            got: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            for number in range(arguments.rounds):
                for overlap in (False, True) if number % 2 == 0 else (True, False):
                    got[overlap].append(pair[overlap].decode(batch, arguments.steps))
            for overlap, values in got.items():
                rates = sorted(rate for rate, _ in values)
                gap = statistics.median(gap for _, gap in values)
                row = {"batch": batch, "async": overlap, "gap_us": round(gap)}
                row |= {"tokens_per_s": round(statistics.median(rates), 1)}
                rows.append(row | {"spread": [round(rates[0], 1), round(rates[-1], 1)]})
    for engine in pair.values():
        engine.close()
    return rows


def main() -> int:
    """Run, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="as for kvist serve (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the computation (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="that compute (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="sizes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="in a round (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments)
    by_batch = {
        str(batch): {bool(row["async"]): row for row in rows if row["batch"] == batch}
        for batch in arguments.batch
    }
    ratios = {
        batch: round(
            float(str(pair[True]["tokens_per_s"])) / float(str(pair[False]["tokens_per_s"])), 3
        )
        for batch, pair in by_batch.items()
    }
    result = {
        "bench": "host_gap",
        "threads": arguments.threads,
        "rows": rows,
        "async_ratio": ratios,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
