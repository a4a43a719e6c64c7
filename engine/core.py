"""The engine core: takes requests, schedules, computes and sends tokens, in one loop."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from kvist.cachesvc.log import Log
from kvist.engine.config import EngineConfig
from kvist.engine.ipc import ApiLink
from kvist.engine.logs import open_log, tell_request
from kvist.engine.opening import Parts, open_parts
from kvist.engine.priority import priority_of
from kvist.engine.request import (
    CACHE_BYPASS,
    Abort,
    CoreStats,
    Delta,
    FromCore,
    Loading,
    NewRequest,
    Outputs,
    ToCore,
)
from kvist.engine.runner import Sampled
from kvist.engine.scheduler import Scheduler
from kvist.engine.seeds import ContentSeeds
from kvist.engine.sequence import Sequence
from kvist.engine.step import Bounds, Step, Work
from kvist.engine.waiting import by_class
from kvist.proto.errors import KvistError

# While copies are under way their results wake the loop at once, messages within this time.
COPYING_WAIT_S = 0.002
# An idle loop looks this often whether the cache came or went.
IDLE_WAIT_S = 1.0
# One failed step may be the fault of its requests; this many in a row are the core's.
FAILED_STEPS_MAX = 3
# Messages about one load: a bar in a terminal is hardly wider.
LOADING_MESSAGES = 50


class CoreFailed(KvistError):
    """Step after step fails; the message is the last one's."""


