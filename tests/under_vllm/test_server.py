"""vLLM's own OpenAI server with Kvist under it: what its /metrics, its hit sources and its stream
of KV events say. Runs with vLLM's Python only (make test-vllm)."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import msgspec
import zmq
from sim.sidecar import Sidecar, wait_until
from sim.vllm_server import VllmServer, free_port
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

DRAW = random.Random(17)
BLOCKS = 3
PROMPT = [DRAW.randrange(100, 49000) for _ in range(BLOCKS * 128 + 20)]


class Stream:
    """Follows vLLM's KV events, decoded by vLLM's own types."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(endpoint)
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self.events: list[Any] = []

    def ours(self, kind: type, medium: str) -> list[Any]:
        """Events of blocks that Kvist holds, of all so far."""
        while self._socket.poll(0):
            _, _, payload = self._socket.recv_multipart()
            self.events += self._decoder.decode(payload).events
        return [
            one for one in self.events
            if isinstance(one, kind) and one.ownership == "kvist" and one.medium == medium
        ]  # fmt: skip

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    folder = tmp_path_factory.mktemp("vllm-server")
    flash = ["--flash-path", str(folder / "flash"), "--flash-bytes", "256MiB"]
    made = Sidecar(
        folder / "sidecar", ["--dram-bytes", "256MiB", *flash, "--flash-admission", "always"]
    )
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(model: Path, sidecar: Sidecar, port: int) -> Iterator[VllmServer]:
    # vLLM binds an address with a star and connects to any other.
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"}
    flags = [
        "--kv-events-config",
        json.dumps(events),
        "--max-num-batched-tokens",
        "128",
        "--max-num-seqs",
        "8",
    ]
    made = VllmServer(model, sidecar.socket, sidecar.folder / "server.log", *flags)
    yield made
    made.close()


@pytest.fixture(scope="module")
def stream(server: VllmServer, port: int) -> Iterator[Stream]:
    assert server.get("/health") == ""  # it is there to be subscribed to
    made = Stream(f"tcp://127.0.0.1:{port}")
    time.sleep(0.5)  # a subscription takes a moment
    yield made
    made.close()


def tokens(reply: dict[str, Any]) -> list[int]:
    said: list[int] = reply["choices"][0]["token_ids"]
    return said


def test_hits_are_in_vllms_metrics_and_hit_sources_and_blocks_in_its_events(
    server: VllmServer, stream: Stream
) -> None:
    cold = tokens(server.complete(PROMPT))
    wait_until(lambda: server.metric("vllm:kvist_save_blocks_total") == BLOCKS, "blocks", 30.0)
    assert server.metric("vllm:kvist_miss_tokens_total", reason="tail") == 20
    assert server.metric("vllm:kvist_miss_tokens_total", reason="never_stored") == BLOCKS * 128

    def told() -> bool:
        server.complete([5, 6, 7], max_tokens=1)  # events go out with vLLM's steps
        return len(stream.ours(BlockStored, "CPU")) == BLOCKS

    wait_until(told, "events of what is stored", 30.0)
    stored = stream.ours(BlockStored, "CPU")
    on_device = [
        one for one in stream.events if isinstance(one, BlockStored) and one.medium == "GPU"
    ]
    hashes = [one.block_hashes[0] for one in stored]
    assert hashes == [hash for one in on_device for hash in one.block_hashes][:BLOCKS]
    assert [one.parent_block_hash for one in stored] == [None, *hashes[:-1]]
    assert [token for one in stored for token in one.token_ids] == PROMPT[: BLOCKS * 128]
    assert {one.block_size for one in stored} == {128}

    server.post("/reset_prefix_cache")
    assert tokens(server.complete(PROMPT)) == cold
    assert server.metric("vllm:kvist_hit_tokens_total", tier="dram") == BLOCKS * 128
    assert server.metric("vllm:external_prefix_cache_hits_total") == BLOCKS * 128
    cached = "vllm:prompt_tokens_cached_by_source_total"
    assert server.metric(cached, source="host") == BLOCKS * 128
    assert server.metric("vllm:kvist_load_blocks_total") == BLOCKS


def test_blocks_that_fall_to_flash_are_told_and_hits_there_are_of_the_disk(
    server: VllmServer, sidecar: Sidecar, stream: Stream
) -> None:
    sidecar.stop()
    sidecar.start()

    def moved() -> bool:
        server.complete([5, 6, 7], max_tokens=1)
        return len(stream.ours(BlockStored, "STORAGE")) == BLOCKS

    wait_until(moved, "events of what fell", 30.0)
    gone = [one.block_hashes for one in stream.ours(BlockRemoved, "CPU")]
    assert gone == [one.block_hashes for one in stream.ours(BlockStored, "STORAGE")]
    server.post("/reset_prefix_cache")
    before = server.metric("vllm:prompt_tokens_cached_by_source_total", source="disk")
    server.complete(PROMPT)
    after = server.metric("vllm:prompt_tokens_cached_by_source_total", source="disk")
    assert after - before == BLOCKS * 128
    assert server.metric("vllm:kvist_hit_tokens_total", tier="flash") == BLOCKS * 128
    assert server.metric("vllm:kvist_rise_waits_total") == 1


def test_a_reset_of_the_connector_takes_back_what_was_told(
    server: VllmServer, stream: Stream
) -> None:
    before = len(stream.ours(BlockRemoved, "CPU")) + len(stream.ours(BlockRemoved, "STORAGE"))
    server.post("/reset_prefix_cache?reset_external=true")

    def taken_back() -> bool:
        server.complete([5, 6, 7], max_tokens=1)
        gone = len(stream.ours(BlockRemoved, "CPU")) + len(stream.ours(BlockRemoved, "STORAGE"))
        return gone - before >= BLOCKS

    wait_until(taken_back, "events of what may not be used", 30.0)
    hits = server.metric("vllm:external_prefix_cache_hits_total")
    server.complete(PROMPT)
    assert server.metric("vllm:external_prefix_cache_hits_total") == hits
