"""The wire between the API process and the engine core: msgpack over zmq, one socket each way.

The API process binds `ENDPOINT-requests` and `ENDPOINT-outputs`, the core connects to both. The
endpoint lies in a folder that only the user can enter, because whoever can write to the first
socket can spend the engine's time and whoever can read the second can read answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

import msgspec
import zmq
import zmq.asyncio

from kvist.engine.request import Abort, CoreStats, Delta, FromCore, NewRequest, Outputs, ToCore
from kvist.proto.errors import KvistError
from kvist.proto.trace import SpanNote

# Fatal is the last thing a dying core says; one second is ample for a local socket.
LINGER_MS = 1000


class CoreGone(KvistError):
    """The engine core is dead or the server is going down; the message says which and why."""


def request_address(endpoint: str) -> str:
    """Where requests go: the API process binds and pushes, the core pulls."""
    return f"{endpoint}-requests"


def output_address(endpoint: str) -> str:
    """Where tokens come back: the API process binds and pulls, the core pushes."""
    return f"{endpoint}-outputs"


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    # No high-water mark: what can be queued is bounded by the requests admitted times their
    # max_tokens, and a core that blocks in send would stall every other request.
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    return socket


class ApiLink:
    """The core's end. One thread; nothing here waits longer than it is told to."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pull = _socket(self._context, zmq.PULL)
        self._push = _socket(self._context, zmq.PUSH)
        self._pull.connect(request_address(endpoint))
        self._push.connect(output_address(endpoint))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)

    def receive(self, timeout_s: float | None = 0.0) -> list[ToCore]:
        """Take every message that has come, in order.

        Args:
            timeout_s: how long to wait for the first; 0 does not wait, None waits for ever.

        Raises:
            msgspec.ValidationError: the sender speaks another version.
        """
        timeout_ms = None if timeout_s is None else int(timeout_s * 1000)
        messages: list[ToCore] = []
        if not self._pull.poll(timeout_ms):
            return messages
        while True:
            try:
                frame = self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            messages.append(self._decoder.decode(frame))

    def send(self, message: FromCore) -> None:
        """Queue a message for the API process; does not wait."""
        self._push.send(self._encoder.encode(message))

    def close(self) -> None:
        """Send what is queued (LINGER_MS at most) and let the sockets go."""
        self._pull.close(linger=0)
        self._push.close()
        self._context.term()


class TokenStream:
    """The deltas of one or more requests that were submitted together.

    A context manager: leaving it aborts what has not ended, whatever the reason for leaving.
    Iteration ends after every request's last delta.
    """

    def __init__(self, link: CoreLink, ids: Sequence[str]) -> None:
        self._link = link
        self._live = set(ids)
        self._queue: asyncio.Queue[Delta | None] = asyncio.Queue()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for request_id in list(self._live):
            self.abort(request_id)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Delta:
        """The next delta of any of the requests, in the order in which the core sent them.

        Raises:
            CoreGone: the core died before all requests had ended.
        """
        while self._live:
            delta = await self._queue.get()
            if delta is None:
                raise CoreGone(self._link.failure)
            if delta.id not in self._live:
                continue  # aborted while its delta was on the way
            if delta.finish_reason is not None:
                self._live.discard(delta.id)
                self._link.forget(delta.id)
            return delta
        raise StopAsyncIteration

    def abort(self, request_id: str) -> None:
        """Stop one of the requests; its deltas are not seen any more. Unknown ids are ignored."""
        if request_id in self._live:
            self._live.discard(request_id)
            self._link.abort(request_id)

    def put(self, delta: Delta | None) -> None:
        """For the link: a delta of one of the requests, or None when the core has gone."""
        self._queue.put_nowait(delta)


class CoreLink:
    """The API process's end, on one event loop: requests go in, each gets its own deltas back.

    Args:
        endpoint: `ipc://` address whose two sockets are bound here.
        on_outputs: called with every step's outputs before the deltas are handed on.

    Attributes:
        on_notes: called with spans of traced requests, at the same time; None drops them.
    """

    def __init__(self, endpoint: str, on_outputs: Callable[[Outputs], None]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._push = _socket(self._context, zmq.PUSH)
        self._pull = zmq.asyncio.Context(self._context).socket(zmq.PULL)
        self._pull.set_hwm(0)
        self._push.bind(request_address(endpoint))
        self._pull.bind(output_address(endpoint))
        self._on_outputs = on_outputs
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self._streams: dict[str, TokenStream] = {}
        self.stats = CoreStats()
        self.failure = ""
        self.on_notes: Callable[[Sequence[SpanNote]], None] | None = None

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def receive(self) -> FromCore:
        """Wait for one message; outputs are also handed to the streams they belong to.

        Raises:
            msgspec.ValidationError: the sender speaks another version.
        """
        message = self._decoder.decode(await self._pull.recv())
        if isinstance(message, Outputs):
            self.stats = message.stats
            self._on_outputs(message)
            if message.notes and self.on_notes is not None:
                self.on_notes(message.notes)
            for delta in message.deltas:
                stream = self._streams.get(delta.id)
                if stream is not None:
                    stream.put(delta)
        return message

    def submit(self, requests: Sequence[NewRequest]) -> TokenStream:
        """Send requests to the core.

        Raises:
            CoreGone: no request is taken any more.
        """
        stream = TokenStream(self, [request.id for request in requests])
        for request in requests:
            self._send(request)
            self._streams[request.id] = stream
        return stream

    def abort(self, request_id: str) -> None:
        """Stop a request; unknown ids and a dead core are ignored."""
        self.forget(request_id)
        if not self.failure:
            self._send(Abort(request_id))

    def forget(self, request_id: str) -> None:
        """Hand on no more deltas of a request."""
        self._streams.pop(request_id, None)

    def fail(self, reason: str) -> None:
        """End every running request with CoreGone and take no more. The first reason stays."""
        if self.failure:
            return
        self.failure = reason
        for stream in set(self._streams.values()):
            stream.put(None)
        self._streams.clear()

    def close(self) -> None:
        """Let the sockets go; what is queued for the core is dropped."""
        self._push.close(linger=0)
        self._pull.close(linger=0)
        self._context.term()

    def _send(self, message: ToCore) -> None:
        if self.failure:
            raise CoreGone(self.failure)
        try:
            self._push.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # A PUSH socket has nowhere to put a message only when nobody is connected.
            self.fail("the engine core is not connected")
            raise CoreGone(self.failure) from None
