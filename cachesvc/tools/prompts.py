"""Files of prompts, one JSON value a line: what `warm` sends and `pin --prompts` names.

"some text"                                        a prompt
[1, 2, 3]                                          token ids
{"prompt": "..."}, {"prompt": [1, 2, 3]}           a body of /v1/completions
{"messages": [{"role": "user", "content": ".."}]}  a body of /v1/chat/completions
{"body": {...}}                                    either of these, as in OpenAI's batch files
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.proto.errors import ConfigInvalid

# Of a body: what says whose the prompt is, or how it is written; all else is the tool's to say.
_KEPT = (
    "model", "messages", "prompt", "cache_salt", "tools", "add_special_tokens",
    "chat_template_kwargs", "user",
)  # fmt: skip
TOKEN_MAX = 1 << 32


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt.

    Attributes:
        number: of its line, from 1.
        body: of a request, with "prompt" or "messages".
    """

    number: int
    body: dict[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether it has messages."""
        return "messages" in self.body

    @property
    def tokens(self) -> list[int] | None:
        """Its token ids where it says them."""
        prompt = self.body.get("prompt")
        return prompt if isinstance(prompt, list) else None


def read_prompts(path: Path, first: int = 1) -> list[PromptLine]:
    """All prompts of a file, from a line on; empty lines are passed over.

    Raises: ConfigInvalid: it cannot be read, or a line is no prompt; says which.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return list(_parse(enumerate(file, 1), path, first))
    except OSError as error:
        raise ConfigInvalid(f"FILE: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigInvalid(f"FILE: {path} is not UTF-8 text") from None


def _parse(lines: Iterator[tuple[int, str]], path: Path, first: int) -> Iterator[PromptLine]:
    for number, line in lines:
        if number >= first and line.strip():
            try:
                yield PromptLine(number, _body(json.loads(line)))
            except ValueError as error:
                raise ConfigInvalid(f"FILE: {path}, line {number}: {error}") from None


def _body(value: Any) -> dict[str, Any]:
    """Raises: ValueError: it is no prompt."""
    if isinstance(value, str | list):
        value = {"prompt": value}
    if isinstance(value, dict) and isinstance(value.get("body"), dict):
        value = value["body"]
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError(
            'not a prompt; give text, token ids, or an object with "prompt" or "messages"'
        )
    prompt = value.get("prompt", "")
    if isinstance(prompt, list) and not all(_is_token(token) for token in prompt):
        raise ValueError("a prompt that is a list is one of token ids")
    if not isinstance(prompt, str | list) or not isinstance(value.get("messages", []), list):
        raise ValueError('"prompt" is text or token ids, "messages" a list')
    return {name: value[name] for name in _KEPT if name in value}


def _is_token(token: object) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < TOKEN_MAX
