"""The desk: where the sidecar answers its workers' calls that do not come by gRPC."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from google.protobuf.message import DecodeError, Message

from kvist.cachesvc.api.answers import Answers, RequestInvalid
from kvist.cachesvc.api.calls import CLEAR, COMMIT, PACKET_BYTES_MAX, RESERVE, pack_error
from kvist.cachesvc.api.traced import traced
from kvist.cachesvc.core.beat import Beat
from kvist.cachesvc.tracer import Tracer
from kvist.proto import cache_pb2
from kvist.proto.errors import ConfigInvalid, Detached, KvistError, TierFull

# A node has a worker per device, and each has one connection.
CONNECTIONS_MAX = 256
# Of one worker in one turn of the loop, so that no worker holds up the others.
_TURN_PACKETS = 4
_NAMES = {RESERVE: "Reserve", COMMIT: "Commit", CLEAR: "Clear"}


class Desk:
    """Answers packets of calls.py. Lives on the loop's thread, as the store does.

    Args:
        loop: where the store lives.
        answers: of the store.
        beat: told of every call.
        on_failure: told of an error that is none of the tree, which is a broken invariant.

    Attributes:
        calls: calls answered, by method.
        tracer: where calls that are part of a trace are told; None: nowhere.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        answers: Answers,
        beat: Beat,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.tracer: Tracer | None = None
        self._loop = loop
        self._answers = answers
        self._beat = beat
        self._on_failure = on_failure
        self._path: Path | None = None
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()

    def start(self, path: Path) -> None:
        """Listen. Raises: OSError."""
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(str(path))
        listener.listen()
        self._path, self._listener = path, listener
        self._loop.add_reader(listener.fileno(), self._accept)

    def stop(self) -> None:
        """Hang up on everybody and listen no more."""
        for connection in list(self._connections):
            self._drop(connection)
        if self._listener is not None and self._path is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._path.unlink(missing_ok=True)
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it went again, or no descriptor is left; the loop asks again
            return
        if len(self._connections) >= CONNECTIONS_MAX:
            connection.close()
            return
        connection.setblocking(False)
        self._connections.add(connection)
        self._loop.add_reader(connection.fileno(), partial(self._answer, connection))

    def _drop(self, connection: socket.socket) -> None:
        self._connections.discard(connection)
        self._loop.remove_reader(connection.fileno())
        connection.close()

    def _answer(self, connection: socket.socket) -> None:
        for _ in range(_TURN_PACKETS):
            try:
                packet = connection.recv(PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            try:
                if not packet:
                    raise ConnectionResetError
                # A worker that takes no replies for so long that the socket is full gets no more.
                connection.send(self._reply(packet))
            except OSError:
                self._drop(connection)
                return

    def _reply(self, packet: bytes) -> bytes:
        self._beat.active()
        method, body = packet[0], packet[1:]
        self.calls[_NAMES.get(method, "unknown")] += 1
        try:
            if self.tracer is not None:
                return b"\0" + self._traced(self.tracer, method, body).SerializeToString()
            return b"\0" + self._call(method, body).SerializeToString()
        except RequestInvalid as error:
            return pack_error(ConfigInvalid(str(error)))
        except KvistError as error:
            return pack_error(error)
        except OSError as error:
            return pack_error(TierFull(str(error)))
        except Exception as error:
            self._on_failure(error)
            return pack_error(Detached("the sidecar failed"))

    def _traced(self, tracer: Tracer, method: int, body: bytes) -> Message:
        """Raises: KvistError."""
        header, blocks = "", 0
        with suppress(DecodeError):  # answering it will say so
            if method == RESERVE:
                reserve = cache_pb2.ReserveRequest.FromString(body)
                header, blocks = reserve.traceparent, len(reserve.blocks)
            elif method == COMMIT:
                commit = cache_pb2.CommitRequest.FromString(body)
                header, blocks = commit.traceparent, len(commit.slots)
        with traced(tracer, f"kvistd.{_NAMES.get(method)}", header) as attributes:
            attributes["kvist.blocks"] = blocks
            return self._call(method, body)

    def _call(self, method: int, body: bytes) -> Message:
        """Raises: KvistError."""
        try:
            if method == RESERVE:
                return self._answers.reserve(cache_pb2.ReserveRequest.FromString(body))
            if method == COMMIT:
                return self._answers.commit(cache_pb2.CommitRequest.FromString(body))
            if method == CLEAR:
                return self._answers.clear(cache_pb2.ClearRequest.FromString(body))
        except DecodeError as error:
            raise RequestInvalid(f"request: {error}") from None
        raise RequestInvalid(f"method: {method} is unknown")
