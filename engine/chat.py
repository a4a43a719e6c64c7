"""`kvist chat`: a conversation with a running server, in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from rich.console import Console

from kvist.proto.errors import KvistError

HELP = """/reset  forget the conversation     /quit  leave (Ctrl-D does too)
/help   this text                   Ctrl-C while an answer runs stops the answer"""
CONNECT_SECONDS = 5.0


class ChatError(KvistError):
    """The server did not answer or refused; the message is for the person at the keyboard."""


@dataclass(slots=True)
class Turn:
    """One answer and its measure.

    Attributes:
        text: what came, all of it or up to Ctrl-C.
        usage: as the server counted, empty if the answer was cut short.
        first_s: seconds to the first text; None when none came.
        total_s: seconds to the end.
        pieces: chunks with text.
    """

    text: str = ""
    usage: dict[str, Any] | None = None
    first_s: float | None = None
    total_s: float = 0.0
    pieces: int = 0

    def summary(self) -> str:
        """Prompt tokens, cached tokens by tier, time to first token, rate."""
        parts = []
        tokens = self.pieces
        if self.usage is not None:
            tokens = self.usage["completion_tokens"]
            details = self.usage.get("prompt_tokens_details") or {}
            tiers = details.get("cached_tokens_by_tier") or {}
            split = ", ".join(f"{tier} {count}" for tier, count in tiers.items() if count)
            cached = details.get("cached_tokens") or 0
            parts += [
                f"prompt {self.usage['prompt_tokens']} tokens",
                f"cached {cached}" + (f" ({split})" if split else ""),
            ]
        if self.first_s is not None:
            parts.append(f"TTFT {self.first_s * 1000:.0f} ms")
            decode_s = self.total_s - self.first_s
            if tokens > 1 and decode_s > 0:
                parts.append(f"{(tokens - 1) / decode_s:.1f} tok/s")
        return " · ".join(parts)


class ChatClient:
    """Speaks OpenAI's chat interface, streamed.

    Args:
        http: with the server's URL and key.
        now: seconds, monotonic.
    """

    def __init__(self, http: httpx.Client, now: Callable[[], float]) -> None:
        self._http = http
        self._now = now

    def model(self) -> str:
        """The first model that the server has.

        Raises:
            ChatError: no server answers there, or it refuses.
        """
        with self._errors():
            answer = self._http.get("/v1/models", timeout=CONNECT_SECONDS)
            if answer.status_code != httpx.codes.OK:
                raise ChatError(_error_text(answer.status_code, answer.content))
            return str(msgspec.json.decode(answer.content)["data"][0]["id"])

    def ask(self, body: Mapping[str, Any], turn: Turn, show: Callable[[str], None]) -> None:
        """Send a chat; fill turn as text comes, so that Ctrl-C leaves what there is.

        Raises:
            ChatError: as for model.
        """
        started = self._now()
        sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._errors(), self._http.stream("POST", "/v1/chat/completions", json=sent) as answer:
            if answer.status_code != httpx.codes.OK:
                raise ChatError(_error_text(answer.status_code, answer.read()))
            for event in _events(answer):
                turn.total_s = self._now() - started
                for choice in event["choices"]:
                    text = choice["delta"].get("content")
                    if text:
                        turn.first_s = turn.total_s if turn.first_s is None else turn.first_s
                        turn.pieces += 1
                        turn.text += text
                        show(text)
                turn.usage = event.get("usage") or turn.usage

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise ChatError(
                f"no server answers at {self._http.base_url}; start one with `kvist serve MODEL`, "
                "or name another with --url"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatError(f"the connection failed: {error or type(error).__name__}") from None
        except (msgspec.DecodeError, KeyError, IndexError, TypeError):
            raise ChatError(f"{self._http.base_url} does not speak OpenAI's interface") from None


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = msgspec.json.decode(line.removeprefix("data: "))
        if "error" in event:
            raise ChatError(event["error"]["message"])
        yield event


def _error_text(status: int, content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"the server answered {status}"


class Conversation:
    """Reads lines, keeps the messages, shows the answers.

    Args:
        client: to the server.
        console: answers go there.
        errors: complaints go there.
        read: the next line; raises EOFError at the end.
        system: system message, if any.
        settings: further fields of every request; those that are None are left out.
    """

    def __init__(
        self,
        client: ChatClient,
        console: Console,
        errors: Console,
        read: Callable[[], str],
        system: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        self._client = client
        self._console = console
        self._errors = errors
        self._read = read
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        self._settings = {key: value for key, value in settings.items() if value is not None}

    def run(self) -> int:
        """Talk until the input ends or says /quit.

        Returns:
            0, or 1 when no server answers or one failed the last message of a pipe.
        """
        try:
            model = self._client.model()
        except ChatError as error:
            self._complain(error)
            return 1
        self._console.print(f"{model}  (/help for help)", style="dim")
        code = 0
        while True:
            try:
                line = self._read().strip()
            except EOFError:
                if self._console.is_terminal:
                    self._console.print()  # the shell's prompt on a line of its own
                return code
            except KeyboardInterrupt:
                self._console.print("\nCtrl-D or /quit leaves", style="dim")
                continue
            if line == "/quit":
                return code
            if line:
                code = self._take(line, model)

    def _take(self, line: str, model: str) -> int:
        if line == "/help":
            self._console.print(HELP, style="dim")
        elif line == "/reset":
            self._messages = list(self._opening)
            self._console.print("conversation forgotten", style="dim")
        elif line.startswith("/"):
            self._console.print(f"no command {line}; /help lists them", style="dim")
        else:
            return self._ask(line, model)
        return 0

    def _ask(self, line: str, model: str) -> int:
        messages = [*self._messages, {"role": "user", "content": line}]
        turn = Turn()
        try:
            self._client.ask(
                {"model": model, "messages": messages, **self._settings}, turn, self._show
            )
        except ChatError as error:
            self._console.print()
            self._complain(error)
            return 1
        except KeyboardInterrupt:
            self._console.print(" [stopped]", style="dim", end="")
        self._console.print()
        self._console.print(turn.summary(), style="dim")
        self._messages = [*messages, {"role": "assistant", "content": turn.text}]
        return 0

    def _show(self, text: str) -> None:
        self._console.print(text, end="")

    def _complain(self, error: ChatError) -> None:
        self._errors.print(f"kvist chat: {error}", style="red")


def chat(url: str, api_key: str | None, system: str | None, settings: Mapping[str, Any]) -> int:
    """Run the chat on standard input and output; return the exit code."""
    # A model's text is text: no markup, no :emoji: names, no colours of our own.
    console, errors = (
        Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
        for stderr in (False, True)
    )
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() its line editing)

    def read() -> str:
        return input("> " if sys.stdin.isatty() else "")

    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    try:
        http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
    except httpx.InvalidURL as error:
        errors.print(f"kvist chat: --url: {error}", style="red")
        return 2
    with http:
        client = ChatClient(http, time.monotonic)
        return Conversation(client, console, errors, read, system, settings).run()
