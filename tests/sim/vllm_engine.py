"""Both halves of the vLLM plugin over KV memory as vLLM lays it out; steps are made by hand."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvist.engine.plugins.vllm.copying import Copier, LoadJob
from kvist.engine.plugins.vllm.lookups import Save
from kvist.engine.plugins.vllm.memory import BlockMemory, map_memory
from kvist.engine.plugins.vllm.planning import Planner, Roles
from sim.sidecar import QUIET, Sidecar, wait_until
from sim.vllm_memory import BLOCKS, LAYERS, NAMESPACE, SIZE, vllm_memory

BOTH = Roles(loads=True, saves=True)


class Request:
    """The fields of vLLM's Request that the plugin reads."""

    def __init__(self, name: str, tokens: list[int], salt: str | None = None) -> None:
        self.request_id = name
        self.prompt_token_ids: list[int] | None = tokens
        self.all_token_ids = list(tokens)
        self.num_prompt_tokens = len(tokens)
        self.num_computed_tokens = 0
        self.cache_salt = salt
        self.prompt_embeds: object = None
        self.resumable = False
        self.lora_request: Any = None
        self.mm_features: list[Any] = []

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def step(planner: Planner, request: Request, tokens: int, blocks: list[int]) -> list[Save]:
    """A step of vLLM that computes some tokens of one request."""
    planner.arrive(request)
    state = SimpleNamespace(get_block_ids={request.request_id: (blocks,)}.__getitem__)
    output = SimpleNamespace(
        num_scheduled_tokens={request.request_id: tokens}, kv_connector_block_state=state
    )
    (work,) = planner.plan(output)
    request.num_computed_tokens += tokens
    return work.saves


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=tokens)


class Engine:
    """Both halves over one KV memory; steps are made by hand."""

    def __init__(self, sidecar: Sidecar, roles: Roles = BOTH) -> None:
        placement, self.caches = vllm_memory()
        self.runs = map_memory(placement, BLOCKS, self.caches)
        self.memory = BlockMemory(self.runs)
        self.clients = [sidecar.client(half, NAMESPACE) for half in ("scheduler", "worker")]
        self.planner = Planner(self.clients[0], [NAMESPACE], roles)
        self.copier = Copier(self.clients[1], self.memory, QUIET)

    def compute(self, request: Request, blocks: list[int]) -> None:
        """One step that computes a whole prompt, and its saves."""
        draw = np.random.default_rng(request.all_token_ids[0])
        for block in blocks:
            self.runs[:, block] = draw.integers(0, 256, (LAYERS, self.memory.run_bytes))
        self.planner.admitted(request, blocks, 0)
        self.copier.save(step(self.planner, request, request.num_tokens, blocks))
        self.copier.wait_gathered()

    def load(self, request: Request, blocks: list[int]) -> LoadJob:
        """Bring in what is cached; returns how that ended."""
        tokens = self.planner.matched(request, 0)
        assert tokens
        self.planner.admitted(request, blocks, tokens)
        (work,) = self.planner.plan(SimpleNamespace(num_scheduled_tokens={}))
        assert not work.saves
        (load,) = work.loads
        self.copier.load(load)
        (job,) = self.copier.take_ended(10.0)
        self.planner.loaded({request.request_id: [(job.came, job.reason)]})
        return job

    def stored(self, request: Request) -> None:
        """Wait until all full blocks of a request are cached."""
        fresh = Request("probe", request.all_token_ids, request.cache_salt)
        usable = (fresh.num_tokens - 1) // SIZE * SIZE
        wait_until(lambda: self.planner.matched(fresh, 0) == usable, "blocks to be stored")
        self.planner.finished("probe")

    def close(self) -> None:
        self.planner.close()
        self.copier.close()
