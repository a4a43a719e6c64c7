"""The gRPC service: kvist.v1.Cache, health and reflection, on a Unix socket and on TCP."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvist.cachesvc.api.answers import Answers, RequestInvalid, checked_hint, checked_keys
from kvist.cachesvc.api.browsing import Browsing
from kvist.cachesvc.api.traced import TracedCalls
from kvist.cachesvc.api.wire import LenientDecoding, decoded
from kvist.cachesvc.core.beat import Beat
from kvist.cachesvc.core.store import Store
from kvist.cachesvc.tracer import Tracer
from kvist.proto import cache_pb2, cache_pb2_grpc
from kvist.proto.errors import (
    BlockCorrupt,
    BlockMissing,
    BlockTorn,
    ConfigInvalid,
    Detached,
    FolderInUse,
    FormatRefused,
    KvistError,
    SessionUnknown,
    TierFull,
    TierOffline,
)
from kvist.proto.hints import NO_HINT
from kvist.transfer.stream import Joiner, split

SERVICE_NAME = cache_pb2.DESCRIPTOR.services_by_name["Cache"].full_name
# A reply with a prefix of KEYS_MAX blocks is 0.6 MiB, a chunk at most 1 MiB.
MESSAGE_BYTES_MAX = 4 << 20
# A session holds one call and two descriptors; a node has a worker per device.
CONCURRENT_CALLS_MAX = 256
# As long as the slots have no size, which the first record gives them.
FIRST_RECORD_BYTES_MAX = 64 << 20
STOP_GRACE_S = 0.5

_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # Two sidecars on one port would share its clients at random.
    ("grpc.so_reuseport", 0),
)

STATUS: dict[type[KvistError], grpc.StatusCode] = {
    RequestInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    FolderInUse: grpc.StatusCode.INVALID_ARGUMENT,
    FormatRefused: grpc.StatusCode.FAILED_PRECONDITION,
    SessionUnknown: grpc.StatusCode.NOT_FOUND,
    BlockMissing: grpc.StatusCode.NOT_FOUND,
    TierFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    BlockCorrupt: grpc.StatusCode.DATA_LOSS,
    BlockTorn: grpc.StatusCode.ABORTED,
    TierOffline: grpc.StatusCode.UNAVAILABLE,
    Detached: grpc.StatusCode.UNAVAILABLE,
}
"""How each error of the tree looks on the wire; the only place that says so."""

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Context: TypeAlias = grpc.aio.ServicerContext


async def _refuse(context: Context, error: KvistError) -> NoReturn:
    await context.abort(STATUS[type(error)], str(error))
    raise AssertionError("abort does not return")


class CacheService(cache_pb2_grpc.CacheServicer):
    """The handlers. Each is parse, one call, reply; all run on the store's thread.

    Args:
        store: open.
        beat: told of every call, so that a busy store is ticked often.
        on_failure: told of an error that is none of the tree, which is a broken invariant.
        document: what Stats says where all is asked for, as JSON; called on another thread.
    """

    def __init__(
        self,
        store: Store,
        beat: Beat,
        on_failure: Callable[[Exception], None],
        document: Callable[[], str],
    ) -> None:
        self._document = document
        self._store = store
        self._on_failure = on_failure
        self._answers = Answers(store)
        self._browsing = Browsing(store)
        self._beat = beat
        self._ending = asyncio.Event()

    def end_sessions(self) -> None:
        """Let every session end; its worker sees that at once."""
        self._ending.set()

    async def _reply(
        self, call: Callable[[Request], Reply], request: Request, context: Context
    ) -> Reply:
        self._beat.active()
        try:
            with self._watched():
                return call(decoded(request))
        except KvistError as error:
            await _refuse(context, error)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Around what is the store's: gRPC itself would answer UNKNOWN and go on."""
        try:
            yield
        except KvistError:
            raise
        except OSError as error:  # no descriptor or no room for a session's ring
            raise TierFull(str(error)) from error
        except Exception as error:
            self._on_failure(error)
            raise

    async def Attach(
        self, request: cache_pb2.AttachRequest, context: Context
    ) -> AsyncIterator[cache_pb2.AttachReply]:
        """Open a session that ends with the stream, by whatever cause."""
        if not context.peer().startswith("unix"):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "Attach shares memory and needs the Unix socket on the sidecar's own host; over "
                "TCP use Lookup, Read and Write",
            )
        reply = await self._reply(self._answers.attach, request, context)
        try:
            yield reply
            await self._ending.wait()  # cancelled when the client goes
        finally:
            self._store.session_closed(reply.session)
            self._beat.active()

    async def Lookup(
        self, request: cache_pb2.LookupRequest, context: Context
    ) -> cache_pb2.LookupReply:
        """Longest cached prefix."""
        return await self._reply(self._answers.lookup, request, context)

    async def Reserve(
        self, request: cache_pb2.ReserveRequest, context: Context
    ) -> cache_pb2.ReserveReply:
        """Slots to fill."""
        return await self._reply(self._answers.reserve, request, context)

    async def Commit(
        self, request: cache_pb2.CommitRequest, context: Context
    ) -> cache_pb2.CommitReply:
        """Make filled slots visible."""
        return await self._reply(self._answers.commit, request, context)

    async def Abort(
        self, request: cache_pb2.AbortRequest, context: Context
    ) -> cache_pb2.AbortReply:
        """Take slots back unfilled."""
        return await self._reply(self._answers.abort, request, context)

    async def Prefetch(
        self, request: cache_pb2.PrefetchRequest, context: Context
    ) -> cache_pb2.PrefetchReply:
        """Have blocks rise from flash."""
        return await self._reply(self._answers.prefetch, request, context)

    async def Stats(
        self, request: cache_pb2.StatsRequest, context: Context
    ) -> cache_pb2.StatsReply:
        """What the service holds and has done; all of it is put together on another thread."""
        try:
            if not decoded(request).document:
                return await self._reply(self._answers.stats, request, context)
            return cache_pb2.StatsReply(document=await asyncio.to_thread(self._document))
        except KvistError as error:
            await _refuse(context, error)

    async def Clear(
        self, request: cache_pb2.ClearRequest, context: Context
    ) -> cache_pb2.ClearReply:
        """Drop the blocks of one namespace, or all. Answers when they are gone, and a worker's
        call of the same (api/desk) as soon as none is found."""
        reply = await self._reply(self._answers.clear, request, context)
        if self._store.parts is not None:
            await asyncio.wrap_future(self._store.parts.moves.cleared())
        return reply

    async def Pin(self, request: cache_pb2.PinRequest, context: Context) -> cache_pb2.PinReply:
        """Have blocks go later than others."""
        return await self._reply(self._answers.pin, request, context)

    async def Unpin(
        self, request: cache_pb2.UnpinRequest, context: Context
    ) -> cache_pb2.UnpinReply:
        """End that."""
        return await self._reply(self._answers.unpin, request, context)

    async def List(self, request: cache_pb2.ListRequest, context: Context) -> cache_pb2.ListReply:
        """A page of what is stored."""
        return await self._reply(self._browsing.page, request, context)

    async def Show(self, request: cache_pb2.ShowRequest, context: Context) -> cache_pb2.ShowReply:
        """What is known of one block."""
        try:
            with self._watched():
                return await self._browsing.show(decoded(request))
        except KvistError as error:
            await _refuse(context, error)

    async def Evict(
        self, request: cache_pb2.EvictRequest, context: Context
    ) -> cache_pb2.EvictReply:
        """Drop a block, and what stands on it."""
        return await self._reply(self._browsing.evict, request, context)

    async def Read(
        self, request: cache_pb2.ReadRequest, context: Context
    ) -> AsyncIterator[cache_pb2.Chunk]:
        """The records of the longest cached prefix; the stream ends where it ends."""
        try:
            keys, hint = checked_keys(decoded(request).keys), checked_hint(decoded(request).hint)
            for key in keys:
                self._beat.active()
                try:
                    with self._watched():
                        record = await self._store.read_record(key, hint)
                except BlockMissing:
                    return
                hint = NO_HINT  # the first block begins the request, the others go on with it
                for chunk in split(key, record):
                    yield chunk
        except KvistError as error:
            await _refuse(context, error)

    async def Write(
        self, requests: AsyncIterator[cache_pb2.Chunk], context: Context
    ) -> cache_pb2.WriteReply:
        """Store the records of a stream, one after the other."""
        counts = {"stored": 0, "present": 0, "refused": 0}
        joiner = Joiner(self._store.record_bytes_max or FIRST_RECORD_BYTES_MAX)
        try:
            async for chunk in requests:
                record = joiner.feed(decoded(chunk))
                if record is not None:
                    self._beat.active()
                    with self._watched():
                        counts[self._store.put_record(record)] += 1
        except KvistError as error:
            await _refuse(context, error)
        if joiner.pending_bytes:
            await _refuse(context, RequestInvalid("data: the stream ended amid a record"))
        return cache_pb2.WriteReply(**counts)


