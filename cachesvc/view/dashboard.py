"""The page: a small HTTP server with figures for people and for Prometheus."""

from __future__ import annotations

import json
import math
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from kvist.cachesvc.view.document import Document
from kvist.cachesvc.view.history import STEPS_S
from kvist.proto.errors import ConfigInvalid, KvistError
from kvist.proto.exposition import CONTENT_TYPE

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

# A client that sends nothing holds a thread; so long.
CLIENT_TIMEOUT_S = 5.0
# How long close may take at most.
STOP_POLL_S = 0.1
_FOLDER = Path(__file__).with_name("page")
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
_HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class Dashboard:
    """Serves /, /metrics, /stats.json, /history.json and /healthz from threads of its own.

    It only reads, and keeps a history of what it read.

    Args:
        address: host:port; port 0 takes a free one.
        document: what /stats.json says, and what it said; asked from the server's threads.
        metrics: what /metrics shows; called from them too. Raises KvistError.

    Attributes:
        url: where it answers.

    Raises:
        ConfigInvalid: the address cannot be listened on.
    """

    def __init__(
        self,
        address: str,
        document: Document,
        metrics: Callable[[], bytes],
    ) -> None:
        self._document = document
        self._recorder = document.recorder
        self._files = {
            f"/{path.name}": (_KINDS[path.suffix], path.read_bytes())
            for path in _FOLDER.iterdir()
            if path.suffix in _KINDS
        }
        self._files["/"] = self._files.pop("/index.html")
        self._metrics = metrics
        host, _, port = address.rpartition(":")
        try:
            kind = _Server6 if host.startswith("[") else _Server
            self._server = kind((host.strip("[]"), int(port)), _Handler)
        except OSError as error:
            raise ConfigInvalid(
                f"http_listen: cannot listen on {address}: {error.strerror}; give another "
                "port, or nothing for no page"
            ) from None
        self._server.set_app(self._answer)
        self.url = f"http://{host}:{self._server.server_port}/"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_S,), name="kvist-page", daemon=True
        )

    def start(self) -> None:
        """Begin to answer, and to remember."""
        self._recorder.start()
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._recorder.close()
        self._server.server_close()

    def _answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _reply(start, "405 Method Not Allowed", "text/plain", b"only GET\n")
        try:
            if path == "/metrics":
                return _reply(start, "200 OK", CONTENT_TYPE, self._metrics())
            if path == "/stats.json":
                return _reply_json(start, self._document.now())
            if path == "/history.json":
                return self._answer_history(environ.get("QUERY_STRING", ""), start)
            if path == "/healthz":
                self._document.read()
                return _reply(start, "200 OK", "text/plain", b"ok\n")
        except KvistError as error:
            message = f"{error}\n".encode()
            return _reply(start, "503 Service Unavailable", "text/plain", message)
        if path in self._files:
            return _reply(start, "200 OK", *self._files[path])
        return _reply(start, "404 Not Found", "text/plain", b"no such page\n")

    def _answer_history(self, query: str, start: StartResponse) -> Iterable[bytes]:
        """What the page polls: one document, made of the last sample, without a turn of the loop.

        Raises: Detached when the store does not answer any more.
        """
        try:
            step_s, since_s = _span_asked(query)
        except ValueError as error:
            return _reply(start, "400 Bad Request", "text/plain", f"{error}\n".encode())
        if self._recorder.latest is None or self._recorder.is_late:
            self._recorder.take()
        assert self._recorder.latest is not None
        at_s, stats = self._recorder.latest
        document = {
            "at": at_s,
            "history": self._document.history.since(step_s, since_s),
            "stats": self._document.of(stats),
        }
        return _reply_json(start, document)


def _span_asked(query: str) -> tuple[int, float]:
    """The query of /history.json: step, one of STEPS_S, and since, unix seconds.

    Raises: ValueError that says what is accepted.
    """
    asked = {name: values[-1] for name, values in parse_qs(query).items()}
    step, since = asked.get("step", "1"), asked.get("since", "0")
    if step not in map(str, STEPS_S):
        raise ValueError(f"step={step}: give {', '.join(map(str, STEPS_S))}, in seconds")
    try:
        since_s = float(since)
    except ValueError:
        since_s = math.nan
    if not math.isfinite(since_s):
        raise ValueError(f"since={since}: give a time in seconds since 1970")
    return int(step), since_s


def _reply_json(start: StartResponse, document: Mapping[str, Any]) -> Iterable[bytes]:
    body = json.dumps(document, separators=(",", ":")).encode()
    return _reply(start, "200 OK", "application/json", body)


def _reply(start: StartResponse, status: str, kind: str, body: bytes) -> Iterable[bytes]:
    start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS])
    return [body]


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without the look-up of the host's name that HTTPServer makes, which may take 5 s."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a scrape every few seconds is no event."""
