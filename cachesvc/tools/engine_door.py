"""The way from a tool to an engine's HTTP server: OpenAI's calls and /tokenize."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from typing import Any

from kvist.cachesvc.tools.prompts import PromptLine
from kvist.proto.errors import ConfigInvalid, KvistError

# A server that is full says so; it is asked again after 0.5, 1, 2 and 4 s.
BUSY = (429, 503)
TRIES = 5
FIRST_WAIT_S = 0.5


class RequestFailed(KvistError):
    """A server would not have a request; the message is the server's."""


class EngineDoor:
    """Requests to one server, each over a connection of its own. Threads may share one.

    Args:
        url: like http://127.0.0.1:8000.
        api_key: None asks without.
        timeout_s: of a request; a long prompt is computed for minutes.

    Raises: ConfigInvalid: no such URL.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigInvalid(f"--url: {url!r} is no URL; write http://host:port")
        secure = parts.scheme == "https"
        self._kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._url = url
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def check(self) -> str:
        """Name of the model that is served. Raises: ConfigInvalid: nobody answers there."""
        try:
            models = self._ask("GET", "/v1/models", None)["data"]
            return str(models[0]["id"])
        except (OSError, http.client.HTTPException) as error:
            raise ConfigInvalid(f"--url: no server answers at {self._url}: {error}") from None
        except (KeyError, IndexError, TypeError, RequestFailed) as error:
            raise ConfigInvalid(f"--url: {self._url} names no model: {error}") from None

    def complete(self, line: PromptLine, settings: dict[str, Any]) -> dict[str, Any]:
        """Have a prompt computed; its usage. Raises: RequestFailed, OSError."""
        path = "/v1/chat/completions" if line.is_chat else "/v1/completions"
        usage = self._ask("POST", path, {**settings, **line.body}).get("usage")
        return usage if isinstance(usage, dict) else {}

    def tokenize(self, line: PromptLine, model: str) -> list[int]:
        """Token ids of a prompt. Raises: RequestFailed, OSError."""
        if line.tokens is not None:
            return line.tokens
        names = ("messages", "prompt", "tools", "add_special_tokens")
        body = {name: line.body[name] for name in names if name in line.body}
        tokens = self._ask("POST", "/tokenize", {"model": model, **body}).get("tokens")
        return tokens if isinstance(tokens, list) else []

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        for attempt in range(TRIES):
            status, answer = self._ask_once(method, path, body)
            if status == http.client.OK and isinstance(answer, dict):
                return answer
            if status not in BUSY or attempt == TRIES - 1:
                break
            time.sleep(FIRST_WAIT_S * 2**attempt)
        raise RequestFailed(f"HTTP {status}: {_message(answer)}")

    def _ask_once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        connection = self._kind(self._host, self._port, timeout=self._timeout_s)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, data, self._headers)
            reply = connection.getresponse()
            text = reply.read()
            try:
                return reply.status, json.loads(text)
            except ValueError:
                return reply.status, text.decode("utf-8", "replace")
        finally:
            connection.close()


def _message(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return str(text)[:300]
