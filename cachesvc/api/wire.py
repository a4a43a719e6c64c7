"""What comes over the wire and is no message: an answer instead of a trace in the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from kvist.cachesvc.api.answers import RequestInvalid

Request = TypeVar("Request")


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands for a request whose bytes are no message."""

    problem: str


def decoded(request: Request) -> Request:
    """The request, which is a message. Raises: RequestInvalid: it is Undecodable."""
    if isinstance(request, Undecodable):
        raise RequestInvalid(f"request: {request.problem}")
    return request


class LenientDecoding(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Hands handlers an Undecodable where gRPC would answer UNKNOWN and log a trace per call."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Replace the handler's way to decode."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        return handler._replace(request_deserializer=_lenient(handler.request_deserializer))


def _lenient(deserialize: Callable[[bytes], object]) -> Callable[[bytes], object]:
    def decode(data: bytes) -> object:
        try:
            return deserialize(data)
        except DecodeError as error:
            return Undecodable(str(error))

    return decode
