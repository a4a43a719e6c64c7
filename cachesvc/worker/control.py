"""Control calls of a worker: the contract, and the one for a sidecar in another process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn, Protocol

import grpc

from kvist.cachesvc.api.calls import CLEAR, COMMIT, RESERVE, CallSocket, Pending
from kvist.proto import cache_pb2
from kvist.proto.cache_pb2_grpc import CacheStub
from kvist.proto.errors import (
    ConfigInvalid,
    Detached,
    FormatRefused,
    KvistError,
    SessionUnknown,
    TierFull,
)

PROTOCOL_VERSION = 3
"""Of cache.proto and of the files in shared memory together; both sides must have the same."""

# Limits of one call. A key is 18 bytes on the wire, so 65536 of them (4 million tokens in blocks
# of 64) stay far below gRPC's 4 MiB for a message.
KEYS_MAX = 65536
SLOTS_MAX = 1024

# A call is one dictionary lookup per block; the rest is the scheduler's. A sidecar that needs
# longer is as good as gone, and a store that waits for it holds up other stores.
CALL_TIMEOUT_S = 5.0

_HOST_PORT = re.compile(r"[^/:]+:\d+|\[[0-9a-fA-F:.]+\]:\d+")

_CHANNEL_OPTIONS = (
    # gRPC's own waits between connection attempts start at 1 s and grow to 2 minutes; a client
    # must be back within 1 s of the sidecar's restart.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    # Channels of one process to one address otherwise share a connection, and with it the wait.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class Control(Protocol):
    """The few calls that a worker makes. Requests and replies are those of cache.proto.

    Threads: attach and wait_ended are called by one thread, reserve, commit and clear by one;
    hang_up and close by any. All may block, none for longer than CALL_TIMEOUT_S but attach and
    wait_ended, which hang_up ends. Calls are answered in the order in which they were begun.

    Attributes:
        calls: how many were made so far.
    """

    calls: int

    def attach(self, request: cache_pb2.AttachRequest) -> cache_pb2.AttachReply:
        """Open a session; it lives until wait_ended returns.

        Raises: Detached when nobody answers. ConfigInvalid, FormatRefused when the sidecar
            refuses, with its reason.
        """
        ...

    def wait_ended(self) -> str:
        """Block until the session has ended, by either side or by the death of the other.

        Returns: why, for a log line.
        """
        ...

    def hang_up(self) -> None:
        """End the session, if there is one."""
        ...

    def reserve(self, request: cache_pb2.ReserveRequest) -> Pending[cache_pb2.ReserveReply]:
        """Begin to ask for slots. Raises: Detached."""
        ...

    def commit(self, request: cache_pb2.CommitRequest) -> Pending[cache_pb2.CommitReply]:
        """Begin to make filled slots visible. Raises: Detached."""
        ...

    def clear(self, request: cache_pb2.ClearRequest) -> Pending[cache_pb2.ClearReply]:
        """Begin to drop the blocks of a namespace. Raises: Detached."""
        ...

    def close(self) -> None:
        """End the session and let everything go; no call after it."""
        ...


_ERRORS: dict[grpc.StatusCode, type[KvistError]] = {
    grpc.StatusCode.NOT_FOUND: SessionUnknown,
    grpc.StatusCode.INVALID_ARGUMENT: ConfigInvalid,
    grpc.StatusCode.FAILED_PRECONDITION: FormatRefused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TierFull,
}


def _raise(error: grpc.RpcError) -> NoReturn:
    """What the sidecar meant by a status; any other status is as good as no sidecar."""
    code, details = error.code(), error.details()
    # gRPC: "failed to connect to all addresses; last error: UNKNOWN: unix:/run/...: why"
    if code is grpc.StatusCode.UNAVAILABLE and "last error: " in details:
        raise Detached(f"not reachable ({details.rpartition(': ')[2]}); is kvistd running?")
    raise _ERRORS.get(code, Detached)(f"{details} ({code.name})") from None


def local_address(address: str) -> str:
    """The address of a sidecar on this host as gRPC writes it, from unix:PATH or PATH.

    Raises:
        ConfigInvalid: the address is of another host, or none at all.
    """
    path = address.removeprefix("unix:")
    if _HOST_PORT.fullmatch(address):
        raise ConfigInvalid(
            f"cache address {address}: a worker maps the sidecar's memory and so needs one on its "
            "own host; give the path of its socket, like /run/kvist/kvistd.sock"
        )
    if not path.startswith("/"):
        raise ConfigInvalid(
            f"cache address {address!r}: give the absolute path of the sidecar's socket, like "
            "/run/kvist/kvistd.sock"
        )
    return f"unix:{path}"


class GrpcControl:
    """Control of a sidecar: the session over gRPC, its calls over the socket that Attach names.

    Args:
        address: as gRPC writes it, like unix:/run/kvist/kvistd.sock.
    """

    def __init__(self, address: str) -> None:
        self.calls = 0
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = CacheStub(self._channel)
        self._stream: grpc.CallIterator[cache_pb2.AttachReply] | None = None
        self._calls: CallSocket | None = None

    def attach(self, request: cache_pb2.AttachRequest) -> cache_pb2.AttachReply:
        """See Control.attach."""
        self.calls += 1
        try:
            self._stream = self._stub.Attach(request)
            reply: cache_pb2.AttachReply = next(self._stream)
        except grpc.RpcError as error:
            _raise(error)
        except (StopIteration, ValueError):  # ended before its reply; channel closed
            raise Detached("the session ended before it had begun") from None
        try:
            self._calls = CallSocket(Path(reply.calls_path), CALL_TIMEOUT_S)
        except OSError as error:
            self.hang_up()
            raise Detached(f"{reply.calls_path} takes no calls: {error.strerror}") from None
        return reply

    def wait_ended(self) -> str:
        """See Control.wait_ended."""
        assert self._stream is not None
        try:
            for _ in self._stream:
                pass
        except grpc.RpcError as error:
            return f"{error.details()} ({error.code().name})"
        return "the sidecar ended the session"

    def hang_up(self) -> None:
        """See Control.hang_up."""
        calls = self._calls
        if calls is not None:
            calls.end()
        if self._stream is not None:
            self._stream.cancel()

    def _connected(self) -> CallSocket:
        self.calls += 1
        if self._calls is None:
            raise Detached("no session was opened")
        return self._calls

    def reserve(self, request: cache_pb2.ReserveRequest) -> Pending[cache_pb2.ReserveReply]:
        """See Control.reserve."""
        return self._connected().send(RESERVE, request, cache_pb2.ReserveReply)

    def commit(self, request: cache_pb2.CommitRequest) -> Pending[cache_pb2.CommitReply]:
        """See Control.commit."""
        return self._connected().send(COMMIT, request, cache_pb2.CommitReply)

    def clear(self, request: cache_pb2.ClearRequest) -> Pending[cache_pb2.ClearReply]:
        """See Control.clear."""
        return self._connected().send(CLEAR, request, cache_pb2.ClearReply)

    def close(self) -> None:
        """See Control.close."""
        self.hang_up()
        self._channel.close()
