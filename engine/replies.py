"""OpenAI's replies as this engine gives them, whole and in chunks, for chat and for completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from kvist.engine.generation import LoggedToken, Piece
from kvist.engine.request import CachedTokens, LoadCost


class TierTokens(msgspec.Struct, frozen=True):
    """Cached prompt tokens by the tier that had them."""

    hbm: int
    dram: int
    flash: int


class PromptTokensDetails(msgspec.Struct, frozen=True, omit_defaults=True):
    """Prompt tokens that were not computed; the tiers are ours, the sum is OpenAI's.

    Attributes:
        cache_loads: what loading them was estimated to cost and did, one per prompt that loaded.
    """

    cached_tokens: int
    cached_tokens_by_tier: TierTokens
    cache_loads: list[LoadCost] = []


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one HTTP request; a prompt counts once, however many answers it got."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage(
    prompt_tokens: int,
    completion_tokens: int,
    cached: Sequence[CachedTokens],
    costs: Sequence[LoadCost | None] = (),
) -> Usage:
    """Sum up a request; cached and costs hold one entry per prompt."""
    tiers = TierTokens(
        sum(entry.hbm for entry in cached),
        sum(entry.dram for entry in cached),
        sum(entry.flash for entry in cached),
    )
    loads = [cost for cost in costs if cost is not None]
    details = PromptTokensDetails(tiers.hbm + tiers.dram + tiers.flash, tiers, loads)
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)


class Head(msgspec.Struct, frozen=True):
    """What every object of one reply begins with.

    Attributes:
        id: of the reply.
        created: seconds since 1970.
        model: the name that is shown.
    """

    id: str
    created: int
    model: str


class _Object(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None


class ReplyFormat(Protocol):
    """How one endpoint writes answers."""

    def opening(self, index: int) -> bytes | None:
        """First chunk of a choice, before any token; None when there is nothing to say."""
        ...

    def chunk(self, piece: Piece) -> bytes:
        """A chunk with new text."""
        ...

    def last(self, total: Usage) -> bytes:
        """The chunk without choices that carries the usage."""
        ...

    def whole(self, pieces: Sequence[Piece], total: Usage) -> bytes:
        """The reply to a request without streaming, one piece per choice."""
        ...


class ChatFormat:
    """Objects `chat.completion` and `chat.completion.chunk`.

    Args:
        head: of this reply.
        name: text of a token.
        logprobs: write them, even where a chunk has none.
    """

    def __init__(self, head: Head, name: Callable[[int], str], logprobs: bool) -> None:
        self._head = head
        self._name = name
        self._logprobs = logprobs

    def opening(self, index: int) -> bytes:
        """The role, as OpenAI sends it first."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "finish_reason": None}])

    def chunk(self, piece: Piece) -> bytes:
        """New text of one choice."""
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk([self._choice(piece, {"delta": delta})])

    def last(self, total: Usage) -> bytes:
        """Usage only."""
        return self._chunk([], total)

    def whole(self, pieces: Sequence[Piece], total: Usage) -> bytes:
        """All choices with their messages."""
        choices = [
            self._choice(
                piece, {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            )
            for piece in pieces
        ]
        return _encode(self._head, "chat.completion", choices, total)

    def _chunk(self, choices: list[dict[str, Any]], total: Usage | None = None) -> bytes:
        return _encode(self._head, "chat.completion.chunk", choices, total)

    def _choice(self, piece: Piece, content: Mapping[str, Any]) -> dict[str, Any]:
        logged = {"content": [self._logged(token) for token in piece.logged]}
        return {
            "index": piece.index,
            **content,
            "logprobs": logged if self._logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logged(self, token: LoggedToken) -> dict[str, Any]:
        return {
            **self._named(token.token, token.logprobs.chosen),
            "top_logprobs": [self._named(other, value) for other, value in token.logprobs.top],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._name(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionFormat:
    """Object `text_completion`, whole and as chunks.

    Args:
        head: of this reply.
        name: text of a token.
        logprobs: write them.
        echo: prompt of each choice if it is to be repeated before the answer, else "".
    """

    def __init__(
        self, head: Head, name: Callable[[int], str], logprobs: bool, echo: Sequence[str]
    ) -> None:
        self._head = head
        self._name = name
        self._logprobs = logprobs
        self._echo = echo

    def opening(self, index: int) -> bytes | None:
        """The prompt, where it is to be repeated."""
        if not self._echo[index]:
            return None
        return self.chunk(Piece(index, self._echo[index], [], None))

    def chunk(self, piece: Piece) -> bytes:
        """New text of one choice."""
        return _encode(self._head, "text_completion", [self._choice(piece, piece.text)], None)

    def last(self, total: Usage) -> bytes:
        """Usage only."""
        return _encode(self._head, "text_completion", [], total)

    def whole(self, pieces: Sequence[Piece], total: Usage) -> bytes:
        """All choices with their texts."""
        choices = [self._choice(piece, self._echo[piece.index] + piece.text) for piece in pieces]
        return _encode(self._head, "text_completion", choices, total)

    def _choice(self, piece: Piece, text: str) -> dict[str, Any]:
        return {
            "index": piece.index,
            "text": text,
            "logprobs": self._logged(piece) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logged(self, piece: Piece) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.token) for token in piece.logged],
            "token_logprobs": [token.logprobs.chosen for token in piece.logged],
            "top_logprobs": [self._top(token) for token in piece.logged],
            "text_offset": [token.offset for token in piece.logged],
        }

    def _top(self, token: LoggedToken) -> dict[str, float]:
        # The chosen token is always among them, as OpenAI has it.
        top = {self._name(other): value for other, value in token.logprobs.top}
        return {self._name(token.token): token.logprobs.chosen} | top


def _encode(head: Head, kind: str, choices: list[dict[str, Any]], total: Usage | None) -> bytes:
    return msgspec.json.encode(
        _Object(
            id=head.id,
            object=kind,
            created=head.created,
            model=head.model,
            choices=choices,
            usage=total,
        )
    )


def join(pieces: Sequence[Piece], choices: int) -> list[Piece]:
    """Put each choice's pieces together into one."""
    texts: list[list[str]] = [[] for _ in range(choices)]
    logged: list[list[LoggedToken]] = [[] for _ in range(choices)]
    reasons: list[str | None] = [None] * choices
    for piece in pieces:
        texts[piece.index].append(piece.text)
        logged[piece.index].extend(piece.logged)
        reasons[piece.index] = piece.finish_reason or reasons[piece.index]
    return [Piece(i, "".join(texts[i]), logged[i], reasons[i]) for i in range(choices)]
