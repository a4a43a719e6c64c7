"""What the two halves tell each other by way of vLLM, once a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvist.engine.plugins.vllm.lookups import Load, Save
from kvist.proto.keys import Namespace


@dataclass
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # vLLM is not there to check
    """Worker to scheduler, at start: what the blocks are.

    Attributes:
        namespace: without a request's adapter and salt.
    """

    namespace: Namespace


@dataclass
class Plan(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to worker: what is to be copied beside a step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass
class Results(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Worker to scheduler: request id -> leading blocks that came, and why no more ("" if all)."""

    loaded: dict[str, tuple[int, str]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Results:
        """See KVConnectorWorkerMetadata; there is one worker."""
        assert isinstance(other, Results)
        return Results({**self.loaded, **other.loaded})
