"""One answer as it grows: tokens come in, text goes out, stop strings never do."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from kvist.engine.ipc import CoreGone, CoreLink, TokenStream
from kvist.engine.request import CachedTokens, Delta, LoadCost, NewRequest, TokenLogprobs
from kvist.engine.stats import RequestTimer


class TextDecoder(Protocol):
    """Turns tokens into text piece by piece; holds back bytes that are not yet a character."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that the tokens complete; may be empty."""
        ...

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        ...


class StopStrings:
    """Finds the first stop string in text that comes in pieces, however it is cut.

    Text that could be the beginning of a stop string is held back until it is one or is not, so
    no part of a stop string is ever given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take a piece, give out what cannot belong to a stop string any more."""
        if self.found:
            return ""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops]
        ends = [(place + len(stop), place) for place, stop in found if place >= 0]
        if ends:
            # The one that is complete first, so that the answer does not depend on the cuts.
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Give out what was held back: nothing follows, so it is no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop, and not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass(frozen=True, slots=True)
class LoggedToken:
    """A token of the answer with its log-probabilities.

    Attributes:
        token: its id.
        offset: characters of the answer before it.
        logprobs: its own and the alternatives'.
    """

    token: int
    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """What can be given out after a delta.

    Attributes:
        index: which choice it belongs to.
        text: new text; may be empty.
        logged: the tokens whose text begins in what has been given out.
        finish_reason: "stop" or "length" in the last piece.
    """

    index: int
    text: str
    logged: list[LoggedToken]
    finish_reason: str | None


@dataclass(slots=True)
class Answer:
    """One choice of one HTTP request.

    Attributes:
        index: number of the choice.
        request: what the core was asked.
        decoder: its own, since it holds state.
        stops: stop strings, looked for in the text.
        timer: takes the times of its deltas.
        completion_tokens: tokens generated so far, an end token included.
        cached: prompt tokens that were not computed.
        cost: of their load, None when nothing was loaded.
        ended: no more pieces come.
    """

    index: int
    request: NewRequest
    decoder: TextDecoder
    stops: StopStrings
    timer: RequestTimer
    completion_tokens: int = 0
    cached: CachedTokens = field(default_factory=CachedTokens)
    cost: LoadCost | None = None
    ended: bool = False
    _given: int = field(default=0, init=False)
    _decoded: int = field(default=0, init=False)
    _waiting: deque[LoggedToken] = field(default_factory=deque, init=False)

    def push(self, delta: Delta) -> Piece:
        """Take the core's delta.

        Raises:
            CoreGone: the core gave the request up; the message says why.
        """
        self.timer.observe(delta)
        if delta.cached is not None:
            self.cached, self.cost = delta.cached, delta.cost
        if delta.finish_reason not in (None, "stop", "length"):
            self.timer.finish(delta.finish_reason or "error")
            raise CoreGone(
                delta.error or f"the engine core ended the request: {delta.finish_reason}"
            )
        text = "".join(self._texts(delta))
        reason = delta.finish_reason
        if self.stops.found:
            reason = "stop"
        elif reason is not None:
            rest = self.decoder.flush()
            self._decoded += len(rest)
            text += self.stops.push(rest) + self.stops.flush()
            reason = "stop" if self.stops.found else reason
        self._given += len(text)
        if reason is not None:
            self.ended = True
            self.timer.finish(reason)
        return Piece(self.index, text, list(self._ready()), reason)

    def _texts(self, delta: Delta) -> Iterator[str]:
        """Text given out, token by token; stops at a stop string."""
        last = len(delta.tokens) - 1
        for i, token in enumerate(delta.tokens):
            self.completion_tokens += 1
            if i == last and delta.finish_reason == "stop":
                return  # the core says "stop" for an end token only, and that has no text
            if delta.logprobs:
                self._waiting.append(LoggedToken(token, self._decoded, delta.logprobs[i]))
            text = self.decoder.push([token])
            self._decoded += len(text)
            yield self.stops.push(text)
            if self.stops.found:
                return

    def _ready(self) -> Iterator[LoggedToken]:
        """Tokens whose text begins in what was given out; at a natural end, all of them.

        A token of a held-back text waits with it, or its name would give the stop string away.
        """
        natural = self.ended and not self.stops.found
        while self._waiting and (natural or self._waiting[0].offset < self._given):
            yield self._waiting.popleft()


@contextmanager
def running(link: CoreLink, answers: Sequence[Answer]) -> Iterator[AsyncIterator[Piece]]:
    """Have the core work on answers; what has not ended when the block is left is aborted.

    Raises:
        CoreGone: the core takes no requests, or died before all answers had ended.
    """
    try:
        with link.submit([answer.request for answer in answers]) as stream:
            yield _pieces({answer.request.id: answer for answer in answers}, stream)
    except CoreGone:
        _finish(answers, "error")
        raise
    finally:
        _finish(answers, "abort")


async def _pieces(answers: Mapping[str, Answer], stream: TokenStream) -> AsyncIterator[Piece]:
    async for delta in stream:
        answer = answers[delta.id]
        piece = answer.push(delta)
        if answer.ended:
            stream.abort(delta.id)  # a stop string: the core does not know of it
        yield piece


def _finish(answers: Sequence[Answer], reason: str) -> None:
    for answer in answers:
        answer.timer.finish(reason)
