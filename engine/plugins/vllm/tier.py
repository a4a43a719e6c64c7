"""Kvist as a tier under vLLM's own offloading: what vLLM keeps in its pinned host memory goes on to
the sidecar, and comes back from there.

    "kv_connector": "OffloadingConnector", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
        "secondary_tiers": [{"type": "KvistTier",
            "module_path": "kvist.engine.plugins.vllm.tier", "cache": "/run/kvist/kvistd.sock"}]}

vLLM names a chunk by a hash and says nothing of its tokens. So that hash stands where a block's
tokens stand, in the key and in the record, and is compared when the chunk comes back; what hashes
to the same under another model or setting is kept apart by the namespace.

All methods are called by vLLM's scheduler. Look-ups are reads of shared memory; copies are made by
two threads, from vLLM's host memory to the sidecar's and back, once each way.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import vllm
from typing_extensions import override
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvist.cachesvc.client import open_cache
from kvist.cachesvc.log import Log, debug_detail
from kvist.engine.plugins.vllm.chunks import Chunk, ChunkNames, Courier, Job
from kvist.engine.plugins.vllm.held import Held
from kvist.engine.plugins.vllm.identity import check_version, tier_namespace
from kvist.engine.plugins.vllm.memory import BlockMemory, ScratchPage

ATTACH_WAIT_S = 2.0
# As in planning.py: for how long a request is put off while its chunks rise.
FLASH_WAIT_S = 2.0
# Of jobs that ended behind their requests some stay here for nobody.
DOOMED_MAX = 10_000
_MEDIA = {"dram": Medium.CPU, "flash": Medium.STORAGE}


class _Asked:
    """What one request asked for, kept with its ReqContext.

    Attributes:
        names: keys of its chunks so far.
        outcomes: chunk -> tier or miss reason; the first answer counts.
        rising: until when a chunk on flash is waited for; what is too late the load waits for.
    """

    def __init__(self, names: ChunkNames) -> None:
        self.names = names
        self.outcomes: dict[OffloadKey, tuple[str, bool]] = {}
        self.rising: dict[OffloadKey, float] = {}


class KvistTier(SecondaryTierManager):  # type: ignore[misc]  # vLLM is not there to check
    """See the top of the file; the methods are vLLM's, in SecondaryTierManager's words.

    Args:
        cache: path of the sidecar's socket.
        model: words that change when weights, adapters or settings of the model do; needed where
            the model is not a folder, whose content is taken.

    Raises:
        RuntimeError: a release of vLLM that was not tested.
        ValueError: a setup that is not served; the message says which.
    """

    # Of a block in DRAM, which most are; a ClassVar of vLLM's, so the same for those on flash.
    medium: ClassVar[Medium] = Medium.CPU

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        cache: str = "",
        model: str = "",
    ) -> None:  # fmt: skip
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        check_version(vllm.__version__)
        if not cache:
            raise ValueError(
                f'{tier_type}: "cache" is missing; give the path of the sidecar\'s socket, like '
                "/run/kvist/kvistd.sock"
            )
        self.locality = Locality.LOCAL
        rows = np.frombuffer(primary_kv_view, np.uint8).reshape(primary_kv_view.shape)
        device = str(current_platform.get_device_name())
        namespace = tier_namespace(offloading_spec, rows.shape[1], model, vllm.__version__, device)
        self._namespace, self._digest = namespace, namespace.digest()
        log = Log(sys.stderr, detail=debug_detail("engine", os.environ))
        page = ScratchPage(BlockMemory(rows[None]), namespace.format)
        name = str(offloading_spec.config.model.name)
        self._cache = open_cache(cache, namespace, f"vllm-tier-{os.getpid()}", log, page, name)
        if not self._cache.wait_attached(ATTACH_WAIT_S):
            log.warning("no cache yet, serving without", address=cache)
        self._courier = Courier(self._cache, rows, log)
        # Chunks whose load failed, until they are stored anew or the requests that know of them
        # end: vLLM asks at every step, and would load the same bytes again for ever.
        self._doomed: dict[OffloadKey, str] = {}
        wanted = offloading_spec.kv_events_config.enable_kv_cache_events
        self._held: Held[OffloadKey] | None = Held(self._cache) if wanted else None

    def _asked(self, req_context: ReqContext) -> _Asked:
        asked: _Asked | None = req_context.get_state(_Asked)
        if asked is None:
            asked = _Asked(ChunkNames(self._digest, self._namespace.format))
            req_context.set_state(asked)
        return asked

    def _chunk(self, key: OffloadKey, req_context: ReqContext) -> Chunk | None:
        names = self._asked(req_context).names
        if names.digest != self._digest:
            return None  # computed in part before a reset, so of neither namespace
        return names.chunk(key, req_context.get_offload_key_position(key))

    @override
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._asked(req_context)  # its chunks are of the namespace that is now
        return RequestOffloadingContext()

    @override
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT in DRAM; RETRY while it rises from flash; MISS."""
        asked, chunk = self._asked(req_context), self._chunk(key, req_context)
        if chunk is None or key in self._doomed:
            asked.outcomes[key] = self._doomed.get(key, "no_cache"), False
            return LookupResult.MISS
        tiers = self._cache.tiers([chunk.key])
        if not tiers:
            reason = self._cache.lookup([chunk.key]).reason or "evicted"
            asked.outcomes.setdefault(key, (reason, False))
            return LookupResult.MISS
        asked.outcomes.setdefault(key, (tiers[0], True))
        if tiers == ("flash",):
            if key not in asked.rising:
                asked.rising[key] = time.monotonic() + FLASH_WAIT_S
                self._cache.prefetch([chunk.key], 1)
            if time.monotonic() < asked.rising[key]:
                return LookupResult.RETRY
        if self._held is not None:
            self._held.watch(key, [chunk.key])
        return LookupResult.HIT

    @override
    def submit_store(self, job_metadata: TransferJob) -> None:
        job = self._job(job_metadata)
        for key, chunk in zip(job_metadata.keys, job.chunks, strict=True):
            self._doomed.pop(key, None)
            if self._held is not None and chunk is not None:
                self._held.watch(key, [chunk.key])
        self._courier.store(job)

    @override
    def submit_load(self, job_metadata: TransferJob) -> None:
        self._courier.load(self._job(job_metadata))

    def _job(self, asked: TransferJob) -> Job:
        chunks = [self._chunk(key, asked.req_context) for key in asked.keys]
        return Job(asked, chunks, [int(row) for row in asked.chunk_ids])

    @override
    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for job in self._courier.take_ended():
            keys: list[OffloadKey] = list(job.asked.keys)
            came = [key for key, reason in zip(keys, job.reasons, strict=True) if not reason]
            if job.asked.is_promotion:
                outcomes = self._asked(job.asked.req_context).outcomes
                failed = zip(keys, job.reasons, strict=True)
                for key, reason in ((key, reason) for key, reason in failed if reason):
                    self._doomed[key] = reason
                    outcomes[key] = reason, False
                while len(self._doomed) > DOOMED_MAX:
                    self._doomed.pop(next(iter(self._doomed)))
            results.append(
                JobResult(
                    job.asked.job_id,
                    success=len(came) == len(keys),
                    successful_keys=came if job.asked.is_promotion else None,
                    transfer_time=job.seconds,
                    transfer_bytes=len(came) * self.block_size_bytes,
                )
            )
        return results

    @override
    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        for key in keys:
            chunk = self._chunk(key, req_context)
            if chunk is not None:
                self._cache.touch([chunk.key], 1)

    @override
    def on_request_finished(self, req_context: ReqContext) -> None:
        """Account for what was asked, once."""
        asked = self._asked(req_context)
        tokens = self._namespace.format.block_tokens
        hits: dict[str, int] = {}
        misses: dict[str, int] = {}
        for key, (said, is_hit) in asked.outcomes.items():
            self._doomed.pop(key, None)
            counted = hits if is_hit else misses
            counted[said] = counted.get(said, 0) + tokens
        if asked.outcomes:
            self._cache.count(len(asked.outcomes) * tokens, hits, misses)
        asked.outcomes = {}

    @override
    def take_events(self) -> Iterable[OffloadingEvent]:
        """Chunks that came, moved or went, where vLLM's KV events are on."""
        for change in self._held.look() if self._held is not None else ():
            for tier, removed in ((change.now, False), (change.before, True)):
                if tier is not None:
                    yield OffloadingEvent(
                        [change.block], _MEDIA[tier], removed, self.locality, self.tier_type
                    )

    @override
    def drain_jobs(self) -> None:
        """vLLM calls this when it resets its cache, as after a change of weights, and only then.

        It says no more than that to a tier. So, as in planning.py, from now on chunks are of a
        namespace that nobody has had.
        """
        self._courier.drain()
        model = f"{self._namespace.model}/{secrets.token_hex(8)}"
        self._namespace = replace(self._namespace, model=model)
        self._digest = self._namespace.digest()
        self._doomed.clear()
        if self._held is not None:
            self._held.forget()

    @override
    def shutdown(self) -> None:
        """End the threads, which takes as long as the copies under way, and detach."""
        self._courier.close()
        self._cache.close()
