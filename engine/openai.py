"""OpenAI's requests as this engine takes them: schemas, checks, and errors in OpenAI's shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from kvist.engine.cache_hints import CacheHints
from kvist.engine.request import CACHE_BYPASS, CACHE_ON, SamplingParams
from kvist.proto.errors import KvistError
from kvist.proto.hints import NO_HINT, Hint

BODY_BYTES_MAX = 32 << 20
CHOICES_MAX = 128
STOP_STRINGS_MAX = 16
STOP_CHARS_MAX = 1024
STOP_IDS_MAX = 128
LOGPROBS_MAX = 20
SALT_CHARS_MAX = 1024
COMPLETION_TOKENS_DEFAULT = 16

# What would change the answer and is not done here, with the values that ask for nothing. Anything
# else that is unknown (user, metadata, store, ...) cannot change the answer and is let through.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class ApiError(KvistError):
    """An HTTP reply other than success, in OpenAI's shape.

    Attributes:
        status: HTTP status.
        message: what is wrong and how to put it right.
        param: the parameter at fault, if one is.
        code: a word that programs can test, if there is one.
        headers: of the reply, besides the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The reply's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def bad(param: str, problem: str, code: str | None = None) -> ApiError:
    """A 400 that names a parameter."""
    return ApiError(400, f"{param}: {problem}", param, code)


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides text."""

    include_usage: bool = False


class _Generate(msgspec.Struct, frozen=True, kw_only=True):
    """What both generating endpoints take; None stands for a parameter left out."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Meta(max_length=SALT_CHARS_MAX)] | None = None
    kv_cache: str | None = None
    cache_hints: CacheHints | None = None

    @property
    def hint(self) -> Hint:
        """What is said of what comes after the request."""
        return NO_HINT if self.cache_hints is None else self.cache_hints.hint

    @property
    def choices(self) -> int:
        """Answers wanted per prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """A stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def cache(self) -> str:
        """CACHE_ON or CACHE_BYPASS."""
        return self.kv_cache or CACHE_ON

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer and are not part of it."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check(self) -> None:
        """Check what a type cannot say.

        Raises:
            ApiError: 400 that names the parameter.
        """
        if len(self.stop_strings) > STOP_STRINGS_MAX:
            raise bad("stop", f"{len(self.stop_strings)} strings; give {STOP_STRINGS_MAX} at most")
        if any(not 0 < len(text) <= STOP_CHARS_MAX for text in self.stop_strings):
            raise bad("stop", f"each string must have 1 to {STOP_CHARS_MAX} characters")
        if len(self.stop_token_ids or ()) > STOP_IDS_MAX:
            raise bad("stop_token_ids", f"give {STOP_IDS_MAX} ids at most")
        if any(not 0 <= token < 2**32 for token in self.stop_token_ids or ()):
            raise bad("stop_token_ids", "an id is out of range")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise bad("seed", "must fit in 64 bits, with a sign")
        if self.best_of is not None and self.best_of != self.choices:
            raise bad("best_of", "ranking answers is not supported; leave it out or give n")
        if self.kv_cache not in (None, CACHE_ON, CACHE_BYPASS):
            raise bad("kv_cache", f"give {CACHE_ON!r} or {CACHE_BYPASS!r}")
        if self.hint.problem():
            raise bad("cache_hints", self.hint.problem())
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options", "only allowed with stream=true")

    def sampling(self, max_tokens: int, logprobs: int | None, choice: int) -> SamplingParams:
        """The core's parameters for one of the choices; a seed is stepped so that they differ."""
        seed = None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            seed=seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )


