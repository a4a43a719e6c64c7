"""The HTTP face: OpenAI's endpoints and the operator's, each parse, one call, reply."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kvist.engine.api_error import ApiError
from kvist.engine.ipc import CoreGone
from kvist.engine.openai import (
    BODY_BYTES_MAX,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from kvist.engine.service import Answering, Service
from kvist.proto.exposition import CONTENT_TYPE

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})
CLIENT_GONE = 499


class Api:
    """The handlers. They know HTTP; what a request means is Service's to know."""

    def __init__(self, service: Service, version: str) -> None:
        self._service = service
        self._version = version

    def routes(self) -> list[Route]:
        """Every route with its method."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ping", self.health, methods=["GET", "POST"]),
            Route("/version", self.version, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def chat(self, request: Request) -> Answering:
        """POST /v1/chat/completions."""
        return await self._service.chat(parse(await read_body(request), ChatRequest))

    async def completions(self, request: Request) -> Answering:
        """POST /v1/completions."""
        return await self._service.complete(parse(await read_body(request), CompletionRequest))

    async def models(self, _request: Request) -> Response:
        """GET /v1/models."""
        return reply({"object": "list", "data": [self._service.card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        self._service.check_model(request.path_params["name"])
        return reply(self._service.card())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        return reply(await self._service.tokenize(parse(await read_body(request), TokenizeRequest)))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        return reply(self._service.detokenize(parse(await read_body(request), DetokenizeRequest)))

    async def health(self, _request: Request) -> Response:
        """GET /health and /ping: 200 while requests are taken, else 503 with the reason."""
        self._service.check_taking()
        return Response(status_code=HTTPStatus.OK)

    async def version(self, _request: Request) -> Response:
        """GET /version."""
        return reply({"version": self._version})

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics."""
        text = self._service.metrics.text()
        return Response(text, headers={"content-type": CONTENT_TYPE})


def reply(content: Mapping[str, Any]) -> Response:
    """A JSON reply."""
    return Response(msgspec.json.encode(content), media_type="application/json")


async def read_body(request: Request) -> bytes:
    """Read a body of at most BODY_BYTES_MAX.

    Raises:
        ApiError: 413.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            raise ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body is larger than {BODY_BYTES_MAX} bytes",
                code="body_too_large",
                headers={"connection": "close"},
            )
    return bytes(body)


class KeyCheck:
    """ASGI middleware: a bearer token is needed, but for OPEN_PATHS.

    Those are left open because probes and scrapers have no keys and they show no content.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._wanted = b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                error = ApiError(
                    HTTPStatus.UNAUTHORIZED,
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await _error_reply(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _error_reply(error: ApiError) -> Response:
    return Response(
        error.body(), error.status, headers=error.headers, media_type="application/json"
    )


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_reply(error)


async def _on_core_gone(_request: Request, error: Exception) -> Response:
    return _error_reply(ApiError(500, str(error), code="engine_error"))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {
        404: f"there is no route {request.url.path}",
        405: f"{request.method} is not allowed on {request.url.path}",
    }
    message = words.get(error.status_code, error.detail)
    return _error_reply(ApiError(error.status_code, message, headers=error.headers))


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)  # nobody reads it


async def _on_bug(_request: Request, _error: Exception) -> Response:
    # The trace goes to the log, not to the client.
    return _error_reply(ApiError(500, "internal error; the server's log has the trace"))


Handler = Callable[[Request, Exception], Coroutine[Any, Any, Response]]


def create_app(service: Service, version: str, api_key: str | None) -> ASGIApp:
    """Put routes, error shapes and the key check together."""
    handlers: dict[Any, Handler] = {
        ApiError: _on_api_error,
        CoreGone: _on_core_gone,
        HTTPException: _on_http_error,
        ClientDisconnect: _on_client_gone,
        Exception: _on_bug,
    }
    app = Starlette(routes=Api(service, version).routes(), exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app if api_key is None else KeyCheck(app, api_key)