class CallCounter(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Counts calls of the service, so that anybody can see that the hot path makes none.

    Attributes:
        calls: method -> calls begun.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Count one, change nothing."""
        service, _, method = handler_call_details.method.strip("/").rpartition("/")
        if service == SERVICE_NAME:
            self.calls[method] += 1
        return await continuation(handler_call_details)


class Server:
    """The service on its addresses, with health and reflection.

    Args:
        service: the handlers.
        socket: path of the Unix socket; its folder is there.
        listen: TCP host:port, "" for none; port 0 takes a free one.
        tracer: where calls that are part of a trace are told.

    Attributes:
        listen: the TCP address with the port that was taken.
        calls: gRPC calls begun, by method.
    """

    def __init__(
        self, service: CacheService, socket: Path, listen: str, tracer: Tracer | None = None
    ) -> None:
        counter = CallCounter()
        self.calls: Mapping[str, int] = counter.calls
        tracing = () if tracer is None else (TracedCalls(SERVICE_NAME, tracer),)
        self._server = grpc.aio.server(
            interceptors=(counter, *tracing, LenientDecoding()),
            options=_SERVER_OPTIONS,
            maximum_concurrent_rpcs=CONCURRENT_CALLS_MAX,
        )
        self._service = service
        self._health = health.aio.HealthServicer()
        self._socket = socket
        self._lock: int | None = None
        self.listen = listen
        cache_pb2_grpc.add_CacheServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> None:
        """Listen and answer.

        Raises: ConfigInvalid: an address cannot be listened on.
        """
        self._own_socket()
        self._bind("socket", f"unix:{self._socket}")
        if self.listen:
            port = self._bind("listen", self.listen)
            self.listen = f"{self.listen.rpartition(':')[0]}:{port}"
        await self._server.start()
        self._socket.chmod(0o600)
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def _own_socket(self) -> None:
        """Take the lock beside the socket: gRPC itself would steal a running sidecar's socket."""
        if self._socket.exists() and not self._socket.is_socket():
            raise ConfigInvalid(f"socket: {self._socket} is no socket; remove it or give another")
        lock = os.open(f"{self._socket}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigInvalid(
                f"socket: another sidecar listens on {self._socket}; stop it or give another"
            ) from None
        self._lock = lock

    def _bind(self, key: str, address: str) -> int:
        try:
            return int(self._server.add_insecure_port(address))
        except RuntimeError as error:
            raise ConfigInvalid(
                f"{key}: cannot listen on {address}: {error}; give another address"
            ) from None

    async def stop(self) -> None:
        """Say so to health checks, end the sessions, let other calls finish for a moment."""
        await self._health.enter_graceful_shutdown()
        self._service.end_sessions()
        await self._server.stop(STOP_GRACE_S)
        if self._lock is not None:
            self._socket.unlink(missing_ok=True)
            os.close(self._lock)
