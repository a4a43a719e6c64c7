"""A real core loop on a thread, behind the real wire, and the API process's end of it."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
import zmq

from kvist.cachesvc.log import Log
from kvist.engine.config import EngineConfig
from kvist.engine.connector import Cache, Connector
from kvist.engine.core import Core
from kvist.engine.device.runner import DeviceRunner
from kvist.engine.ipc import ApiLink, output_address, request_address
from kvist.engine.models.base import Model
from kvist.engine.models.decode_batch import DecodeBatch
from kvist.engine.opening import Parts
from kvist.engine.pages import Pages
from kvist.engine.request import (
    CACHE_ON,
    Abort,
    CoreStats,
    Delta,
    Fatal,
    FromCore,
    NewRequest,
    Outputs,
    Ready,
    SamplingParams,
    ToCore,
)
from kvist.engine.runner import Landing, Runner, StepRunner
from kvist.engine.sampler import Sampler
from kvist.engine.sequence import Digests, Limits
from kvist.engine.step import Work
from kvist.proto.keys import Namespace
from kvist.tiers.hbm import PagePool
from kvist.transfer.delayed import DELAY_S, DelayedCopies
from kvist.transfer.device import PageCopies
from kvist.transfer.pages import DevicePages, HostPages
from sim.fake_model import FakeDeviceModel

WAIT_S = 60.0


class OneAtATime(DeviceRunner):
    """Triton's interpreter is one for a process, and it does not expect a second thread."""

    _interpreter = threading.Lock()

    def launch(self, works: Sequence[Work]) -> Landing:
        """See DeviceRunner.launch."""
        with self._interpreter:
            return super().launch(works)


def make_parts(
    model: Model,
    namespace: Namespace,
    pages: int,
    cache: Cache | None,
    delay_s: float = DELAY_S,
) -> Parts:
    """Parts for a model that is there already; what open_parts does for a path.

    A model that decodes by rows is taken for a device's, whose copies are late by delay_s.
    """
    pool = PagePool(namespace.format, pages)
    books = Pages(pages)
    size = namespace.format.block_tokens
    longest = min(model.config.max_model_len, pages * size)
    limits = Limits(longest, size, model.config.eos_token_ids)
    runner: StepRunner = Runner(model, pool.tensor, Sampler(0))
    ends: PageCopies = HostPages(pool.page_bytes)
    if isinstance(model, FakeDeviceModel):
        rows, width = EngineConfig(model="sim").max_num_seqs, -(-longest // size)
        batch: Any = DecodeBatch(model, pool.tensor, rows, width, pages * size)  # type: ignore[arg-type]
        copies = DelayedCopies(pool.tensor, delay_s)
        runner = OneAtATime(model, pool.tensor, batch, Sampler(0), copies.fetch)  # type: ignore[arg-type]
        ends = DevicePages(copies, namespace.format.payload_bytes, lambda *_: None)
    connector = Connector(cache, ends, books, Log(io.StringIO()), time.monotonic)
    return Parts(runner, books, connector, limits, namespace.format, Digests(namespace), "float32")


class CoreThread:
    """Starts the loop when entered, ends it when left.

    Attributes:
        ready: the core's first message.
        stats: its latest figures.
        deltas: everything it said, by request.
        error: what ended the loop, if anything did.
    """

    def __init__(self, folder: Path, parts: Parts, **config: Any) -> None:
        self.parts = parts
        self._config = EngineConfig(model="sim", **config)
        self._endpoint = f"ipc://{folder}/core"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._push = self._context.socket(zmq.PUSH)
        self._pull = self._context.socket(zmq.PULL)
        self._push.bind(request_address(self._endpoint))
        self._pull.bind(output_address(self._endpoint))
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="core", daemon=True)
        self._sent = 0
        self.deltas: dict[str, list[Delta]] = {}
        self.stats = CoreStats()
        self.error: Exception | None = None
        self.ready: Ready | None = None

    def __enter__(self) -> Self:
        return self.start()

    def start(self) -> Self:
        """Start the loop and wait until it is ready."""
        self._thread.start()
        self.wait(lambda: self.ready is not None)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the loop and let everything go; once more does nothing."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with contextlib.suppress(zmq.Again):  # a core that gave up has hung up
            self._push.send(msgspec.msgpack.encode(Abort("wake up")), zmq.NOBLOCK)
        self._thread.join(WAIT_S)
        self.parts.close()
        ends = self.parts.connector._copies
        if isinstance(ends, DevicePages) and isinstance(ends._copies, DelayedCopies):
            ends._copies.close()
        self._push.close(linger=0)
        self._pull.close(linger=0)
        self._context.term()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        link = ApiLink(self._endpoint)
        try:
            with torch.inference_mode():
                log = Log(io.StringIO())
                Core(link, self.parts, self._config, log, time.monotonic).run(self._stopping)
        except Exception as error:
            self.error = error
            link.send(Fatal(str(error)))
        finally:
            link.close()

    def send(self, message: ToCore) -> None:
        """Queue a message for the core."""
        self._push.send(msgspec.msgpack.encode(message))

    def submit(
        self,
        prompt: list[int],
        count: int,
        cache: str = CACHE_ON,
        salt: str = "",
        priority: int | None = None,
        **params: Any,
    ) -> str:
        """Send a greedy request; the id that it got."""
        self._sent += 1
        request_id = f"r{self._sent}"
        sampling = SamplingParams(max_tokens=count, **{"temperature": 0.0, **params})
        self.deltas[request_id] = []
        self.send(NewRequest(request_id, prompt, sampling, salt, cache, priority))
        return request_id

    def send_abort(self, request_id: str) -> None:
        """Ask for an abort."""
        self.send(Abort(request_id))

    def wait(self, until: Callable[[], bool]) -> None:
        """Take messages until something holds."""
        deadline = time.monotonic() + WAIT_S
        while not until():
            assert time.monotonic() < deadline, "the core does not get there"
            if self._pull.poll(50):
                self._note(self._decoder.decode(self._pull.recv()))

    def _note(self, message: FromCore) -> None:
        if isinstance(message, Ready):
            self.ready = message
        elif isinstance(message, Outputs):
            self.stats = message.stats
            for delta in message.deltas:
                self.deltas.setdefault(delta.id, []).append(delta)

    def ended(self, request_id: str) -> bool:
        """Its last delta has come."""
        deltas = self.deltas[request_id]
        return bool(deltas) and deltas[-1].finish_reason is not None

    def finish(self, *request_ids: str) -> None:
        """Wait for the last delta of each."""
        self.wait(lambda: all(self.ended(one) for one in request_ids))

    def tokens(self, request_id: str) -> list[int]:
        """All tokens of a request, which is waited for."""
        self.finish(request_id)
        return [token for delta in self.deltas[request_id] for token in delta.tokens]

    def last(self, request_id: str) -> Delta:
        """The last delta of a request, which is waited for."""
        self.finish(request_id)
        return self.deltas[request_id][-1]

    def generate(self, prompt: list[int], count: int, **more: Any) -> list[int]:
        """Submit and wait."""
        return self.tokens(self.submit(prompt, count, **more))

    def settle(self) -> None:
        """Wait until nothing runs and no page is held: copies have ended too."""
        self.wait(
            lambda: (self.stats.running, self.stats.waiting, self.stats.pages_used) == (0, 0, 0)
        )