class Link(Protocol):
    """The part of ApiLink that is used here."""

    def receive(self, timeout_s: float | None = 0.0) -> list[ToCore]:
        """Take every message that has come; wait timeout_s for the first."""
        ...

    def send(self, message: FromCore) -> None:
        """Queue a message; does not wait."""
        ...


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched, and what will come of it."""

    step: Step
    launched_s: float
    sampled: Future[list[Sampled]]


class Core:
    """One model, one pool, one loop, one thread.

    Args:
        link: to the API process.
        parts: what it works with; closed by whoever opened them.
        config: budget and seats of a step, and whether prefixes are reused.
        log: where faults are told.
        now: clock of waiting times, seconds.
    """

    def __init__(
        self, link: Link, parts: Parts, config: EngineConfig, log: Log, now: Callable[[], float]
    ) -> None:
        self._link = link
        self._parts = parts
        self._connector = parts.connector
        self._reuse = config.enable_prefix_caching
        self._log = log
        self._now = now
        bounds = Bounds(
            tokens=config.max_num_batched_tokens,
            seats=config.max_num_seqs,
            block_tokens=parts.limits.block_tokens,
            aging_s=config.priority_aging_seconds,
        )
        self._scheduler = Scheduler(parts.pages, parts.connector, bounds)
        self._priority = priority_of(config.default_priority)
        self._seeds = ContentSeeds(config.seed) if config.deterministic else None
        self._overlap = config.overlaps("cpu")
        self._flight: Flight | None = None
        self._live: dict[str, Sequence] = {}
        self._deltas: list[Delta] = []
        self._busy = False
        self._arrivals = 0
        self._steps = 0
        self._step_tokens = 0
        self._computed_tokens = 0
        self._generated_tokens = 0
        self._wasted_tokens = 0
        self._landed_s = 0.0
        self._failed_steps = 0
        self._sent = CoreStats()

    def run(self, stopping: threading.Event) -> None:
        """Say Ready, then serve until told to stop (within IDLE_WAIT_S when idle).

        Raises:
            CoreFailed: FAILED_STEPS_MAX steps in a row failed.
        """
        self._link.send(self._parts.ready())
        self.begin()
        try:
            while not stopping.is_set():
                self.turn()
        finally:
            self._parts.runner.close()

    def begin(self) -> None:
        """Before the first turn; when steps overlap the runner gets a thread, so close it."""
        if self._overlap:
            self._parts.runner.run_aside()

    def turn(self) -> None:
        """Take what messages there are, then a step; wait for one if there is nothing to do."""
        for message in self._receive():
            self._take(message)
        self.step()

    def step(self) -> None:
        """Take what was loaded, begin a step if there is work, send what came of the last one.

        The last one is the step that has just begun, or, when steps overlap, the one before it:
        this one then runs while the results of that one are processed and the next is planned.

        Raises:
            CoreFailed: see run.
        """
        self._take_loads()
        self._connector.beside(len(self._scheduler.running))
        step = self._scheduler.schedule(self._now())
        for sequence in step.loads:
            self._connector.load(sequence)
        before, self._flight = self._flight, self._launch(step)
        if before is not None:
            self._land(before)
        if self._flight is not None and (not self._overlap or step.tight):
            self._land(self._flight)
            self._flight = None
        self._busy = bool(step.work or before)
        self._send()

    def _receive(self) -> list[ToCore]:
        """Take messages; wait for one, or for a copy to end, if there is nothing to compute."""
        if self._busy:
            return self._link.receive(0.0)
        if self._connector.copying or self._connector.deferred:
            self._connector.wait(COPYING_WAIT_S)
            return self._link.receive(0.0)
        assert not self._live, "nothing is under way and yet requests wait"
        return self._link.receive(IDLE_WAIT_S)

    def _take(self, message: ToCore) -> None:
        if isinstance(message, Abort):
            sequence = self._live.get(message.id)
            if sequence is not None:
                self._end(sequence, Delta(message.id, [], finish_reason="abort"))
        elif message.id in self._live:
            self._log.warning("request refused", request=message.id, reason="its id is in use")
        elif error := self._refusal(message):
            self._deltas.append(Delta(message.id, [], finish_reason="error", error=error))
        else:
            self._add(message)

    def _refusal(self, request: NewRequest) -> str:
        """Why a request cannot be computed, or ""."""
        room = self._parts.limits.max_model_len
        if not request.prompt:
            return "the prompt has no tokens"
        if len(request.prompt) >= room:
            return (
                f"the prompt has {len(request.prompt)} tokens; with one token of output "
                f"{room} is the limit (max_model_len)"
            )
        vocab = self._parts.runner.vocab
        if max(request.prompt) >= vocab or min(request.prompt) < 0:
            return f"a token id of the prompt is not in [0, {vocab})"
        return ""

    def _add(self, request: NewRequest) -> None:
        reuse = self._reuse and request.cache != CACHE_BYPASS
        digest = self._parts.digests.of(request.cache_salt) if reuse else None
        self._arrivals += 1
        priority = self._priority if request.priority is None else request.priority
        limits, now = self._parts.limits, self._now()
        sequence = Sequence(request, self._arrivals, limits, digest, now, priority)
        params = request.params if self._seeds is None else self._seeds.seeded(request)
        sequence.draws = self._parts.runner.begin(params)
        self._live[request.id] = sequence
        self._connector.arrive(sequence)
        self._scheduler.add(sequence)

    def _launch(self, step: Step) -> Flight | None:
        if not step.work:
            return None
        started = self._now()
        for work in step.work:
            if work.sequence.scheduled_s is None:
                work.sequence.scheduled_s = started
        return Flight(step, started, self._parts.runner.launch(step.work))

    def _land(self, flight: Flight) -> None:
        """Wait for a step and process what came of it."""
        step = flight.step
        try:
            sampled = flight.sampled.result()
        except Exception as error:
            self._fail([work for work in step.work if not work.void], error)
        else:
            began_s, self._landed_s = max(flight.launched_s, self._landed_s), self._now()
            self._failed_steps = 0
            self._connector.computed(step.work, self._landed_s - began_s)
            self._steps += 1
            self._step_tokens = step.tokens
            self._log.detail(
                3,
                "step",
                tokens=step.tokens,
                requests=len(step.work),
                seconds=self._landed_s - began_s,
            )
            if any(work.sequence.gate is not None for work in step.work):
                self._take_loads()
            self._settle(step, sampled)
        self._scheduler.land(step)

    def _settle(self, step: Step, sampled: list[Sampled]) -> None:
        for work in step.work:
            if work.void:
                self._wasted_tokens += work.count
                continue
            self._computed_tokens += _prompt_part(work)
            blocks = self._scheduler.advance(work)
            self._connector.store(work.sequence, blocks)
        for one in sampled:
            if not one.work.void:
                self._deliver(one)

    def _take_loads(self) -> None:
        for loaded in self._connector.poll():
            self._scheduler.loaded(loaded.sequence, loaded.blocks)

    def _deliver(self, sampled: Sampled) -> None:
        sequence = sampled.work.sequence
        sequence.append(sampled.token)
        self._generated_tokens += 1
        logprobs = [sampled.logprobs] if sampled.logprobs is not None else []
        delta = Delta(sequence.id, [sampled.token], logprobs, sequence.finish_reason)
        if sequence.first_token_s is None:
            sequence.first_token_s = self._now()
            self._connector.began(sequence, sequence.first_token_s)
            assert sequence.scheduled_s is not None
            delta = Delta(
                sequence.id,
                [sampled.token],
                logprobs,
                sequence.finish_reason,
                cached=sequence.cached,
                cost=sequence.cost,
                queue_s=sequence.scheduled_s - sequence.arrived_s,
                prefill_s=sequence.first_token_s - sequence.scheduled_s,
            )
        if sequence.finish_reason is None:
            self._deltas.append(delta)
        else:
            self._end(sequence, delta)

    def _fail(self, works: list[Work], error: Exception) -> None:
        """End the requests of a step that failed; the others go on."""
        if not works:
            return  # whom it was for has ended already
        self._failed_steps += 1
        text = f"the step failed: {type(error).__name__}: {error}"
        self._log.error("step failed", requests=len(works), error=text)
        if self._failed_steps >= FAILED_STEPS_MAX:
            raise CoreFailed(f"{self._failed_steps} steps in a row failed: {text}") from error
        for work in works:
            last = Delta(work.sequence.id, [], finish_reason="error", error=text)
            self._end(work.sequence, last)

    def _end(self, sequence: Sequence, last: Delta) -> None:
        del self._live[sequence.id]
        tell_request(self._log, sequence, last, self._now())
        if sequence.trace is not None:
            self._connector.notes += sequence.trace.end(sequence, self._now())
        self._scheduler.finish(sequence)
        self._deltas.append(last)

    def _send(self) -> None:
        stats = self._stats()
        if self._deltas or stats != self._sent or self._connector.notes:
            self._link.send(Outputs(self._deltas, stats, self._connector.notes))
            self._deltas, self._sent, self._connector.notes = [], stats, []

    def _stats(self) -> CoreStats:
        scheduler, connector, pages = self._scheduler, self._connector, self._parts.pages
        return CoreStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.loading),
            pages_total=pages.total,
            pages_used=pages.used,
            queries_tokens=connector.tally.queries_tokens,
            hits_tokens=dict(connector.tally.hits_tokens),
            misses_tokens=dict(connector.tally.misses_tokens),
            computed_tokens=self._computed_tokens,
            generated_tokens=self._generated_tokens,
            waiting_deferred=len(scheduler.deferred) + len(scheduler.loading),
            waiting_by_class=scheduler.waiting.by_class,
            loading_by_class=by_class(scheduler.loading),
            running_by_class=by_class(scheduler.running),
            preemptions=dict(scheduler.preemptions),
            resumed_tokens=dict(scheduler.resumed),
            wasted_tokens=self._wasted_tokens,
            steps=self._steps,
            step_tokens=self._step_tokens,
            stored_blocks=connector.stored_blocks,
            store_drops=dict(connector.store_drops),
            cache_state=connector.state,
            reattaches=connector.reattaches,
            load_seconds=connector.load_seconds,
            loads=connector.load_stats(),
        )


def _prompt_part(work: Work) -> int:
    """Tokens of the work that belong to the prompt."""
    prompt = work.sequence.prompt_tokens
    return min(work.start + work.count, prompt) - min(work.start, prompt)


def loading_sender(send: Callable[[FromCore], None]) -> Callable[[int, int], None]:
    """A load_model progress that sends Loading, LOADING_MESSAGES times a load at most."""

    def tell(done: int, total: int) -> None:
        if done * LOADING_MESSAGES // total > (done - 1) * LOADING_MESSAGES // total:
            send(Loading(done, total))

    return tell


def run_core(config: EngineConfig, endpoint: str) -> None:
    """The core of `kvist serve`: load, say Ready, serve until SystemExit.

    Args:
        config: checked settings.
        endpoint: see ipc.

    Raises:
        ConfigInvalid: a setting does not fit the model or the machine.
        ModelFilesError: the model cannot be loaded.
        CoreFailed: step after step fails.
    """
    torch.set_num_threads(config.threads)
    log = open_log(config)
    link = ApiLink(endpoint)
    try:
        parts = open_parts(config, log, time.monotonic, loading_sender(link.send))
        try:
            # The model and its modules live as long as the process: a collection need not walk
            # them, which takes 20 to 40 ms each time.
            gc.collect()
            gc.freeze()
            with torch.inference_mode():
                Core(link, parts, config, log, time.monotonic).run(threading.Event())
        finally:
            parts.close()
    finally:
        link.close()
