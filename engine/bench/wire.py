"""HTTP/1.1 for a load generator: POST, and the answer's bytes as they come.

httpx is not used under load: with 800 requests at once its pool costs 14 ms of processor time per
request, and a server that answered at once seemed to take 2 s to the first token. Here a request
costs 0.3 ms with 50 of them and with 800.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from kvist.proto.errors import ConfigInvalid, KvistError

CONNECT_SECONDS = 60.0
HEAD_BYTES_MAX = 1 << 16
READ_BYTES = 1 << 16


class WireError(KvistError):
    """The connection failed, or what came is not HTTP."""


@dataclass(frozen=True, slots=True)
class Head:
    """Beginning of an answer.

    Attributes:
        status: HTTP status.
        length: bytes of the body; None when it does not say.
        chunked: the body comes in chunks.
        keep: the connection can be used again.
    """

    status: int
    length: int | None
    chunked: bool
    keep: bool

    @classmethod
    def parse(cls, text: bytes) -> Head:
        """Read status line and headers.

        Raises:
            WireError: they are none.
        """
        first, *rest = text.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise WireError(f"the server does not speak HTTP/1.1: {first[:80]!r}")
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in rest)
        }
        length = fields.get("content-length", "")
        chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        ends = chunked or length.isdigit()
        close = fields.get("connection", "").lower() == "close" or words[0] == "HTTP/1.0"
        return cls(
            int(words[1]), int(length) if length.isdigit() else None, chunked, ends and not close
        )


class Dechunker:
    """Takes the chunked encoding off a body, however its bytes are cut.

    Attributes:
        ended: the body is complete, and so is what stands behind its last chunk: whatever comes
            next on the connection belongs to the next answer.
    """

    def __init__(self) -> None:
        self._held = b""
        self._left = 0
        self._last = False
        self.ended = False

    def push(self, data: bytes) -> bytes:
        """Take bytes in, give out those of the body.

        Raises:
            WireError: a chunk does not begin with its size.
        """
        data, self._held = self._held + data, b""
        parts = []
        while data and not self.ended:
            if self._left > 2:
                part = data[: self._left - 2]
                parts.append(part)
                self._left, data = self._left - len(part), data[len(part) :]
            elif self._left:  # the line end behind a chunk
                cut = min(self._left, len(data))
                self._left, data = self._left - cut, data[cut:]
            else:
                line, found, rest = data.partition(b"\r\n")
                if not found:
                    self._held, data = data, b""
                    break
                data = rest
                if self._last:  # fields behind the body, up to an empty line
                    self.ended = not line
                else:
                    self._begin(line)
        return b"".join(parts)

    def _begin(self, line: bytes) -> None:
        try:
            size = int(line.split(b";")[0], 16)
        except ValueError:
            raise WireError(f"the answer is cut off or garbled at {line[:20]!r}") from None
        self._last = size == 0
        self._left = size + 2 if size else 0


class Answer:
    """An answer whose head has come.

    Attributes:
        head: its beginning.
        complete: the whole body was read.
    """

    def __init__(self, head: Head, reader: asyncio.StreamReader) -> None:
        self.head = head
        self.complete = False
        self._reader = reader

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            WireError: the connection broke before its end.
        """
        chunks = Dechunker() if self.head.chunked else None
        left = self.head.length
        while not (left == 0 or (chunks is not None and chunks.ended)):
            try:
                data = await self._reader.read(READ_BYTES)
            except OSError as error:
                raise WireError(f"the connection broke: {error}") from None
            if not data:
                if chunks is None and left is None:
                    break
                raise WireError("the server closed the connection in the middle of an answer")
            if chunks is not None:
                data = chunks.push(data)
            elif left is not None:
                left -= len(data)
            if data:
                yield data
        self.complete = True

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([part async for part in self.parts()])


_Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Wire:
    """Connections to one server; used again when an answer was read to its end.

    Args:
        base_url: http or https.
        headers: of every request.

    Raises:
        ConfigInvalid: it is no such URL.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        url = urlsplit(base_url)
        try:
            self._port = url.port or (443 if url.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigInvalid(f"--base-url: {error}") from None
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigInvalid(f"--base-url: {base_url!r}; give one like http://127.0.0.1:8000")
        self._host = url.hostname
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._path = url.path.rstrip("/")
        fields = {"host": url.netloc.rpartition("@")[2], "connection": "keep-alive", **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[_Pair] = []

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[Answer]:
        """Send a request; yields its answer once the head has come.

        Raises:
            WireError: the connection failed.
        """
        text = (
            f"POST {self._path}{path} HTTP/1.1\r\n{self._fields}content-length: {len(body)}\r\n\r\n"
        )
        request = text.encode("latin-1") + body
        pair, answer = await self._exchange(request)
        try:
            yield answer
        finally:
            if answer.complete and answer.head.keep:
                self._idle.append(pair)
            else:
                pair[1].close()

    def close(self) -> None:
        """Let idle connections go."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _exchange(self, request: bytes) -> tuple[_Pair, Answer]:
        """Send on an idle connection; on a new one if there is none, or it was closed meanwhile."""
        while self._idle:
            pair = self._idle.pop()
            try:
                return pair, await self._send(pair, request)
            except WireError:
                pair[1].close()
        pair = await self._connect()
        try:
            return pair, await self._send(pair, request)
        except BaseException:
            pair[1].close()
            raise

    async def _connect(self) -> _Pair:
        opening = asyncio.open_connection(
            self._host, self._port, ssl=self._tls, limit=HEAD_BYTES_MAX
        )
        try:
            return await asyncio.wait_for(opening, CONNECT_SECONDS)
        except TimeoutError:
            raise WireError(f"no connection within {CONNECT_SECONDS:.0f} s") from None
        except OSError as error:
            raise WireError(f"cannot connect: {error}") from None

    @staticmethod
    async def _send(pair: _Pair, request: bytes) -> Answer:
        reader, writer = pair
        try:
            writer.write(request)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            raise WireError("the server closed the connection before it answered") from None
        except asyncio.LimitOverrunError:
            raise WireError("the head of the answer is too long") from None
        except OSError as error:
            raise WireError(f"the connection broke: {error}") from None
        return Answer(Head.parse(head[:-4]), reader)
