"""The publisher: a thread that tells routers what the journal says, and answers who missed some.

    PUB       each batch of events, numbered. Numbers begin at the clock, so that those of a new
              life lie above those of the one before: whoever heard that one sees a gap.
    ROUTER    replay from a number, or a snapshot; see proto/kv_events.py

Whoever asks for a message that is not kept any more gets a snapshot in its place, under numbers
that were used for what he missed, and then what is kept: that repeats what the snapshot says
already, and events may be repeated. So a subscriber of vLLM's, which knows replay only, comes to
the whole state, whenever it began, after a crash of the sidecar too.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvist.cachesvc.events.journal import Journal
from kvist.cachesvc.events.settings import KvEventsConfig
from kvist.cachesvc.events.told import Told
from kvist.cachesvc.log import Log
from kvist.proto.errors import ConfigInvalid
from kvist.proto.kv_events import (
    END,
    SNAPSHOT,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    encode_batch,
    encode_number,
)

if TYPE_CHECKING:  # 25 ms to import, for nobody who has events off
    import zmq

# Changes of so long become one batch: a step's commits come together, and short lives are not told.
GATHER_S = 0.005
# What is kept for replay, in bytes as well: a snapshot does where it ends.
BUFFER_BYTES_MAX = 64 << 20
# Messages on the way to somebody who asked; he reads at his own pace, we do not wait for him.
ANSWER_HWM = 64
ANSWERS_MAX = 64
# When nothing happens an empty batch says how far the numbers are, so that whoever missed the last
# message, or a restart, learns of it.
IDLE_WAIT_MS = 1000
BUSY_WAIT_MS = 5
LINGER_MS = 200

Frames = tuple[bytes, bytes, bytes]


class Publisher:
    """Tells one journal's changes. Made, closed and read on any thread; it has its own.

    Attributes:
        events: (event, medium) -> blocks told; ("cleared", "") -> how often that was.
        answers: "replay" or "snapshot" -> requests answered.
        batches: messages sent.
        journal: what it tells.

    Args:
        config: addresses and bounds.
        journal: closed by close.
        log: where faults are told.
        wall: unix seconds.

    Raises:
        ConfigInvalid: an address cannot be bound.
    """

    def __init__(
        self,
        config: KvEventsConfig,
        journal: Journal,
        log: Log,
        wall: Callable[[], float] = time.time,
    ) -> None:
        import zmq

        self.events: Counter[tuple[str, str]] = Counter()
        self.answers: Counter[str] = Counter()
        self.batches = 0
        self._config = config
        self.journal = journal
        self._log = log
        self._wall = wall
        self._topic = config.topic.encode()
        self._told = Told()
        self._first = self._next = int(wall() * 1e6)
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._waiting: dict[bytes, _Answer] = {}
        self._stopping = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._pub = self._open(zmq.PUB, config.hwm, "endpoint", config.endpoint)
            self._replay: zmq.Socket[bytes] | None = None
            if config.replay_endpoint is not None:
                self._replay = self._open(
                    zmq.ROUTER, ANSWER_HWM, "replay_endpoint", config.replay_endpoint
                )
                self._replay.setsockopt(zmq.ROUTER_MANDATORY, 1)  # tells who is gone or full
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="kvist-events", daemon=True)
        self._thread.start()

    def _open(self, kind: int, hwm: int, key: str, address: str) -> zmq.Socket[bytes]:
        import zmq

        socket = self._context.socket(kind)
        socket.set_hwm(hwm)
        is_bound = key == "replay_endpoint" or address.startswith("ipc://")
        try:
            if is_bound or any(word in address for word in ("*", "::", "0.0.0.0")):
                socket.bind(address)
            else:
                socket.connect(address)
        except zmq.ZMQError as error:
            raise ConfigInvalid(
                f"kv_events_config: {key}: cannot use {address}: {error}; give another address"
            ) from None
        return socket

    @property
    def pending(self) -> int:
        """Changes that were not told yet."""
        return len(self.journal)

    @property
    def number(self) -> int:
        """Of the next message."""
        return self._next

    def close(self) -> None:
        """Tell that nothing is here now, end the thread, let the sockets go."""
        self._stopping = True
        self.journal.ring()
        self._thread.join()
        self._pub.close(linger=LINGER_MS)
        if self._replay is not None:
            self._replay.close(linger=0)
        self._context.term()
        self.journal.close()

    # On the thread.

    def _run(self) -> None:
        import zmq

        poller = zmq.Poller()
        poller.register(self.journal.bell, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        try:
            self._publish([AllBlocksCleared()])
            while not self._stopping:
                ready = dict(poller.poll(BUSY_WAIT_MS if self._waiting else IDLE_WAIT_MS))
                if not ready and not self._waiting:
                    self._publish([])
                if self.journal.bell in ready:
                    time.sleep(GATHER_S)
                    self._tell()
                if self._replay is not None:
                    if self._replay in ready:
                        self._receive(self._replay)
                    self._answer(self._replay)
            self._publish([AllBlocksCleared()])  # nobody is served from here any more
        except Exception as error:  # our mistake: the cache goes on without events
            self._log.error("kv events ended", error=repr(error))

    def _tell(self) -> None:
        for events in self._told.apply(self.journal.take()):
            self._publish(events)

    def _publish(self, events: list[Event]) -> None:
        payload = encode_batch(self._wall(), events, self._config.event_format)
        number, self._next = self._next, self._next + 1
        self._pub.send_multipart((self._topic, encode_number(number), payload))
        self.batches += 1
        for event in events:
            if isinstance(event, BlockStored | BlockRemoved):
                name = "stored" if isinstance(event, BlockStored) else "removed"
                self.events[name, event.medium or ""] += len(event.block_hashes)
            else:
                self.events["cleared", ""] += 1
        if events:
            self._keep(number, payload)

    def _keep(self, number: int, payload: bytes) -> None:
        self._kept.append((number, payload))
        self._kept_bytes += len(payload)
        while (
            len(self._kept) > self._config.buffer_steps or self._kept_bytes > BUFFER_BYTES_MAX
        ) and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        frames = socket.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            self._log.warning("kv events: request refused", frames=len(frames))
        elif len(self._waiting) >= ANSWERS_MAX and frames[0] not in self._waiting:
            self._log.warning("kv events: request refused", requests=len(self._waiting))
        else:
            self._waiting[frames[0]] = _Answer(self._reply(frames[2]))

    def _reply(self, request: bytes) -> Iterator[Frames]:
        """What answers a request, as it is now."""
        start = int.from_bytes(request, "big")
        kept, last = list(self._kept), self._next - 1
        if request == SNAPSHOT:
            return self._snapshot(range(last, last + 1), [])
        if start < kept[0][0] and kept[0][0] > self._first:
            return self._snapshot(range(start, kept[0][0]), kept)
        self.answers["replay"] += 1
        return self._frames(item for item in kept if item[0] >= start)

    def _snapshot(self, numbers: range, then: list[tuple[int, bytes]]) -> Iterator[Frames]:
        """The state in batches of these numbers, or all of the last one, and what comes then."""
        self.answers["snapshot"] += 1
        lists = self._told.snapshot(len(numbers) if then else 1 << 30)
        event_format = self._config.event_format

        def items() -> Iterator[tuple[int, bytes]]:
            for turn, events in enumerate(lists):
                number = numbers[turn if then else 0]
                yield number, encode_batch(self._wall(), events, event_format)
            yield from then

        return self._frames(items())

    def _frames(self, items: Iterator[tuple[int, bytes]]) -> Iterator[Frames]:
        for number, payload in items:
            yield self._topic, encode_number(number), payload
        yield b"", END, b""

    def _answer(self, socket: zmq.Socket[bytes]) -> None:
        """Give each who asked as much as he takes now, a few messages a turn."""
        import zmq

        for client, answer in list(self._waiting.items()):
            try:
                for _ in range(ANSWER_HWM // 4):
                    if answer.next is not None:
                        socket.send_multipart((client, b"", *answer.next), zmq.NOBLOCK)
                        answer.advance()
            except zmq.Again:  # he is slow, and this message is the next one then too
                continue
            except zmq.ZMQError:  # he is gone
                answer.next = None
            if answer.next is None:
                del self._waiting[client]


class _Answer:
    """Messages for somebody who asked; next is the one that he gets now, None after the last."""

    def __init__(self, frames: Iterator[Frames]) -> None:
        self._frames = frames
        self.advance()

    def advance(self) -> None:
        """The next one is his."""
        self.next = next(self._frames, None)
