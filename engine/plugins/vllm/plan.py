"""What the two halves tell each other by way of vLLM, once a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvist.engine.plugins.vllm.planning import Work
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
    """Scheduler to workers: what each is to copy beside a step.

    Attributes:
        works: by rank; empty when there is no cache.
        rising: a request is put off while its blocks rise from flash.
        idle: nothing is computed in this step.
    """

    works: list[Work] = field(default_factory=list)
    rising: bool = False
    idle: bool = False


@dataclass
class Results(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Workers to scheduler: request id -> for each rank whose load has ended, leading blocks that
    came, and why no more ("" if all)."""

    loaded: dict[str, list[tuple[int, str]]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Results:
        """See KVConnectorWorkerMetadata."""
        assert isinstance(other, Results)
        both = {name: list(ended) for name, ended in self.loaded.items()}
        for name, ended in other.loaded.items():
            both.setdefault(name, []).extend(ended)
        return Results(both)
