"""vLLM's own classes read what Kvist tells routers. Runs with vLLM's Python (make test-vllm)."""

from __future__ import annotations

import io
import time
from pathlib import Path

import msgspec
import pytest
import zmq

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from vllm.config.kv_events import KVEventsConfig  # noqa: E402
from vllm.distributed import kv_events as theirs  # noqa: E402
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash  # noqa: E402

from kvist.cachesvc.events.journal import Facts, Journal  # noqa: E402
from kvist.cachesvc.events.publisher import Publisher  # noqa: E402
from kvist.cachesvc.events.settings import KvEventsConfig as Ours  # noqa: E402
from kvist.cachesvc.log import Log  # noqa: E402
from kvist.proto import kv_events as ours  # noqa: E402
from kvist.proto.keys import NO_KEY, BlockKey  # noqa: E402

KEYS = [BlockKey(bytes([n]) * 16) for n in range(1, 4)]


def test_the_bytes_are_those_that_vllm_sends() -> None:
    batch = theirs.KVEventBatch(
        ts=1.5,
        events=[
            theirs.BlockStored(
                block_hashes=[1, 2**64 - 1], parent_block_hash=None, token_ids=[5, 6, 7, 8],
                block_size=2, lora_id=None, medium=theirs.MEDIUM_CPU, lora_name=None,
            ),
            theirs.BlockStored(
                block_hashes=[3], parent_block_hash=7, token_ids=[], block_size=0, lora_id=None,
                medium=theirs.MEDIUM_STORAGE, lora_name=None, extra_keys=[("kvist:00",)],
            ),
            theirs.BlockRemoved(block_hashes=[1], medium=theirs.MEDIUM_GPU),
            theirs.AllBlocksCleared(),
        ],
        data_parallel_rank=0,
    )  # fmt: skip
    events: list[ours.Event] = [
        ours.BlockStored([1, 2**64 - 1], None, [5, 6, 7, 8], 2, None, ours.CPU, None),
        ours.BlockStored([3], 7, [], 0, None, ours.STORAGE, None, [("kvist:00",)]),
        ours.BlockRemoved([1], ours.GPU),
        ours.AllBlocksCleared(),
    ]
    encoded = ours.encode_batch(1.5, events, "map")
    assert encoded == msgspec.msgpack.encode(batch)
    assert msgspec.msgpack.decode(encoded, type=theirs.KVEventBatch) == batch


def test_hashes_are_shortened_as_vllm_shortens_its_own() -> None:
    for key in KEYS:
        assert ours.hash_of(key) == maybe_convert_block_hash(key)


def test_vllms_settings_are_ours() -> None:
    defaults = KVEventsConfig(enable_kv_cache_events=True)
    fields = {f: getattr(defaults, f) for f in defaults.__dataclass_fields__}
    assert msgspec.convert(fields, Ours) == Ours()


def test_a_subscriber_of_vllms_reads_messages_and_replay(tmp_path: Path) -> None:
    journal = Journal()
    config = Ours(endpoint=f"ipc://{tmp_path}/pub", replay_endpoint=f"ipc://{tmp_path}/replay")
    publisher = Publisher(config, journal, Log(io.StringIO()))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        sub = context.socket(zmq.SUB)
        sub.connect(config.endpoint)
        sub.subscribe(b"")
        assert sub.poll(10_000)  # connected: the empty batch of an idle publisher
        sub.recv_multipart()
        parent = NO_KEY
        for key in KEYS:
            journal.stored(key, ours.CPU, Facts(parent, bytes(range(1, 9)), ""))
            parent = key
        events: list[object] = []
        deadline = time.monotonic() + 10.0
        while not events:
            assert time.monotonic() < deadline
            _, number, payload = sub.recv_multipart()
            events = msgspec.msgpack.decode(payload, type=theirs.KVEventBatch).events
        hashes = [ours.hash_of(key) for key in KEYS]
        (event,) = events
        assert isinstance(event, theirs.BlockStored)
        assert (event.block_hashes, event.parent_block_hash) == (hashes, None)
        assert event.token_ids == [0x04030201, 0x08070605] * 3
        assert event.block_size == 2

        replay = context.socket(zmq.DEALER)
        replay.connect(config.replay_endpoint or "")
        replay.send_multipart((b"", number))
        assert replay.poll(10_000)
        assert replay.recv_multipart() == [b"", b"", number, payload]
        assert replay.recv_multipart()[2] == theirs.ZmqEventPublisher.END_SEQ
    finally:
        context.destroy(linger=0)
        publisher.close()
