"""A real kvistd, and calls of any content: random messages, and good ones with bytes changed.

To draw a call takes four times as long as to make it, so each is made VARIANTS times: as it was
drawn, and with its bytes shuffled about by a cheap generator, each time otherwise.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import grpc
from google.protobuf.message import Message
from hypothesis import strategies as st
from sim.blocks import NAMESPACE, SHAPE
from sim.sidecar import Prompt, Sidecar, load_all, namespace

from fuzz.records import BLOCKS, DAMAGES, EDGES, Damage
from fuzz.target import Check, Target
from kvist.cachesvc.worker.control import PROTOCOL_VERSION
from kvist.proto import cache_pb2
from kvist.proto.cache_pb2_grpc import CacheStub

TIMEOUT_S = 5.0
VARIANTS = 10
# What the wire format trips over: field tags, ends of groups, lengths that are not there.
_PIECES = (
    b"\x00", b"\x0a", b"\x0b", b"\x0c", b"\x12\x10", b"\x7f", b"\x80", b"\x80" * 9 + b"\x01",
    b"\xff", b"\xff" * 4 + b"\x0f", b"\xfe" + b"\xff" * 9 + b"\x01",
    b"\x0a" + b"\xff" * 4 + b"\x07",
)  # fmt: skip
# It starts with 60; what an input may leave behind must not add up.
SIDECAR_BYTES_MAX = 160 << 20
SESSION = "the open session"
UNARY = (
    "Lookup", "Reserve", "Commit", "Abort", "Prefetch", "Stats", "Clear", "Pin", "Unpin", "List",
    "Show", "Evict",
)  # fmt: skip
ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DATA_LOSS,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call.

    Attributes:
        method: of the service.
        messages: what is sent; one, but for Write. A session named SESSION becomes the open one.
        changes: (offset, byte) in each message as it goes over the wire.
        cut: bytes cut from its end.
        salt: of the variants.
    """

    method: str
    messages: tuple[Message | bytes, ...]
    changes: tuple[tuple[int, int], ...]
    cut: int
    salt: int

    def variants(self, session: str) -> Iterator[list[bytes]]:
        """The bytes of the messages, VARIANTS times."""
        good, random = self.wire(session), Random(self.salt)
        yield good
        for _ in range(VARIANTS - 1):
            yield [shuffled(message, random) for message in good]

    def wire(self, session: str) -> list[bytes]:
        """The bytes of the messages."""
        return [self._bytes(message, session) for message in self.messages]

    def _bytes(self, message: Message | bytes, session: str) -> bytes:
        if isinstance(message, bytes):
            return message
        if getattr(message, "session", "") == SESSION:
            message = type(message).FromString(message.SerializeToString())
            message.session = session  # type: ignore[attr-defined]
        data = bytearray(message.SerializeToString())
        for offset, value in self.changes:
            if data:
                data[offset % len(data)] = value
        return bytes(data[: max(0, len(data) - self.cut)])


def shuffled(message: bytes, random: Random) -> bytes:
    """The same with one to four small changes: bytes set, flipped, put in, taken out, repeated."""
    data = bytearray(message)
    for _ in range(random.randint(1, 4)):
        at, length = random.randrange(len(data) + 1), random.choice((1, 1, 2, 4, 16))
        part, kind = bytes(data[at : at + length]), random.randrange(5)
        if kind == 0:
            data[at : at + len(part)] = random.randbytes(len(part))
        elif kind == 1 and part:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            data[at:at] = random.choice(_PIECES)
        elif kind == 3:
            del data[at : at + length]
        else:
            data[at:at] = part * random.choice((1, 2, 50))
    return bytes(data)


_KEYS = st.sampled_from([block.header.key for block in BLOCKS]) | st.binary(max_size=40)
_KEY_LISTS = st.lists(_KEYS, max_size=5)
_SESSIONS = st.just(SESSION) | st.text(max_size=100)
_SLOTS = st.lists(st.integers(0, 700) | st.sampled_from([2**31, 2**32 - 1]), max_size=5)
_LONGS = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
_INTS = _LONGS.map(lambda number: number % 2**32)
_NAMES = st.builds(cache_pb2.BlockName, key=_KEYS, parent=_KEYS | st.just(bytes(16)))
_DIGESTS = st.just(NAMESPACE) | st.binary(max_size=64)
_DIGITS = st.text("0123456789abcdef", max_size=40) | st.text(max_size=10)
_REQUESTS = {
    "Lookup": st.builds(cache_pb2.LookupRequest, keys=_KEY_LISTS),
    "Reserve": st.builds(
        cache_pb2.ReserveRequest, session=_SESSIONS, blocks=st.lists(_NAMES, max_size=5)
    ),
    "Commit": st.builds(cache_pb2.CommitRequest, session=_SESSIONS, slots=_SLOTS),
    "Abort": st.builds(cache_pb2.AbortRequest, session=_SESSIONS, slots=_SLOTS),
    "Prefetch": st.builds(cache_pb2.PrefetchRequest, keys=_KEY_LISTS),
    "Stats": st.builds(cache_pb2.StatsRequest),
    "Clear": st.builds(cache_pb2.ClearRequest, namespace=_DIGESTS),
    "Pin": st.builds(cache_pb2.PinRequest, keys=_KEY_LISTS, ttl_s=_INTS, strength=_INTS),
    "Unpin": st.builds(cache_pb2.UnpinRequest, keys=_KEY_LISTS),
    "List": st.builds(
        cache_pb2.ListRequest,
        page_token=_LONGS,
        limit=_INTS,
        namespace=_DIGITS,
        tenant=st.text(max_size=200),
        key=_DIGITS,
        min_uses=_INTS,
    ),
    "Show": st.builds(cache_pb2.ShowRequest, key=_KEYS, tokens=st.booleans(), verify=st.booleans()),
    "Evict": st.builds(cache_pb2.EvictRequest, key=_KEYS, descendants=st.booleans()),
    "Read": st.builds(cache_pb2.ReadRequest, keys=_KEY_LISTS),
    "Attach": st.builds(
        cache_pb2.AttachRequest,
        protocol_version=st.just(PROTOCOL_VERSION) | _INTS,
        client=st.just("fuzz") | st.text(max_size=300),
        pid=st.just(1) | _INTS,
        namespace=_DIGESTS,
        namespace_text=st.text(max_size=50),
        model=st.text(max_size=50),
        payload_bytes=st.just(SHAPE.payload_bytes) | _LONGS,
        block_tokens=st.just(SHAPE.block_tokens) | _INTS,
    ),
}


