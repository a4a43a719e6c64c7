"""One request's trace: the API process's part, and the part that the core notes.

    llm_request          the whole of an HTTP request, of the caller's trace if he names one
    ├ kvist.prepare      reading, parsing, template, tokens
    ├ kvist.generate     one per answer, from its submission to its last token
    │ ├ kvist.queue      until it is admitted; in it kvist.lookup, and kvist.rise from flash
    │ ├ kvist.load       whole blocks, before its first step (beside the steps it is in prefill)
    │ ├ kvist.prefill    until the first token
    │ ├ kvist.decode     until the last
    │ └ kvist.store      behind the steps; may end after everything else; in it the sidecar's calls
    └ kvist.reply        from the last token to the last byte

Siblings but kvist.store end where the next one begins, so that they add up to their parent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.cachesvc.tracer import Tracer
from kvist.engine.request import CachedTokens
from kvist.proto.trace import HEADER, Attribute, SpanNote, TraceContext, parse_traceparent

if TYPE_CHECKING:
    from kvist.engine.generation import Answer

SCOPE = "kvist.trace"
"""Where the trace of a request is in its ASGI scope; absent when there is none."""

LATENCIES = {
    "kvist.queue": "gen_ai.latency.time_in_queue",
    "kvist.prefill": "gen_ai.latency.time_in_model_prefill",
    "kvist.decode": "gen_ai.latency.time_in_model_decode",
}
"""Parts of the first answer whose seconds the whole has as attributes, under vLLM's names."""

TRACED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class RequestTrace:
    """The trace of one HTTP request, in the API process.

    Args:
        at: place of its span. parent: span id of the caller's, "" when there is none.
        now: seconds of CLOCK_MONOTONIC.
        live: where it enters itself under the spans of its answers, for who hears of them.
    """

    def __init__(
        self,
        at: TraceContext,
        parent: str,
        now: Callable[[], float],
        live: dict[str, RequestTrace],
    ) -> None:
        self._at = at
        self._parent = parent
        self._now = now
        self._live = live
        self._began_s = now()
        self._submitted_s = 0.0
        self._answers: Sequence[Answer] = ()
        self._places: list[TraceContext] = []
        self._last_s: dict[str, float] = {}
        self._latencies: dict[str, Attribute] = {}

    def submit(self, answers: Sequence[Answer]) -> None:
        """Its answers go to the core now; each is told where it belongs."""
        self._submitted_s = self._now()
        self._answers = answers
        self._places = [self._at.child() for _ in answers]
        for answer, place in zip(answers, self._places, strict=True):
            self._live[place.span] = self
            answer.request = msgspec.structs.replace(
                answer.request, trace=place, submitted_s=self._submitted_s
            )

    def heard(self, note: SpanNote) -> None:
        """The core has ended a part of an answer."""
        self._last_s[note.parent] = max(note.end_s, self._last_s.get(note.parent, 0.0))
        if note.parent == self._places[0].span and note.name in LATENCIES:
            self._latencies[LATENCIES[note.name]] = note.end_s - note.start_s
            if note.name == "kvist.prefill":
                self._latencies["gen_ai.latency.time_to_first_token"] = note.end_s - self._began_s

    def end(self, status: int) -> list[SpanNote]:
        """The spans of this process, now that the request has been answered.

        Args:
            status: of HTTP; 0 when there was no answer.
        """
        end_s = self._now()
        last_s = ready_s = self._submitted_s or end_s
        notes = [self._note("kvist.prepare", self._began_s, ready_s)]
        for answer, place in zip(self._answers, self._places, strict=True):
            del self._live[place.span]
            answer_s = min(self._last_s.get(place.span, end_s), end_s)
            last_s = max(last_s, answer_s)
            notes.append(
                SpanNote("kvist.generate", place, self._at.span, ready_s, answer_s, _asked(answer))
            )
        if self._answers:
            notes.append(self._note("kvist.reply", last_s, end_s))
        error = "no answer" if not status else f"HTTP {status}" if status >= 500 else ""
        about: dict[str, Attribute] = {
            **self._usage(),
            **self._latencies,
            "gen_ai.latency.e2e": end_s - self._began_s,
            "http.response.status_code": status,
        }
        root = self._at, self._parent, self._began_s, end_s
        notes.append(SpanNote("llm_request", *root, about, is_server=True, error=error))
        return notes

    def _note(self, name: str, start_s: float, end_s: float) -> SpanNote:
        return SpanNote(name, self._at.child(), self._at.span, start_s, end_s)

    def _usage(self) -> dict[str, Attribute]:
        """In vLLM's names where it has one."""
        if not self._answers:
            return {}
        first, params = self._answers[0], self._answers[0].request.params
        return {
            "gen_ai.request.id": first.request.id.rpartition("-")[0],
            "gen_ai.request.n": len(self._answers),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": sum(len(a.request.prompt) for a in self._answers),
            "gen_ai.usage.completion_tokens": sum(a.completion_tokens for a in self._answers),
            **_cached([answer.cached for answer in self._answers]),
        }


def _cached(each: Sequence[CachedTokens]) -> dict[str, Attribute]:
    return {
        "kvist.cached_tokens.hbm": sum(cached.hbm for cached in each),
        "kvist.cached_tokens.dram": sum(cached.dram for cached in each),
        "kvist.cached_tokens.flash": sum(cached.flash for cached in each),
    }


def _asked(answer: Answer) -> dict[str, Attribute]:
    return {
        "gen_ai.request.id": answer.request.id,
        "gen_ai.usage.prompt_tokens": len(answer.request.prompt),
        "gen_ai.usage.completion_tokens": answer.completion_tokens,
        **_cached([answer.cached]),
    }


class TraceRequests:
    """ASGI middleware: begins a trace for each request that generates, and ends it.

    Args:
        app: what it is around. tracer: where spans go. now: seconds of CLOCK_MONOTONIC.
    """

    def __init__(
        self, app: ASGIApp, tracer: Tracer, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._tracer = tracer
        self._now = now
        self._live: dict[str, RequestTrace] = {}

    def observe(self, notes: Sequence[SpanNote]) -> None:
        """Take the core's notes."""
        for note in notes:
            self._tracer.emit(note)
            live = self._live.get(note.parent)
            if live is not None and note.name != "kvist.store":
                live.heard(note)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and trace it where that is wanted."""
        trace = self._begin(scope) if scope["type"] == "http" else None
        if trace is None:
            await self._app(scope, receive, send)
            return
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope[SCOPE] = trace
        try:
            await self._app(scope, receive, noting)
        finally:
            for note in trace.end(status):
                self._tracer.emit(note)

    def _begin(self, scope: Scope) -> RequestTrace | None:
        if scope["path"] not in TRACED_PATHS:
            return None
        header = dict(scope["headers"]).get(HEADER.encode(), b"")
        parent = parse_traceparent(header.decode("latin-1"))
        at = self._tracer.begin("llm_request", parent)
        if at is None:
            return None
        return RequestTrace(at, parent.span if parent else "", self._now, self._live)
