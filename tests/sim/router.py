"""A router: subscribes to KV events as vLLM's example does, and keeps what it was told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from kvist.proto.kv_events import END, SNAPSHOT

WAIT_S = 20.0

Copy = tuple[int, str]
"""Hash and medium."""


class Router:
    """One subscriber.

    Attributes:
        copies: what is where.
        parents, tokens: of each block that was ever told, by hash; tokens as a tuple.
        spaces: the same, of those that have extra keys.
        last: number of the last message; -1 before the first.
        gaps: missed messages that were asked for again.
        lose: so many of the next messages that have events are lost.
        heard: (event, medium) -> blocks.
        strays: blocks that were told before the one that they stand on.

    Args:
        endpoint, replay_endpoint: of a publisher.
    """

    def __init__(self, endpoint: str, replay_endpoint: str = "") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.setsockopt(zmq.RECONNECT_IVL, 10)
        self._sub.connect(endpoint)
        self._sub.subscribe(b"")
        self._dealer = self._context.socket(zmq.DEALER)
        if replay_endpoint:
            self._dealer.connect(replay_endpoint)
        self.last = -1
        self.gaps = 0
        self.lose = 0
        self.copies: set[Copy] = set()
        self.parents: dict[int, int | None] = {}
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.spaces: dict[int, str] = {}
        self.heard: Counter[tuple[str, str]] = Counter()
        self.strays: list[int] = []

    def close(self) -> None:
        """Hang up."""
        self._context.destroy(linger=0)

    def listen(self, until: Callable[[], bool], wait_s: float = WAIT_S) -> None:
        """Take messages until something holds."""
        deadline = time.monotonic() + wait_s
        while not until():
            assert time.monotonic() < deadline, "the events do not say so"
            if self._sub.poll(20):
                self._take(*self._sub.recv_multipart())

    def _take(self, topic: bytes, number: bytes, payload: bytes) -> None:
        seq = int.from_bytes(number, "big")
        if seq <= self.last:  # a replay has told it
            return
        if self.lose and msgspec.msgpack.decode(payload)[1]:
            self.lose -= 1
            return
        if self.last >= 0 and seq > self.last + 1:
            self.gaps += 1
            self.replay(self.last + 1)
        if seq > self.last:
            self._apply(payload)
            self.last = seq
        assert not topic.startswith(b"\xff")

    def replay(self, start: int) -> list[int]:
        """Ask for all messages from a number on; the numbers that came."""
        return self._ask(start.to_bytes(8, "big"))

    def snapshot(self) -> list[int]:
        """Ask for everything; the numbers that came."""
        return self._ask(SNAPSHOT)

    def _ask(self, request: bytes) -> list[int]:
        self._dealer.send_multipart((b"", request))
        numbers: list[int] = []
        while True:
            assert self._dealer.poll(int(WAIT_S * 1000)), "no answer"
            empty, _, number, payload = self._dealer.recv_multipart()
            assert empty == b""
            if number == END:
                assert payload == b""
                return numbers
            numbers.append(int.from_bytes(number, "big"))
            self._apply(payload)
            self.last = max(self.last, numbers[-1])

    def _apply(self, payload: bytes) -> None:
        ts, events, rank = msgspec.msgpack.decode(payload)
        assert rank == 0
        assert ts > 1.7e9
        for event in events:
            name = event["type"]
            self.heard[name, event.get("medium", "")] += len(event.get("block_hashes", ""))
            if name == "AllBlocksCleared":
                self.copies.clear()
            elif name == "BlockRemoved":
                self.copies -= {(each, event["medium"]) for each in event["block_hashes"]}
            else:
                assert name == "BlockStored"
                self._stored(event)

    def _stored(self, event: dict[str, Any]) -> None:
        parent, size = event["parent_block_hash"], event["block_size"]
        known = {each for each, _ in self.copies}
        if parent is not None and parent not in known:
            self.strays.append(event["block_hashes"][0])
        hashes, tokens = event["block_hashes"], event["token_ids"]
        assert len(tokens) == size * len(hashes)
        for i, each in enumerate(hashes):
            self.copies.add((each, event["medium"]))
            self.parents[each] = parent
            if tokens:
                self.tokens[each] = tuple(tokens[i * size : (i + 1) * size])
            extra = event.get("extra_keys")
            if extra is not None and extra[i] is not None:
                (self.spaces[each],) = extra[i]
            parent = each
