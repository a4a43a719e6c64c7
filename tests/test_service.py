"""The gRPC service of a real kvistd: limits, sessions, remote reads and writes, health."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sim.sidecar import Prompt, Sidecar, load_all, namespace, wait_until

from kvist.cachesvc.api.service import STATUS
from kvist.cachesvc.placing.clearing import STEP_BLOCKS
from kvist.cachesvc.worker.control import KEYS_MAX, PROTOCOL_VERSION, SLOTS_MAX
from kvist.proto import cache_pb2, errors
from kvist.proto.cache_pb2_grpc import CacheStub
from kvist.proto.keys import BlockKey
from kvist.proto.record import BlockHeader, checksum
from kvist.proto.slot import fill_slot, payload_of
from kvist.transfer.stream import Joiner, split

KEY = bytes(range(16))


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path_factory.mktemp("kvistd"), ["--listen", "127.0.0.1:0"])
    made.start()
    yield made
    made.close()


@pytest.fixture
def stub(sidecar: Sidecar) -> Iterator[CacheStub]:
    with sidecar.channel() as channel:
        yield CacheStub(channel)


@pytest.fixture
def remote(sidecar: Sidecar) -> Iterator[CacheStub]:
    with sidecar.channel(sidecar.said("listen")) as channel:
        yield CacheStub(channel)


def attach_request(**changes: object) -> cache_pb2.AttachRequest:
    of = namespace()
    fields: dict[str, object] = {
        "protocol_version": PROTOCOL_VERSION,
        "client": "test",
        "pid": 1,
        "namespace": of.digest(),
        "payload_bytes": of.format.payload_bytes,
        "block_tokens": of.format.block_tokens,
    }
    return cache_pb2.AttachRequest(**{**fields, **changes})  # type: ignore[arg-type]


def refused(call: grpc.UnaryUnaryMultiCallable, request: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=5.0)
    return caught.value.code(), caught.value.details()


def records(prompt: Prompt) -> Iterator[cache_pb2.Chunk]:
    """The prompt's blocks as a remote client sends them."""
    for item in prompt.items:
        header = BlockHeader(
            item.key, item.parent, item.namespace, item.depth, item.tokens,
            item.payload.nbytes, checksum(item.payload), 0,
        )  # fmt: skip
        record = memoryview(bytearray(header.shape.record_bytes))
        fill_slot(record, header, item.payload)
        yield from split(item.key, record)


def test_every_error_of_the_tree_has_a_status() -> None:
    tree = {
        error
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.KvistError)
    }
    assert tree - {errors.KvistError} <= STATUS.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("client", "x" * 257),
        ("client", ""),
        ("namespace", b"short"),
        ("namespace_text", "x" * 4097),
        ("model", "x" * 257),
        ("pid", 0),
        ("payload_bytes", 0),
        ("payload_bytes", 1 << 40),
        ("block_tokens", 0),
        ("block_tokens", 1 << 20),
    ],
)
def test_attach_refuses_a_field_out_of_its_limits(
    stub: CacheStub, field: str, value: object
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.Attach(attach_request(**{field: value}), timeout=5.0))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"{field}:")


def test_attach_of_another_protocol_version_is_refused_with_both_versions(
    stub: CacheStub,
) -> None:
    said = f"the client speaks 99, this sidecar {PROTOCOL_VERSION}"
    with pytest.raises(grpc.RpcError, match=said) as caught:
        next(stub.Attach(attach_request(protocol_version=99), timeout=5.0))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_attach_of_blocks_larger_than_the_slots_says_what_to_set(
    sidecar: Sidecar, stub: CacheStub
) -> None:
    sidecar.client()  # makes the slots
    with pytest.raises(grpc.RpcError, match="slot_bytes") as caught:
        next(stub.Attach(attach_request(payload_bytes=1 << 22), timeout=5.0))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_attach_over_tcp_is_refused_with_what_to_use(remote: CacheStub) -> None:
    with pytest.raises(grpc.RpcError, match="Lookup, Read and Write") as caught:
        next(remote.Attach(attach_request(), timeout=5.0))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_repeated_fields_are_limited_and_the_message_names_field_and_limit(
    stub: CacheStub,
) -> None:
    many = [KEY] * (KEYS_MAX + 1)
    blocks = [cache_pb2.BlockName(key=KEY, parent=KEY)] * (SLOTS_MAX + 1)
    slots = range(SLOTS_MAX + 1)
    for call, request, field in (
        (stub.Lookup, cache_pb2.LookupRequest(keys=many), "keys"),
        (stub.Prefetch, cache_pb2.PrefetchRequest(keys=many), "keys"),
        (stub.Reserve, cache_pb2.ReserveRequest(session="s", blocks=blocks), "blocks"),
        (stub.Commit, cache_pb2.CommitRequest(session="s", slots=slots), "slots"),
        (stub.Abort, cache_pb2.AbortRequest(session="s", slots=slots), "slots"),
    ):
        code, message = refused(call, request)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert message.startswith(f"{field}: ")
        assert "the limit is" in message


