"""Errors of the HTTP API, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvist.proto.errors import KvistError


class ApiError(KvistError):
    """An HTTP reply other than success, in OpenAI's shape.

    Attributes:
        status: HTTP status.
        message: what is wrong and how to put it right.
        param: the parameter at fault, if one is.
        code: a word that programs can test, if there is one.
        headers: of the reply, besides the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The reply's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def bad(param: str, problem: str, code: str | None = None) -> ApiError:
    """A 400 that names a parameter."""
    return ApiError(400, f"{param}: {problem}", param, code)
