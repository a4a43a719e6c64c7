"""The engine core in this process, without HTTP and without a wire, for benchmarks."""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from kvist.engine.config import EngineConfig
from kvist.engine.process import core_environment
from kvist.engine.request import (
    CACHE_ON,
    Abort,
    CachedTokens,
    Delta,
    FromCore,
    Loading,
    NewRequest,
    Outputs,
    Ready,
    SamplingParams,
    ToCore,
)
from kvist.proto.errors import KvistError

STOP_SECONDS = 10.0


class DirectLink:
    """What a core sees of the world when its requests come from another thread; see core.Link."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[ToCore] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[tuple[float, FromCore | BaseException]] = queue.SimpleQueue()

    def put(self, message: ToCore) -> None:
        """Queue a message for the core."""
        self._inbox.put(message)

    def receive(self, timeout_s: float | None = 0.0) -> list[ToCore]:
        """Take every message that has come; wait timeout_s for the first."""
        messages: list[ToCore] = []
        try:
            messages.append(self._inbox.get(timeout_s != 0, timeout_s))
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return messages

    def send(self, message: FromCore) -> None:
        """Hand a message on, with the time."""
        if not isinstance(message, Outputs) or message.deltas:
            self.outbox.put((time.perf_counter(), message))


@dataclass(slots=True)
class Generated:
    """One answer.

    Attributes:
        tokens: its ids.
        cached: prompt tokens that were not computed.
        first_s: from the moment the batch was handed in to its first token.
        total_s: to its last.
    """

    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    first_s: float = 0.0
    total_s: float = 0.0


class DirectEngine:
    """A core on a thread of this process; a context manager.

    The core's loop has a thread to itself, and whoever waits for answers sleeps, so the steps
    run as they do in `kvist serve`, but for its wire.

    Args:
        config: of the engine; its HTTP settings are not used.
        progress: told how far the model is loaded: (done, total).
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._config = config
        self._progress = progress or (lambda _done, _total: None)
        self._link = DirectLink()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvist-core", daemon=True)
        self._asked = 0
        self.ready: Ready | None = None

    def __enter__(self) -> Self:
        """Load the model.

        Raises:
            ConfigInvalid: a setting does not fit the model or the machine.
            KvistError: the core failed.
        """
        # OpenMP reads these once, when torch is first imported.
        if "torch" not in sys.modules:
            os.environ.update(core_environment(self._config, os.environ))
        self._thread.start()
        while self.ready is None:
            _, message = self._receive()
            if isinstance(message, Ready):
                self.ready = message
            elif isinstance(message, Loading):
                self._progress(message.done, message.total)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._link.put(Abort("wake up"))
        self._thread.join(STOP_SECONDS)

    def generate(
        self,
        prompts: Sequence[list[int]],
        output_tokens: Sequence[int],
        on_end: Callable[[], None] | None = None,
        cache: str = CACHE_ON,
    ) -> list[Generated]:
        """Answer prompts, all handed in at once, greedily and past end tokens.

        Args:
            prompts: token ids.
            output_tokens: of each answer.
            on_end: called for every answer that is complete.
            cache: CACHE_ON or CACHE_BYPASS.

        Raises:
            KvistError: the core refused a prompt or failed.
        """
        answers: dict[str, Generated] = {}
        requests = []
        for prompt, count in zip(prompts, output_tokens, strict=True):
            self._asked += 1
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            requests.append(NewRequest(str(self._asked), prompt, params, cache=cache))
            answers[str(self._asked)] = Generated()
        started = time.perf_counter()
        for request in requests:
            self._link.put(request)
        live = set(answers)
        while live:
            when, message = self._receive()
            if not isinstance(message, Outputs):
                continue
            for delta in message.deltas:
                if delta.id in live:
                    _note(answers[delta.id], delta, when - started)
                    if delta.finish_reason is not None:
                        live.discard(delta.id)
                        if on_end is not None:
                            on_end()
        return list(answers.values())

    def _receive(self) -> tuple[float, FromCore]:
        when, message = self._link.outbox.get()
        if isinstance(message, BaseException):
            raise message
        return when, message

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._link.outbox.put((time.perf_counter(), error))

    def _serve(self) -> None:
        """What run_core does, with the link of this process."""
        import torch

        from kvist.cachesvc.log import Log
        from kvist.engine.core import Core, loading_sender
        from kvist.engine.opening import open_parts

        torch.set_num_threads(self._config.threads)
        log = Log(sys.stderr, "warning")
        config = self._config
        parts = open_parts(config, log, time.monotonic, loading_sender(self._link.send))
        try:
            gc.collect()
            gc.freeze()
            with torch.inference_mode():
                Core(self._link, parts, config, log, time.monotonic).run(self._stopping)
        finally:
            parts.close()


def _note(answer: Generated, delta: Delta, at_s: float) -> None:
    if delta.finish_reason == "error":
        raise KvistError(f"the engine refused a request: {delta.error}")
    if delta.tokens and not answer.tokens:
        answer.first_s = at_s
        answer.cached = (delta.cached or CachedTokens()).total
    answer.tokens += delta.tokens
    answer.total_s = at_s
