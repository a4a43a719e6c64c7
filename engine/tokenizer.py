"""Text to token ids and back, and chats to text, as the model's own files say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from kvist.engine.models.files import ModelFilesError, model_path, read_json
from kvist.engine.models.gguf_file import GgufFile, eos_ids

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Token types of GGUF that are matched in text before it is split into words.
GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4
# Split of Llama 3's tokenizer.json; numbers in groups of up to three digits.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a decoder writes for bytes that are not (yet) a character.
REPLACEMENT = "\ufffd"


class ChatTemplateError(ValueError):
    """A chat cannot be rendered: there is no template, or it refuses these messages."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What the model's files say beside the vocabulary.

    Attributes:
        texts: "bos_token", "eos_token" and so on -> text, as chat templates see them.
        bos_id: id that begins a text, if there is one.
        eos_ids: ids that end one.
    """

    texts: Mapping[str, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]


class Tokenizer:
    """A vocabulary, its special tokens and its chat template.

    Attributes:
        vocab_size: number of ids, special tokens included.
        bos_token_id: id that begins a text, if there is one.
        eos_token_ids: ids that end one.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special: SpecialTokens, chat_template: str | None
    ) -> None:
        # A tokenizer.json may carry the limits of its training.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token_id = special.bos_id
        self.eos_token_ids = special.eos_ids
        self._special_texts = special.texts
        self.vocab_size: int = backend.get_vocab_size()
        self._template = None if chat_template is None else _compile(chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            text: any; special tokens written out in it become their ids.
            add_special_tokens: add what the model's files put around a text (often a BOS);
                False for a rendered chat, whose template has them already.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render a chat; encode the result with add_special_tokens=False.

        Args:
            messages: each with "role" and "content", and what else the template reads.
            add_generation_prompt: end with the beginning of the assistant's turn.
            tools: JSON schemas of functions, for templates that know tools.
            variables: further variables of the template.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages.
        """
        if self._template is None:
            raise ChatTemplateError("the model has no chat template; use plain completions")
        known = {"documents": None, **self._special_texts, **variables}
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **known
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        """Start turning an output into text, see Detokenizer."""
        return Detokenizer(self, context)


class Detokenizer:
    """Text of one output, as its tokens come.

    Text is given out only when it can no longer change: not while the last bytes may be the
    beginning of a character. Everything pushed, then flushed, is decode of all ids.

    Args:
        tokenizer: of the model.
        context: last ids before the output; some vocabularies drop the space at the beginning of
            a text, and the output is not one.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._read = len(self._ids)
        self._given = tokenizer.decode(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """Add ids; returns the text that is now certain, possibly empty."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """The rest, at the end of the output; a character cut off becomes U+FFFD."""
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        """What is new in text; ids before the newest ones are then needed no more."""
        new = text[len(self._given) :]
        if new:
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
            self._given = self._tokenizer.decode(self._ids)
        return new


class _Generation(Extension):
    """Accepts {% generation %}, with which some templates mark what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Any) -> Any:
        """Keep the text between the tags as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    """Compile as transformers does, so that templates written for it give the same text."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelFilesError(f"chat template: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own tojson escapes HTML, which models have not seen."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        path: as for kvist.engine.weights.load_model.

    Raises:
        ModelFilesError: the files have no tokenizer that is supported; the message says which.
    """
    found = model_path(path)
    return _from_folder(found) if found.is_dir() else _from_gguf(found)


def _from_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ModelFilesError(f"{folder}: has no tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelFilesError(f"{file}: cannot be read: {error}") from error
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    texts = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            texts[name] = value
    bos, eos = (backend.token_to_id(texts.get(name, "")) for name in ("bos_token", "eos_token"))
    special = SpecialTokens(texts, bos, () if eos is None else (eos,))
    return Tokenizer(backend, special, _chat_template(folder, settings))


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template in its own file, or in the tokenizer's settings (one, or several by name)."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _from_gguf(path: Path) -> Tokenizer:
    metadata = GgufFile(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelFilesError(
            f"{path}: tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' (byte-level BPE)"
        )
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
        types = metadata["tokenizer.ggml.token_type"]
    except KeyError as error:
        raise ModelFilesError(f"{path}: {error.args[0]} is missing") from error
    pre = metadata.get("tokenizer.ggml.pre")
    vocab = {token: number for number, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it is; its merges alone would not reach all of them.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _split(pre, path)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=type_ == GGUF_CONTROL, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (GGUF_CONTROL, GGUF_USER_DEFINED)
        ]
    )
    special = _gguf_special(metadata, tokens)
    if special.bos_id is not None and metadata.get(
        "tokenizer.ggml.add_bos_token", pre == "llama-bpe"
    ):
        bos = tokens[special.bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.bos_id)]
        )
    return Tokenizer(backend, special, metadata.get("tokenizer.chat_template"))


def _gguf_special(metadata: Mapping[str, Any], tokens: Sequence[str]) -> SpecialTokens:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    texts = {name: tokens[number] for name, number in ids.items() if number is not None}
    return SpecialTokens(texts, ids["bos_token"], eos_ids(metadata))


def _split(pre: str | None, path: Path) -> pre_tokenizers.PreTokenizer:
    """How text is cut into words before merges apply; names as in llama.cpp's llama-vocab."""
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    if pre == "llama-bpe":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise ModelFilesError(
        f"{path}: tokenizer.ggml.pre {pre!r} is not supported, "
        "only 'gpt-2', 'smollm' or 'llama-bpe'"
    )
