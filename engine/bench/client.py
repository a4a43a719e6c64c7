"""One request over OpenAI's HTTP interface, and its measure; and what the server is asked before.

The time of a chunk is taken when its bytes arrive, before they are parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from kvist.engine.bench.wire import Answer, Wire, WireError
from kvist.engine.bench.workload import Item
from kvist.proto.errors import KvistError

CONNECT_SECONDS = 10.0
ASK_SECONDS = 60.0
CHAT = "openai-chat"
COMPLETIONS = "/v1/completions"
# vLLM's benchmark has a name of its own for completions; they are OpenAI's.
ENDPOINTS = {"openai": COMPLETIONS, "vllm": COMPLETIONS, CHAT: "/v1/chat/completions"}


class BenchError(KvistError):
    """Nothing can be measured; the message says why and what to do."""


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Text | None = None
    finish_reason: str | None = None

    @property
    def speaks(self) -> bool:
        """It brings text."""
        delta = self.delta
        return bool(
            self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning))
        )


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    cached_tokens_by_tier: dict[str, int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Outcome:
    """What became of a request. Times are seconds since the start of the run.

    Attributes:
        due_s: when it should have been sent.
        sent_s: when it was; None if it never was.
        chunk_s: when each chunk with text came.
        end_s: when the last chunk of the answer came, or the failure.
        prompt_tokens: as the server counts, as planned where it does not say.
        output_tokens: as the server counts; chunks where it does not say.
        counted: the server said how many tokens there were.
        cached: tier -> prompt tokens that were not computed; None where the server does not say.
            A server that gives no tiers has one, "any".
        error: what went wrong, or None.
        done: it ended, well or with an error; else it was broken off.
    """

    due_s: float
    prompt_tokens: int
    sent_s: float | None = None
    chunk_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    output_tokens: int = 0
    counted: bool = False
    cached: dict[str, int] | None = None
    error: str | None = None
    done: bool = False

    @property
    def good(self) -> bool:
        """It was answered to the end."""
        return self.done and self.error is None


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what is in all of them.

    Attributes:
        backend: one of ENDPOINTS.
        endpoint: path of the requests.
        fields: of every body.
    """

    backend: str
    endpoint: str
    fields: Mapping[str, Any]

    def body(self, item: Item) -> bytes:
        """A request's JSON."""
        asked: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        if self.backend == CHAT:
            asked["messages"] = [{"role": "user", "content": item.prompt}]
            asked["max_completion_tokens"] = item.output_tokens
        else:
            asked["prompt"] = item.prompt
            asked["max_tokens"] = item.output_tokens
        return msgspec.json.encode(asked | dict(self.fields))


class BenchClient:
    """Sends requests, streamed.

    Args:
        wire: to the server.
        target: what is asked of it.
        now: seconds since the start of the run.
    """

    def __init__(self, wire: Wire, target: Target, now: Callable[[], float]) -> None:
        self._wire = wire
        self._target = target
        self._now = now

    async def ask(self, item: Item, outcome: Outcome) -> None:
        """Send a request and fill in its outcome as the answer comes; errors go there, too."""
        body = self._target.body(item)
        outcome.sent_s = self._now()
        try:
            async with self._wire.post(self._target.endpoint, body) as answer:
                if answer.head.status != httpx.codes.OK:
                    outcome.error = error_text(answer.head.status, await answer.read())
                else:
                    await self._read(answer, outcome)
        except WireError as error:
            outcome.error = str(error)
        except msgspec.DecodeError as error:
            outcome.error = f"the answer is not OpenAI's: {error}"
        if outcome.error is not None or not outcome.end_s:
            outcome.error = outcome.error or "the stream ended before the answer did"
            outcome.end_s = self._now()
        outcome.done = True

    async def _read(self, answer: Answer, outcome: Outcome) -> None:
        rest = b""
        finished = False
        async for data in answer.parts():
            now = self._now()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:") and b"[DONE]" not in line[:13]:
                    finished |= self._take(_decode(line[5:]), outcome, now)
        if not finished:
            outcome.end_s = 0.0

    def _take(self, event: _Event, outcome: Outcome, now: float) -> bool:
        """Note an event; True if it ends the answer."""
        finished = False
        if event.error is not None:
            message = event.error.get("message") if isinstance(event.error, dict) else event.error
            outcome.error = str(message)
        for choice in event.choices:
            last = choice.finish_reason is not None
            # An answer without any text (end tokens only) still has a first token.
            if choice.speaks or (last and not outcome.chunk_s):
                outcome.chunk_s.append(now)
            finished |= last
            outcome.end_s = now
            if not outcome.counted:
                outcome.output_tokens = len(outcome.chunk_s)
        if event.usage is not None:
            _count(event.usage, outcome)
        return finished


def _count(usage: _Usage, outcome: Outcome) -> None:
    outcome.counted = True
    outcome.prompt_tokens = usage.prompt_tokens
    outcome.output_tokens = usage.completion_tokens
    details = usage.prompt_tokens_details
    if details is not None and details.cached_tokens is not None:
        tiers = details.cached_tokens_by_tier
        outcome.cached = {"any": details.cached_tokens} if tiers is None else dict(tiers)


def error_text(status: int, content: bytes) -> str:
    """What a refusal says, in words."""
    try:
        said = msgspec.json.decode(content)
        text = str(said["error"]["message"] if "error" in said else said["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        text = content[:200].decode(errors="replace")
    return f"{status}: {text}"


class Server:
    """The questions before the run.

    Args:
        http: with the server's URL and headers.

    Attributes:
        answers: somebody answered over HTTP, whatever it was.
    """

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.answers = False

    def model(self) -> str:
        """The first model that the server has.

        Raises:
            BenchError: no server answers there, or it refuses.
        """
        try:
            answer = self._http.get("/v1/models", timeout=CONNECT_SECONDS)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise BenchError(
                f"no server answers at {self._http.base_url}; start one with `kvist serve MODEL`, "
                "or name another with --base-url"
            ) from None
        except httpx.HTTPError as error:
            raise BenchError(f"{self._http.base_url}: {error or type(error).__name__}") from None
        self.answers = True
        if answer.status_code != httpx.codes.OK:
            raise BenchError(error_text(answer.status_code, answer.content))
        try:
            return str(answer.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise BenchError(
                f"{self._http.base_url}/v1/models does not list a model; name it with --model"
            ) from None

    def tokenize(self, model: str, text: str) -> list[int] | None:
        """Ids of a text, without special tokens; None where the server cannot say."""
        asked = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            answer = self._http.post("/tokenize", json=asked, timeout=ASK_SECONDS)
            ids = answer.json()["tokens"] if answer.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return ids if isinstance(ids, list) and all(type(each) is int for each in ids) else None