def test_keys_of_another_length_are_refused(stub: CacheStub) -> None:
    for call, request in (
        (stub.Lookup, cache_pb2.LookupRequest(keys=[b"short"])),
        (stub.Clear, cache_pb2.ClearRequest(namespace=b"short")),
        (
            stub.Reserve,
            cache_pb2.ReserveRequest(session="s", blocks=[cache_pb2.BlockName(key=KEY)]),
        ),
    ):
        assert refused(call, request)[0] == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["Lookup", "Read", "Write", "Attach"])
def test_bytes_that_are_no_message_are_refused_without_a_trace(
    sidecar: Sidecar, method: str
) -> None:
    path, garbage = f"/kvist.v1.Cache/{method}", b"\x00\x01"
    with sidecar.channel() as channel:
        calls = {
            "Lookup": lambda: channel.unary_unary(path)(garbage, timeout=5.0),
            "Write": lambda: channel.stream_unary(path)(iter([garbage]), timeout=5.0),
            "Read": lambda: next(channel.unary_stream(path)(garbage, timeout=5.0)),
            "Attach": lambda: next(channel.unary_stream(path)(garbage, timeout=5.0)),
        }
        with pytest.raises(grpc.RpcError) as caught:
            calls[method]()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "request" in caught.value.details()
    assert "Traceback" not in sidecar.text()


def test_unknown_session_is_not_found(stub: CacheStub) -> None:
    blocks = [cache_pb2.BlockName(key=KEY, parent=bytes(16))]
    for call, request in (
        (stub.Reserve, cache_pb2.ReserveRequest(session="gone", blocks=blocks)),
        (stub.Commit, cache_pb2.CommitRequest(session="gone", slots=[0])),
        (stub.Abort, cache_pb2.AbortRequest(session="gone", slots=[0])),
    ):
        assert refused(call, request)[0] == grpc.StatusCode.NOT_FOUND


def test_lookup_of_nothing_and_of_the_unknown_are_normal_replies(stub: CacheStub) -> None:
    assert stub.Lookup(cache_pb2.LookupRequest()).blocks == 0
    reply = stub.Lookup(cache_pb2.LookupRequest(keys=[KEY]))
    assert (reply.blocks, reply.miss_reason) == (0, "never_stored")


def test_session_ends_with_its_stream(stub: CacheStub) -> None:
    before = stub.Stats(cache_pb2.StatsRequest()).sessions
    stream = stub.Attach(attach_request())
    session = next(stream).session
    assert stub.Stats(cache_pb2.StatsRequest()).sessions == before + 1
    stream.cancel()
    wait_until(lambda: stub.Stats(cache_pb2.StatsRequest()).sessions == before, "its end")
    request = cache_pb2.CommitRequest(session=session, slots=[0])
    assert refused(stub.Commit, request)[0] == grpc.StatusCode.NOT_FOUND


def test_remote_client_writes_and_reads_back_what_local_workers_see(
    sidecar: Sidecar, remote: CacheStub
) -> None:
    worker = sidecar.client()
    prompt = Prompt(1, 5)
    reply = remote.Write(records(prompt), timeout=10.0)
    assert (reply.stored, reply.present, reply.refused) == (5, 0, 0)
    assert remote.Write(records(prompt), timeout=10.0).present == 5
    assert load_all(worker, prompt) == [None] * 5
    reply = remote.Lookup(cache_pb2.LookupRequest(keys=prompt.keys))
    assert list(reply.tiers) == ["dram"] * 5

    joiner = Joiner(1 << 24)
    request = cache_pb2.ReadRequest(keys=[*prompt.keys, KEY])
    got = [joiner.feed(chunk) for chunk in remote.Read(request, timeout=10.0)]
    whole = [memoryview(record) for record in got if record is not None]
    assert len(whole) == 5
    for item, record in zip(prompt.items, whole, strict=True):
        header = BlockHeader(
            item.key, item.parent, item.namespace, item.depth, item.tokens,
            item.payload.nbytes, checksum(item.payload), 0,
        )  # fmt: skip
        assert np.array_equal(payload_of(record, header), item.payload)


