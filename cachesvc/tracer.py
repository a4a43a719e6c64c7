"""The tracer: makes spans of notes and exports them by OTLP, on a thread of the SDK's.

OpenTelemetry is imported when a tracer is made and at no other time. Which traces are sampled, how
spans are batched and what the service is called can be set by the SDK's own variables:
OTEL_TRACES_SAMPLER, OTEL_BSP_..., OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_PROTOCOL and so on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from kvist.proto.errors import ConfigInvalid
from kvist.proto.trace import SpanNote, TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import SpanContext

# The SDK tries again for 8 s, and a program that was told to end shall end.
CLOSE_S = 2.0
PROTOCOLS = ("grpc", "http/protobuf")


class Tracer:
    """Any thread may use it.

    Args:
        exporter: where spans go.
        service: name of the program, unless the environment names it.
        environment: the process's variables.
        wall: seconds since 1970. now: seconds of CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        service: str,
        environment: Mapping[str, str] = os.environ,
        wall: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        attributes: dict[str, str | int] = {
            "service.version": version("kvist"),
            "process.pid": os.getpid(),
        }
        given = environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
        if not environment.get("OTEL_SERVICE_NAME") and "service.name=" not in given:
            attributes["service.name"] = service
        self._resource = Resource.create(attributes)
        provider = TracerProvider(resource=self._resource, shutdown_on_exit=False)
        self._sampler, self._ids = provider.sampler, provider.id_generator
        self._processor = BatchSpanProcessor(exporter)
        self._scope = InstrumentationScope("kvist", version("kvist"))
        self._wall, self._now = wall, now

    def begin(self, name: str, parent: TraceContext | None) -> TraceContext | None:
        """The place of a new span, in its parent's trace or one of its own; None: not sampled."""
        from opentelemetry.trace import NonRecordingSpan, SpanKind, set_span_in_context

        above = set_span_in_context(NonRecordingSpan(_context(parent))) if parent else None
        trace = int(parent.trace, 16) if parent else self._ids.generate_trace_id()
        choice = self._sampler.should_sample(above, trace, name, SpanKind.SERVER)
        if not choice.decision.is_sampled():  # type: ignore[no-untyped-call]
            return None
        return TraceContext(f"{trace:032x}", f"{self._ids.generate_span_id():016x}")

    def emit(self, note: SpanNote) -> None:
        """Queue a span; one that finds no room is dropped."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanKind, Status, StatusCode

        offset_s = self._wall() - self._now()
        parent = TraceContext(note.at.trace, note.parent) if note.parent else None
        span = ReadableSpan(
            name=note.name,
            context=_context(note.at),
            parent=_context(parent) if parent is not None else None,
            resource=self._resource,
            attributes=note.attributes,
            kind=SpanKind.SERVER if note.is_server else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, note.error) if note.error else Status(),
            start_time=int((note.start_s + offset_s) * 1e9),
            end_time=int((note.end_s + offset_s) * 1e9),
            instrumentation_scope=self._scope,
        )
        self._processor.on_end(span)

    def close(self) -> None:
        """Export what is queued and end; a collector that is not there is not waited for."""
        ending = threading.Thread(target=self._processor.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_S)


def _context(place: TraceContext) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    flags = TraceFlags(TraceFlags.SAMPLED if place.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(place.trace, 16), int(place.span, 16), True, flags)


def open_tracer(
    setting: str, endpoint: str, service: str, environment: Mapping[str, str] = os.environ
) -> Tracer | None:
    """A tracer that exports to a collector; None when there is to be none.

    Args:
        setting: name of the setting, for messages.
        endpoint: of the collector, like http://localhost:4317; "" is none.
        service: see Tracer.

    Raises:
        ConfigInvalid: OpenTelemetry is not installed, or does not speak the protocol.
    """
    if not endpoint or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = environment.get(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    )
    if protocol not in PROTOCOLS:
        raise ConfigInvalid(
            f"{setting}: OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; "
            f"give one of {', '.join(PROTOCOLS)}"
        )
    try:
        return Tracer(_exporter(protocol, endpoint), service, environment)
    except ModuleNotFoundError as error:
        package = ".[otel]" if protocol == "grpc" else "opentelemetry-exporter-otlp-proto-http"
        where = " in a checkout of Kvist" if protocol == "grpc" else ""
        raise ConfigInvalid(
            f"{setting}: {error.name} is not installed; run pip install '{package}'{where}, "
            "or leave the setting empty"
        ) from None


def _exporter(protocol: str, endpoint: str) -> SpanExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https://"))
    from opentelemetry.exporter.otlp.proto.http import trace_exporter

    exporter: SpanExporter = trace_exporter.OTLPSpanExporter(endpoint)
    return exporter
