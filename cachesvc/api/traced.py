"""The sidecar's part in traces: calls by packet that name a trace, and gRPC calls that do."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kvist.cachesvc.tracer import Tracer
from kvist.proto.trace import HEADER, Attribute, SpanNote, parse_traceparent

# A session lives as long as its worker: that is no part of anybody's request.
_SESSIONS = "Attach"


@contextmanager
def traced(
    tracer: Tracer, name: str, traceparent: str, now: Callable[[], float] = time.monotonic
) -> Iterator[dict[str, Attribute]]:
    """Tell a tracer how long a block of code took, if it is part of a sampled trace.

    Yields: attributes of the span, to be filled.
    """
    parent = parse_traceparent(traceparent)
    if parent is None or not parent.sampled:
        yield {}
        return
    began_s, attributes, error = now(), dict[str, Attribute](), ""
    try:
        yield attributes
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
        raise
    finally:
        tracer.emit(
            SpanNote(name, parent.child(), parent.span, began_s, now(), attributes, True, error)
        )


class TracedCalls(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Traces gRPC calls whose metadata has a traceparent.

    Args:
        service: full name of the service whose calls are traced. tracer: where they are told.
    """

    def __init__(self, service: str, tracer: Tracer) -> None:
        self._service = service
        self._tracer = tracer

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Put a span around the handler of a call that is part of a trace."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.strip("/").rpartition("/")
        metadata = dict(handler_call_details.invocation_metadata or ())
        header = metadata.get(HEADER, "")
        if handler is None or not header or service != self._service or method == _SESSIONS:
            return handler
        return self._around(handler, f"kvistd.{method}", str(header))

    def _around(self, handler: Any, name: str, header: str) -> Any:
        async def reply(request: Any, context: Any) -> Any:
            with traced(self._tracer, name, header):
                return await inner(request, context)

        async def replies(request: Any, context: Any) -> AsyncIterator[Any]:
            with traced(self._tracer, name, header):
                async for each in inner(request, context):
                    yield each

        inner = next(
            each
            for each in (
                handler.unary_unary, handler.unary_stream, handler.stream_unary,
                handler.stream_stream,
            )
            if each is not None
        )  # fmt: skip
        kind = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        body = replies if handler.response_streaming else reply
        return kind(body, handler.request_deserializer, handler.response_serializer)