def test_remote_uses_may_carry_a_hint_and_one_that_cannot_be_is_refused(
    remote: CacheStub, sidecar: Sidecar
) -> None:
    sidecar.client()
    prompt = Prompt(31, 2)
    assert remote.Write(records(prompt), timeout=10.0).stored == 2
    hint = cache_pb2.Hint(tool_pause_s=20, priority=2)
    assert list(remote.Read(cache_pb2.ReadRequest(keys=prompt.keys, hint=hint), timeout=10.0))
    assert not remote.Prefetch(cache_pb2.PrefetchRequest(keys=prompt.keys, hint=hint)).rising
    wrong = cache_pb2.PrefetchRequest(keys=prompt.keys, hint=cache_pb2.Hint(priority=4))
    code, message = refused(remote.Prefetch, wrong)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith("hint.priority: 4, give -3 to 3")


def test_read_of_the_unknown_is_an_empty_stream(remote: CacheStub) -> None:
    assert list(remote.Read(cache_pb2.ReadRequest(keys=[KEY]), timeout=5.0)) == []


def test_write_of_a_damaged_or_cut_record_is_refused(remote: CacheStub, sidecar: Sidecar) -> None:
    sidecar.client()
    chunk = next(records(Prompt(2, 1)))
    flipped = bytearray(chunk.data)
    flipped[-1] ^= 1
    # The payload's end may be padding, so its first byte is flipped too.
    flipped[4096] ^= 1
    damaged = cache_pb2.Chunk(
        key=chunk.key, offset=0, data=bytes(flipped), record_bytes=chunk.record_bytes
    )
    code, _ = refused(remote.Write, iter([damaged]))
    assert code == grpc.StatusCode.DATA_LOSS
    cut = cache_pb2.Chunk(
        key=chunk.key, offset=0, data=chunk.data[:4096], record_bytes=chunk.record_bytes
    )
    code, message = refused(remote.Write, iter([cut]))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "ended amid a record" in message
    assert remote.Lookup(cache_pb2.LookupRequest(keys=[chunk.key])).blocks == 0


def test_clear_of_a_namespace_leaves_the_others(sidecar: Sidecar, stub: CacheStub) -> None:
    worker = sidecar.client()
    mine, other = Prompt(3, 2, namespace("mine")), Prompt(3, 2, namespace("other"))
    assert worker.store([*mine.items, *other.items]).stored == 4
    request = cache_pb2.ClearRequest(namespace=namespace("mine").digest())
    assert stub.Clear(request).dropped_blocks == 2
    assert worker.tiers([BlockKey(key) for key in mine.keys]) == ()
    assert worker.tiers(other.keys) == ("dram", "dram")


def test_a_clear_of_many_blocks_answers_when_their_slots_are_free(
    sidecar: Sidecar, stub: CacheStub
) -> None:
    worker = sidecar.client()
    prompt = Prompt(4, 2 * STEP_BLOCKS + 1)
    stored = worker.store(prompt.items).stored
    assert stored > STEP_BLOCKS
    assert stub.Clear(cache_pb2.ClearRequest()).dropped_blocks >= stored
    (dram,) = stub.Stats(cache_pb2.StatsRequest()).tiers
    assert dram.used_slots == 0
    assert worker.store(prompt.items[:2]).stored == 2


def test_stats_have_a_row_per_tier_and_sums_that_agree(sidecar: Sidecar, stub: CacheStub) -> None:
    worker = sidecar.client()
    worker.count(100, {"dram": 60, "hbm": 10}, {"tail": 30})
    wait_until(
        lambda: stub.Stats(cache_pb2.StatsRequest()).requested_tokens >= 100, "the ring to be read"
    )
    stats = stub.Stats(cache_pb2.StatsRequest())
    assert [tier.tier for tier in stats.tiers] == ["dram"]
    counted = sum(stats.hit_tokens.values()) + sum(stats.miss_tokens.values())
    assert counted == stats.requested_tokens
    assert len(stats.boot_epoch) == 16


def test_health_and_reflection_answer(sidecar: Sidecar) -> None:
    with sidecar.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        reply = health.Check(health_pb2.HealthCheckRequest(service="kvist.v1.Cache"))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = reflection.ServerReflectionInfo(asked)
        names = {service.name for service in answer.list_services_response.service}
        assert {"kvist.v1.Cache", "grpc.health.v1.Health"} <= names


def test_socket_and_its_folder_are_for_their_user_only(sidecar: Sidecar) -> None:
    assert sidecar.socket.stat().st_mode & 0o777 == 0o600
    assert (sidecar.folder / "run").stat().st_mode & 0o077 == 0
    for path in Path(sidecar.folder / "shm").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0
