"""A collector of traces: a real OTLP receiver over gRPC that keeps what it gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, slots=True)
class Span:
    """What came of a span; ids in hex, times in ns since 1970."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    kind: int
    error: str

    @property
    def length(self) -> int:
        """Nanoseconds."""
        return self.end - self.start


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """Attributes: endpoint; spans, in the order in which they came."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._lock = Lock()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002
        """Take spans."""
        with self._lock:
            for each in request.resource_spans:
                service = _plain(each.resource.attributes)["service.name"]
                for scope in each.scope_spans:
                    self.spans += [_span(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """Spans of a name."""
        with self._lock:
            return [span for span in self.spans if span.name == name]

    def under(self, parent: Span) -> list[Span]:
        """Children of a span, by their beginning."""
        with self._lock:
            children = [span for span in self.spans if span.parent == parent.id]
        return sorted(children, key=lambda span: span.start)

    def close(self) -> None:
        """Receive no more."""
        self._server.stop(None).wait()


def _span(service: str, span: Any) -> Span:
    return Span(
        service, span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
        span.start_time_unix_nano, span.end_time_unix_nano, _plain(span.attributes), span.kind,
        span.status.message,
    )  # fmt: skip


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
