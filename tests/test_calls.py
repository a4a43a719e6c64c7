"""Calls over the packet socket: in order, refused with a reason, and cheap to get wrong."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.sidecar import Prompt, Sidecar, load_all, wait_until

from kvist.cachesvc.api.calls import COMMIT, ERRORS, RESERVE, CallSocket, Pending, pack_error
from kvist.cachesvc.worker import storing
from kvist.proto import cache_pb2
from kvist.proto.errors import (
    BlockCorrupt,
    ConfigInvalid,
    Detached,
    KvistError,
    SessionUnknown,
    TierFull,
)
from kvist.proto.keys import NO_KEY

LONG = 10.0


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path)
    made.start()
    yield made
    made.close()


@pytest.fixture
def calls(sidecar: Sidecar) -> Iterator[CallSocket]:
    made = CallSocket(sidecar.folder / "run" / "calls", LONG)
    yield made
    made.end()


def reserve(session: str, *keys: bytes) -> cache_pb2.ReserveRequest:
    names = [cache_pb2.BlockName(key=key, parent=NO_KEY) for key in keys]
    return cache_pb2.ReserveRequest(session=session, blocks=names)


def test_replies_come_in_order_whichever_is_taken_first(
    sidecar: Sidecar, calls: CallSocket
) -> None:
    client = sidecar.client()
    assert client._life is not None
    session = client._life.session
    sent = [
        calls.send(RESERVE, reserve(session, *[bytes([n]) * 16] * n), cache_pb2.ReserveReply)
        for n in (3, 1, 2)
    ]
    counts = [len(pending.result().reservations) for pending in reversed(sent)]
    assert counts == [2, 1, 3]
    assert [len(pending.result().reservations) for pending in sent] == [3, 1, 2]


def test_what_is_wrong_with_a_call_is_said_and_the_next_one_works(
    sidecar: Sidecar, calls: CallSocket
) -> None:
    unknown = calls.send(RESERVE, reserve("nobody", bytes(16)), cache_pb2.ReserveReply)
    short = calls.send(RESERVE, reserve("nobody", b"short"), cache_pb2.ReserveReply)
    method = calls.send(99, reserve("nobody"), cache_pb2.ReserveReply)
    with pytest.raises(SessionUnknown, match="nobody"):
        unknown.result()
    with pytest.raises(ConfigInvalid, match=r"blocks\.key: 5 bytes"):
        short.result()
    with pytest.raises(ConfigInvalid, match="method: 99"):
        method.result()
    client = sidecar.client()
    assert client._life is not None
    commit = cache_pb2.CommitRequest(session=client._life.session, slots=[1, 2])
    reply = calls.send(COMMIT, commit, cache_pb2.CommitReply).result()
    assert list(reply.committed) == [False, False]
    assert list(reply.reasons) == ["torn", "torn"]


@pytest.mark.parametrize("packet", [b"\1\xff\xff\xff", b"\2" + bytes(1000), b"\0", b"\1"])
def test_garbage_is_answered_and_harms_nobody(sidecar: Sidecar, packet: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as plain:
        plain.settimeout(LONG)
        plain.connect(str(sidecar.folder / "run" / "calls"))
        plain.send(packet)
        assert plain.recv(1 << 16)[0] > 0
    client, prompt = sidecar.client(), Prompt(1, 4)
    assert client.store(prompt.items).stored == 4


def test_a_worker_that_takes_no_replies_is_dropped_and_the_others_are_served(
    sidecar: Sidecar,
) -> None:
    client = sidecar.client()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as plain:
        plain.settimeout(LONG)
        plain.connect(str(sidecar.folder / "run" / "calls"))

        def flood() -> None:
            for _ in range(100_000):
                plain.send(b"\1")

        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            flood()
    prompt = Prompt(1, 4)
    assert client.store(prompt.items).stored == 4
    assert load_all(client, prompt) == [None] * 4


def test_a_waiting_caller_gets_detached_when_the_socket_is_ended(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "calls"))
        listener.listen()
        calls = CallSocket(tmp_path / "calls", LONG)
        pending = calls.send(RESERVE, reserve("x"), cache_pb2.ReserveReply)
        threading.Timer(0.1, calls.end).start()
        with pytest.raises(Detached):
            pending.result()
        with pytest.raises(Detached):
            calls.send(RESERVE, reserve("x"), cache_pb2.ReserveReply)


def test_a_sidecar_that_does_not_answer_in_time_is_gone_for_good(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "calls"))
        listener.listen()
        calls = CallSocket(tmp_path / "calls", 0.05)
        pending = calls.send(RESERVE, reserve("x"), cache_pb2.ReserveReply)
        with pytest.raises(Detached, match="timed out"):
            pending.result()
        with pytest.raises(Detached):
            calls.send(RESERVE, reserve("x"), cache_pb2.ReserveReply)
        calls.end()


@pytest.mark.parametrize("kind", [*ERRORS, BlockCorrupt])
def test_errors_keep_their_kind_on_the_wire(kind: type[KvistError]) -> None:
    packet = pack_error(kind("why"))
    assert ERRORS[packet[0] - 1] is (kind if kind in ERRORS else Detached)
    assert packet[1:] == b"why"


def test_a_store_of_many_steps_keeps_its_share_and_stores_all(
    sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = sidecar.client()
    prompt = Prompt(5, 40)
    monkeypatch.setattr(storing, "STEP_BYTES", 3 * prompt.items[0].payload.nbytes)
    calls = client.rpc_calls
    result = client.store(prompt.items)
    assert (result.stored, result.dropped) == (40, {})
    assert client.rpc_calls - calls == 2 * 14
    assert load_all(client, prompt) == [None] * 40
    assert client.store(prompt.items).present == 40


def test_the_first_and_the_last_step_of_a_store_are_short(
    sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = sidecar.client()
    prompt = Prompt(8, 21)
    block_bytes = prompt.items[0].payload.nbytes
    monkeypatch.setattr(storing, "STEP_BYTES", 8 * block_bytes)
    monkeypatch.setattr(storing, "END_BYTES", 2 * block_bytes)
    steps: list[int] = []
    reserve = client._control.reserve

    def counted(request: cache_pb2.ReserveRequest) -> Pending[cache_pb2.ReserveReply]:
        steps.append(len(request.blocks))
        return reserve(request)

    monkeypatch.setattr(client._control, "reserve", counted)
    assert client.store(prompt.items).stored == 21
    assert steps == [2, 8, 8, 3]
    assert load_all(client, prompt) == [None] * 21


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_a_small_share_only_makes_the_steps_smaller(sidecar: Sidecar, limit: int) -> None:
    client = sidecar.client()
    assert client._life is not None
    client._life.reservation_limit = limit
    prompt = Prompt(6, 10)
    result = client.store(prompt.items)
    assert (result.stored, result.dropped) == (10, {})
    assert load_all(client, prompt) == [None] * 10


def test_children_of_a_refused_block_are_not_tried_in_later_steps(
    sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = sidecar.client()
    prompt = Prompt(7, 9)
    monkeypatch.setattr(storing, "STEP_BYTES", 2 * prompt.items[0].payload.nbytes)
    result = client.store(prompt.items[1:])  # without the first, nothing stands
    assert (result.stored, dict(result.dropped)) == (0, {"no_parent": 8})
    wait_until(
        lambda: json.loads(sidecar.get("stats.json"))["reserved_slots"] == 0, "no slot to be held"
    )


def test_full_is_a_tier_full(tmp_path: Path) -> None:
    assert ERRORS[pack_error(TierFull("x"))[0] - 1] is TierFull
    with pytest.raises(OSError, match="No such file"):
        CallSocket(tmp_path / "none", LONG)
