"""The connector itself: vLLM's calls, handed to the scheduler's or to the worker's half.

    --kv-transfer-config '{"kv_connector": "KvistConnector",
        "kv_connector_module_path": "kvist.engine.plugins.vllm", "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvist.cache": "/run/kvist/kvistd.sock"}}'

vLLM makes one of these where it schedules and one in each worker. The worker's says at start what
its blocks are (the handshake), so that both have one namespace, taken from the tensors themselves.
"""

# vLLM calls some methods with more than this plugin needs.
# ruff: noqa: ARG002

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
import vllm
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.log import Log, debug_detail
from kvist.engine.plugins.vllm.copying import Copier
from kvist.engine.plugins.vllm.events import Events
from kvist.engine.plugins.vllm.identity import (
    ADDRESS,
    check_version,
    namespace_of,
    refusal,
    unknown_settings,
)
from kvist.engine.plugins.vllm.memory import BlockMemory, ScratchPage, map_memory, try_memory
from kvist.engine.plugins.vllm.metrics import KvistPromMetrics, KvistStats
from kvist.engine.plugins.vllm.plan import Handshake, Plan, Results
from kvist.engine.plugins.vllm.planning import Planner, Roles, Work
from kvist.engine.plugins.vllm.pool import PoolGauge

# A sidecar that is there answers in milliseconds; one that is not comes when it comes.
ATTACH_WAIT_S = 2.0
# With no step to compute, vLLM asks again and again whether a load has ended, and takes from the
# threads the time that they copy in: each round holds the interpreter's lock for some 3 ms. A
# request that arrives meanwhile waits as long at most.
IDLE_WAIT_S = 0.02
# The same while blocks rise: the processor that vLLM would ask with is the one that reads them.
RISE_WAIT_S = 0.002
_SOURCES = {"dram": CacheHitSource.HOST, "flash": CacheHitSource.DISK}


class KvistConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the top of the file; the methods are vLLM's, in KVConnectorBase_V1's words.

    Raises:
        RuntimeError: a release of vLLM that was not tested.
        ValueError: a setup that is not served, or a wrong setting; the message says which.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_version(vllm.__version__)
        problem = refusal(vllm_config, kv_cache_config)
        if problem:
            raise ValueError(f"KvistConnector: {problem}")
        transfer = self._kv_transfer_config
        unknown = unknown_settings(transfer.kv_connector_extra_config)
        if unknown:
            raise ValueError(
                f"KvistConnector: kv_connector_extra_config has {', '.join(unknown)}, which it "
                f'does not know; it knows "{ADDRESS}"'
            )
        self._address = transfer.get_from_extra_config(ADDRESS, "")
        if not self._address:
            raise ValueError(
                f'KvistConnector: kv_connector_extra_config["{ADDRESS}"] is missing; give the '
                "path of the sidecar's socket, like /run/kvist/kvistd.sock"
            )
        # A cache never fails a request: what cannot be loaded is computed. vLLM's default would
        # end the request with an error; it reads this right after the connector is made.
        transfer.kv_load_failure_policy = "recompute"
        self._roles = Roles(loads=transfer.is_kv_consumer, saves=transfer.is_kv_producer)
        self._log = Log(sys.stderr, detail=debug_detail("engine", os.environ))
        self._planner: Planner | None = None
        self._events: Events | None = None
        self._gauge: PoolGauge | None = None
        self._copier: Copier | None = None
        self._handshake: Handshake | None = None
        self._rank = 0
        self._results: dict[str, list[tuple[int, str]]] = {}
        self._bad_blocks: set[int] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is lost is a miss later, no more."""
        return False

    def _open(self, half: str, handshake: Handshake, page: ScratchPage | None) -> CacheClient:
        name = f"vllm-{half}{self._rank}-{os.getpid()}"
        model = str(self._vllm_config.model_config.model)
        client = open_cache(self._address, handshake.namespace, name, self._log, page, model)
        if not client.wait_attached(ATTACH_WAIT_S):
            self._log.warning("no cache yet, serving without", address=self._address)
        return client

    # The worker's half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the blocks in memory, try them, say what they are, attach."""
        kv = self._kv_cache_config
        runs = map_memory(kv.kv_cache_tensors, kv.num_blocks, kv_caches)
        names = kv.kv_cache_tensors[0].layers
        memory = BlockMemory(runs)
        try_memory(memory, [kv_caches[name] for name in names])
        context = self._vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in names]
        self._rank = get_tp_group().rank_in_group
        namespace = namespace_of(self._vllm_config, kv, layers, vllm.__version__, self._rank)
        if namespace.format.payload_bytes != memory.payload_bytes:
            raise ValueError(
                f"KvistConnector: a block has {memory.payload_bytes} bytes in memory and "
                f"{namespace.format.payload_bytes} by vLLM's description"
            )
        self._handshake = Handshake(namespace)
        page = ScratchPage(memory, namespace.format)
        self._copier = Copier(self._open("worker", self._handshake, page), memory, self._log)
        self._log.info(
            "kvist under vllm", block_bytes=memory.payload_bytes, model=namespace.model,
            compute=namespace.compute,
        )  # fmt: skip

    def get_handshake_metadata(self) -> Handshake | None:
        """The namespace, for the scheduler's half."""
        return self._handshake

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """A step begins: what it may overwrite has been copied out when this returns.

        Then its loads begin, beside its forward pass. vLLM calls start_load_kv behind the pass, and
        a load that begins there is seen to have ended one step later.
        """
        assert isinstance(kv_connector_metadata, Plan)
        if self._copier is not None:
            self._copier.begin_step()
            for load in self._work(kv_connector_metadata).loads:
                self._copier.load(load)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """The step's loads have begun already; none of them is for the step itself."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs when all its blocks are there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing yet: blocks are copied whole, when the forward pass is over."""

    def wait_for_save(self) -> None:
        """The forward pass is over, or broken off: begin to copy what is complete."""
        if self._copier is not None:
            self._copier.end_step(self._work(self._plan()).saves)

    def _plan(self) -> Plan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, Plan)
        return plan

    def _work(self, plan: Plan) -> Work:
        return plan.works[self._rank] if plan.works else Work()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Loads that have ended; nothing is ever held for a store."""
        if self._copier is None:
            return None, None
        plan = self._plan()
        ended = self._copier.take_ended(IDLE_WAIT_S if plan.idle else 0.0)
        if plan.idle and not ended and plan.rising:
            time.sleep(RISE_WAIT_S)
        for job in ended:
            self._results[job.load.request] = [(job.came, job.reason)]
            self._bad_blocks.update(job.load.blocks[job.came :])
        return None, {job.load.request for job in ended} or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that did not come, for vLLM to compute."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def build_connector_worker_meta(self) -> Results | None:
        """How loads ended, for the scheduler's half."""
        results, self._results = self._results, {}
        return Results(results) if results else None

    # The scheduler's half.

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """The workers have said what their blocks are."""
        handshakes = [metadata[rank] for rank in sorted(metadata)]
        if not all(isinstance(one, Handshake) for one in handshakes):
            raise ValueError(
                "KvistConnector: vLLM handed over what another connector's workers said; list "
                "KvistConnector first in MultiConnector's connectors"
            )
        if len({one.namespace.format for one in handshakes}) != 1:
            raise ValueError("KvistConnector: the ranks of this model have blocks of several kinds")
        client = self._open("scheduler", handshakes[0], None)
        self._planner = Planner(client, [one.namespace for one in handshakes], self._roles)
        wanted = self._vllm_config.kv_events_config
        if wanted is not None and wanted.enable_kv_cache_events:
            self._events = Events(client, handshakes[0].namespace.format.block_tokens)
            self._planner.watch = self._events.watch

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """See pool.py."""
        self._gauge = PoolGauge(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        """See Planner.arrive."""
        if self._planner is not None:
            self._planner.arrive(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See Planner.matched; loads are always asynchronous."""
        if self._planner is None:
            return 0, False
        tokens = self._planner.matched(request, num_computed_tokens)
        return tokens, bool(tokens)

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """DRAM is vLLM's host, flash its disk."""
        if self._planner is None:
            return {}
        tiers = self._planner.sources(request, num_external_tokens)
        return {_SOURCES[tier]: tokens for tier, tokens in tiers.items()}

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See Planner.admitted."""
        if self._planner is not None:
            (block_ids,) = blocks.get_block_ids()
            self._planner.admitted(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Plan:
        """See Planner.plan."""
        if self._planner is None:
            return Plan()
        if self._gauge is not None:
            self._planner.tell(self._gauge)
        works = self._planner.plan(scheduler_output)
        return Plan(works, self._planner.rising, not scheduler_output.num_scheduled_tokens)

    def update_connector_output(self, connector_output: Any) -> None:
        """See Planner.loaded."""
        results = connector_output.kv_connector_worker_meta
        if self._planner is not None and isinstance(results, Results):
            self._planner.loaded(results.loaded)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed at once; see copying.py."""
        if self._planner is not None:
            self._planner.finished(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See request_finished."""
        return self.request_finished(request, [])

    def take_events(self) -> Iterable[KVCacheEvent]:
        """See events.py; nothing where vLLM's KV events are off."""
        return () if self._events is None else self._events.take()

    def reset_cache(self) -> bool | None:
        """See Planner.reset."""
        if self._planner is not None:
            self._planner.reset()
        if self._events is not None:
            self._events.forget()
        return True

    # Both.

    def get_kv_connector_stats(self) -> KvistStats | None:
        """Counts of this half since the last call."""
        half = self._planner or self._copier
        counts = {} if half is None else half.take_counts()
        return KvistStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvistStats:
        """Counts that came from another process."""
        return KvistStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvistPromMetrics:
        """See metrics.py."""
        return KvistPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """End the threads and detach; stores under way get a moment."""
        planner, self._planner = self._planner, None
        copier, self._copier = self._copier, None
        if planner is not None:
            planner.close()
        if copier is not None:
            copier.close()