class ChatRequest(_Generate, frozen=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def token_limit(self) -> int | None:
        """Tokens wanted at most; None is up to the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """Alternatives per token; None reports nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """As for every request; besides, parameters that only chat has."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise bad("top_logprobs", "only allowed with logprobs=true")
        if self.echo:
            raise bad("echo", "not supported for chat")
        if self.add_special_tokens:
            raise bad("add_special_tokens", "the chat template has them; leave it out")

    def template_messages(self) -> list[dict[str, Any]]:
        """The messages with text contents, as a chat template takes them.

        Raises:
            ApiError: 400; a role or a content is not one that a text model reads.
        """
        return [_template_message(i, message) for i, message in enumerate(self.messages)]

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """Tools for the template to describe; what the model calls comes back as plain text."""
        return self.tools if self.tools and self.tool_choice != "none" else None


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _template_message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        raise bad("messages", f"[{number}].role is {role!r}; give one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part_text(number, i, part) for i, part in enumerate(content))
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise bad("messages", f"[{number}].content must be a string or a list of text parts")
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _part_text(number: int, part_number: int, part: Any) -> str:
    where = f"[{number}].content[{part_number}]"
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise bad("messages", f"{where} is of type {kind!r}; this model reads only text")
    text = part.get("text")
    if not isinstance(text, str):
        raise bad("messages", f"{where}.text must be a string")
    return text


class CompletionRequest(_Generate, frozen=True, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[Any]
    echo: bool | None = None
    add_special_tokens: bool = True
    logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None

    @property
    def token_limit(self) -> int | None:
        """Tokens wanted at most; OpenAI's default of 16 is the handler's to apply."""
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """Alternatives per token; None reports nothing."""
        return self.logprobs

    def check(self) -> None:
        """As for every request; besides, parameters that only completions have."""
        super().check()
        if self.echo and self.logprobs is not None:
            raise bad("echo", "log-probabilities of a prompt are not computed; drop one of the two")
        if len(self.prompts()) * self.choices > CHOICES_MAX:
            raise bad("n", f"prompts times n must not exceed {CHOICES_MAX}")

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids.

        Raises:
            ApiError: 400; the parameter has none of the four shapes.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise bad("prompt", "the list is empty")
        if all(isinstance(item, str) for item in self.prompt):
            return list(self.prompt)
        if _are_ids(self.prompt):
            return [list(self.prompt)]
        if all(isinstance(item, list) and item and _are_ids(item) for item in self.prompt):
            return [list(item) for item in self.prompt]
        raise bad(
            "prompt", "give a string, a list of strings, a list of token ids, or a list of such"
        )


def _are_ids(items: Sequence[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 2**32 for item in items)


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /tokenize: a prompt, or messages as chat would see them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Exactly one of prompt and messages is there.

        Raises:
            ApiError: 400.
        """
        if (self.prompt is None) == (self.messages is None):
            raise bad("prompt", "give either prompt or messages")


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /detokenize."""

    tokens: list[int]
    model: str | None = None

    def check(self) -> None:
        """Ids fit the tokenizer's integers.

        Raises:
            ApiError: 400.
        """
        if not _are_ids(self.tokens):
            raise bad("tokens", "an id is out of range")


Request = TypeVar("Request", ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


def parse(body: bytes, kind: type[Request]) -> Request:
    """Read and check a body.

    Raises:
        ApiError: 400 that names the parameter at fault, where one is.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    for name in fields.keys() & REFUSED.keys():
        value = fields[name]
        if value is not None and value not in REFUSED[name]:
            raise bad(name, "this value is not supported; leave the parameter out", "unsupported")
    try:
        request = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    request.check()
    return request


_AT = re.compile(r"^(.*) - at `\$\.(\w+).*`$", re.DOTALL)
_FIELD = re.compile(r"field `(\w+)`")


def _explain(text: str) -> ApiError:
    """Turn msgspec's "Expected ... - at `$.name`" into an error that names the parameter."""
    at = _AT.match(text)
    if at:
        return bad(at.group(2), at.group(1))
    missing = _FIELD.search(text)
    if missing:
        return bad(missing.group(1), "this parameter is required")
    return ApiError(400, text)
