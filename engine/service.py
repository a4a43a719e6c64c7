"""What the API process does with a request: prompt to tokens, core, and the answers to bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from kvist.engine.api_error import ApiError, bad
from kvist.engine.generation import Answer, StopStrings, running
from kvist.engine.ipc import CoreGone, CoreLink
from kvist.engine.openai import (
    COMPLETION_TOKENS_DEFAULT,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from kvist.engine.replies import ChatFormat, CompletionFormat, Head, ReplyFormat, Usage, join, usage
from kvist.engine.request import NewRequest, Ready
from kvist.engine.stats import EngineMetrics
from kvist.engine.tokenizer import Tokenizer
from kvist.engine.tracing import SCOPE, RequestTrace

# Longer texts are tokenized off the event loop: 16k characters take about 5 ms, and a step of
# other requests' tokens should not wait longer than that.
INLINE_CHARS = 16384
# The detokenizer's context: enough to see that an answer is not the beginning of a text.
CONTEXT_IDS = 4
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Clock:
    """Time and names, so that a test can decide them.

    Attributes:
        wall: seconds since 1970.
        token: a new random name.
    """

    wall: Callable[[], float]
    token: Callable[[], str]


class Service:
    """Everything a handler needs, for one model.

    Args:
        link: to the core.
        ready: the core's limits.
        tokenizer: the model's.
        names: by which clients may call the model, the shown one first.
        metrics: of this engine.
        clock: time and names.
    """

    def __init__(
        self,
        link: CoreLink,
        ready: Ready,
        tokenizer: Tokenizer,
        names: Sequence[str],
        metrics: EngineMetrics,
        clock: Clock,
    ) -> None:
        self._link = link
        self._ready = ready
        self._tokenizer = tokenizer
        self._names = names
        self._clock = clock
        self._started = int(clock.wall())
        self._draining = False
        self.metrics = metrics

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self._draining = True

    def check_taking(self) -> None:
        """Requests are taken.

        Raises:
            ApiError: 503 with the reason.
        """
        reason = self._link.failure or ("the server is shutting down" if self._draining else "")
        if reason:
            raise ApiError(503, reason, code="unavailable")

    def check_model(self, name: str | None) -> None:
        """A model of that name is served, or none was named.

        Raises:
            ApiError: 404.
        """
        if name is not None and name not in self._names:
            message = f"there is no model {name!r} here; this server has {self._names[0]!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def card(self) -> dict[str, Any]:
        """The model as /v1/models shows it."""
        return {
            "id": self._names[0],
            "object": "model",
            "created": self._started,
            "owned_by": "kvist",
            "root": self._names[-1],
            "parent": None,
            "max_model_len": self._ready.max_model_len,
        }

    async def chat(self, request: ChatRequest) -> Answering:
        """Prepare an answer to a chat.

        Raises:
            ApiError: 400, 404 or 503.
        """
        self.check_taking()
        self.check_model(request.model)
        text = self._chat_text(request)
        prompt = await self._encode(text, False)
        room = self._room(prompt, "messages")
        limit = _limit(request.token_limit, len(prompt), room, room)
        head = self._head("chatcmpl-")
        answers = self._answers(head.id, request, [prompt], [limit])
        form = ChatFormat(head, self._name, bool(request.logprobs))
        return Answering(self._link, answers, form, _Shape.of(request, [prompt]))

    async def complete(self, request: CompletionRequest) -> Answering:
        """Prepare answers to one or more prompts.

        Raises:
            ApiError: 400, 404 or 503.
        """
        self.check_taking()
        self.check_model(request.model)
        given = request.prompts()
        prompts = [
            await self._encode(prompt, request.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in given
        ]
        limits = []
        for prompt in prompts:
            self._check_ids(prompt, "prompt")
            room = self._room(prompt, "prompt")
            default = min(COMPLETION_TOKENS_DEFAULT, room)
            limits.append(_limit(request.token_limit, len(prompt), room, default))
        head = self._head("cmpl-")
        echo = [
            (item if isinstance(item, str) else self._text(item)) if request.echo else ""
            for item in given
            for _ in range(request.choices)
        ]
        answers = self._answers(head.id, request, prompts, limits)
        form = CompletionFormat(head, self._name, request.logprobs is not None, echo)
        return Answering(self._link, answers, form, _Shape.of(request, prompts))

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """Ids of a text, or of messages as chat sends them to the model.

        Raises:
            ApiError: 400 or 404.
        """
        self.check_model(request.model)
        if request.prompt is not None:
            tokens = await self._encode(request.prompt, request.add_special_tokens)
        else:
            chat = ChatRequest(messages=request.messages or [])
            text = self._chat_text(chat, request.add_generation_prompt)
            tokens = await self._encode(text, False)
        names = [self._name(token) for token in tokens] if request.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": self._ready.max_model_len,
            "tokens": tokens,
            "token_strs": names,
        }

    def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """Text of ids.

        Raises:
            ApiError: 400 or 404.
        """
        self.check_model(request.model)
        self._check_ids(request.tokens, "tokens")
        return {"prompt": self._text(request.tokens)}

    def _answers(
        self,
        reply_id: str,
        request: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        limits: Sequence[int],
    ) -> list[Answer]:
        answers = []
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            for choice in range(request.choices):
                index = number * request.choices + choice
                asked = NewRequest(
                    f"{reply_id}-{index}",
                    prompt,
                    request.sampling(limit, request.logprob_count, choice),
                    request.cache_salt or "",
                    request.cache,
                    request.priority_class,
                    request.hint,
                )
                decoder = self._tokenizer.detokenizer(prompt[-CONTEXT_IDS:])
                stops = StopStrings(request.stop_strings)
                timer = self.metrics.start_timer(len(prompt), limit, request.choices)
                answers.append(Answer(index, asked, decoder, stops, timer))
        return answers

    def _chat_text(self, request: ChatRequest, add_generation_prompt: bool = True) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                request.template_messages(), add_generation_prompt, request.template_tools
            )
        except ValueError as error:
            raise bad("messages", str(error)) from None

    async def _encode(self, text: str, special: bool) -> list[int]:
        if len(text) <= INLINE_CHARS:
            return self._tokenizer.encode(text, special)
        return await asyncio.to_thread(self._tokenizer.encode, text, special)

    def _name(self, token: int) -> str:
        return self._text([token])

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _check_ids(self, tokens: Sequence[int], param: str) -> None:
        if tokens and max(tokens) >= self._tokenizer.vocab_size:
            raise bad(param, f"an id is not below {self._tokenizer.vocab_size}")

    def _room(self, prompt: Sequence[int], param: str) -> int:
        """Tokens that can follow a prompt.

        Raises:
            ApiError: 400; the prompt is empty or fills the context.
        """
        if not prompt:
            raise bad(param, "the prompt has no tokens")
        room = self._ready.max_model_len - len(prompt)
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and the model's context "
                f"{self._ready.max_model_len}, with room for an answer; shorten the prompt",
                param,
                "context_length_exceeded",
            )
        return room

    def _head(self, prefix: str) -> Head:
        return Head(prefix + self._clock.token(), int(self._clock.wall()), self._names[0])


def _limit(wanted: int | None, prompt_tokens: int, room: int, default: int) -> int:
    if wanted is not None and wanted > room:
        raise ApiError(
            400,
            f"max_tokens is {wanted}, the prompt has {prompt_tokens} tokens and the context "
            f"{prompt_tokens + room}; ask for {room} at most",
            "max_tokens",
            "context_length_exceeded",
        )
    return default if wanted is None else wanted


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a reply is given, and what its usage needs to know.

    Attributes:
        stream: as server-sent events.
        include_usage: a stream ends with the usage.
        choices: answers per prompt.
        prompt_tokens: of all prompts, each counted once.
    """

    stream: bool
    include_usage: bool
    choices: int
    prompt_tokens: int

    @classmethod
    def of(
        cls, request: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> _Shape:
        total = sum(len(prompt) for prompt in prompts)
        return cls(bool(request.stream), request.include_usage, request.choices, total)


class Answering:
    """An ASGI reply that has the core generate, and stops it when the client goes away."""

    def __init__(
        self, link: CoreLink, answers: Sequence[Answer], form: ReplyFormat, shape: _Shape
    ) -> None:
        self._link = link
        self._answers = answers
        self._form = form
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, whole or as a stream.

        Raises:
            CoreGone: before anything was sent; a stream that has begun ends with an error event.
        """
        trace: RequestTrace | None = scope.get(SCOPE)
        if trace is not None:
            trace.submit(self._answers)
        work = self._send_stream(send) if self._shape.stream else self._send_whole(send)
        await while_connected(receive, work)

    def _usage(self) -> Usage:
        first_of_prompt = self._answers[:: self._shape.choices]
        return usage(
            self._shape.prompt_tokens,
            sum(answer.completion_tokens for answer in self._answers),
            [answer.cached for answer in first_of_prompt],
            [answer.cost for answer in first_of_prompt],
        )

    async def _send_whole(self, send: Send) -> None:
        with running(self._link, self._answers) as pieces:
            got = [piece async for piece in pieces]
        body = self._form.whole(join(got, len(self._answers)), self._usage())
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*_JSON, length]})
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        async def event(data: bytes, more: bool = True) -> None:
            body = b"data: " + data + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": more})

        begun = False
        try:
            with running(self._link, self._answers) as pieces:
                await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                begun = True
                for answer in self._answers:
                    opening = self._form.opening(answer.index)
                    if opening is not None:
                        await event(opening)
                async for piece in pieces:
                    if piece.text or piece.logged or piece.finish_reason:
                        await event(self._form.chunk(piece))
        except CoreGone as error:
            if not begun:
                raise
            await event(ApiError(500, str(error), code="engine_error").body())
        else:
            if self._shape.include_usage:
                await event(self._form.last(self._usage()))
        await event(b"[DONE]", more=False)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run work, but cancel it as soon as the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