def _chunk(record: Damage, key: bytes, offset: int, length: int) -> Message:
    data = bytes(record.slot())
    stated = len(data) if length < 0 else length
    return cache_pb2.Chunk(key=key, offset=offset, data=data, record_bytes=stated)


_CHUNKS = st.builds(_chunk, DAMAGES, _KEYS, st.just(0) | _LONGS, st.just(-1) | _LONGS)
_CHANGES = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3
).map(tuple)  # fmt: skip
_SALTS = st.integers(0, 2**32 - 1)
_METHODS = st.sampled_from(sorted([*_REQUESTS, "Write"]))


def _calls(method: str) -> st.SearchStrategy[Call]:
    message = (_CHUNKS if method == "Write" else _REQUESTS[method]) | st.binary(max_size=60)
    most = 3 if method == "Write" else 1
    messages = st.lists(message, min_size=1, max_size=most).map(tuple)
    return st.builds(
        Call, st.just(method), messages, _CHANGES, st.just(0) | st.integers(0, 9), _SALTS
    )


CALLS = _METHODS.flatmap(_calls)


class _Caller:
    """Sends bytes as they are, over the Unix socket."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._stream = CacheStub(channel).Attach(
            cache_pb2.AttachRequest(
                protocol_version=PROTOCOL_VERSION,
                client="fuzz",
                pid=1,
                namespace=NAMESPACE,
                payload_bytes=SHAPE.payload_bytes,
                block_tokens=SHAPE.block_tokens,
            )
        )
        self.session: str = next(self._stream).session

    def send(self, method: str, wire: list[bytes]) -> tuple[grpc.StatusCode, str]:
        """Make a call; how it ended, and what was said to that."""
        try:
            return self._send(method, wire), ""
        except grpc.RpcError as error:
            return error.code(), error.details()

    def _send(self, method: str, wire: list[bytes]) -> grpc.StatusCode:
        path = f"/kvist.v1.Cache/{method}"
        if method in UNARY:
            _, made = self._channel.unary_unary(path).with_call(wire[0], timeout=TIMEOUT_S)
            return made.code()
        if method == "Write":
            _, made = self._channel.stream_unary(path).with_call(iter(wire), timeout=TIMEOUT_S)
            return made.code()
        stream = self._channel.unary_stream(path)(wire[0], timeout=TIMEOUT_S)
        for _ in stream:
            if method == "Attach":  # it would stay open
                stream.cancel()
                return grpc.StatusCode.OK
        return stream.code()


@contextmanager
def _opened() -> Iterator[Check]:
    folder = Path(tempfile.mkdtemp(prefix="kvist-fuzz-"))
    flash = ["--flash-path", str(folder / "flash"), "--flash-bytes", "4MiB"]
    sidecar = Sidecar(folder, ["--dram-bytes", "4MiB", *flash])
    try:
        sidecar.start()
        with sidecar.channel() as channel:
            caller = _Caller(channel)

            def check(data: object) -> None:
                assert isinstance(data, Call)
                for wire in data.variants(caller.session):
                    code, details = caller.send(data.method, wire)
                    assert code in ANSWERS, f"{code}: {details} to {wire}"

            yield check
        _check_alive(sidecar)
    finally:
        sidecar.close()
        shutil.rmtree(folder)


def _check_alive(sidecar: Sidecar) -> None:
    """It has not restarted, logged no trace, not grown, and serves as if nothing had been."""
    assert sidecar.process is not None
    assert sidecar.process.poll() is None, sidecar.text()[-3000:]
    assert "Traceback" not in sidecar.text(), sidecar.text()[-3000:]
    status = Path(f"/proc/{sidecar.process.pid}/status").read_text()
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert anonymous is not None
    assert int(anonymous[1]) << 10 < SIDECAR_BYTES_MAX, anonymous[0]
    prompt = Prompt(1, 8, namespace("after the storm"))
    client = sidecar.client("after", namespace("after the storm"))
    assert client.store(prompt.items).stored == len(prompt.items)
    assert load_all(client, prompt) == [None] * len(prompt.items)


TARGET = Target("gRPC messages", CALLS, _opened, inputs_an_example=VARIANTS)
