"""What is asked: prompts of exact length from a seed, conversations and prompts from files."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kvist.proto.errors import ConfigInvalid

# One token each, with a space before, in most vocabularies.
_TEXT = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government number
night point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law
car city community name president team minute idea body information back parent face level
office door health person art war history party result change morning reason research girl guy
moment air teacher force education foot boy age policy music market sense nation plan college
interest death experience effect use class control care field development role effort rate heart
drug show leader light voice wife police mind price report decision son view relationship town
road arm difference value building action season society
"""
WORDS = tuple(_TEXT.split())
# Conversations that vLLM's benchmark leaves out, too: too short to measure, too long for most.
SHAREGPT_TOKENS_MIN = 4
SHAREGPT_PROMPT_MAX = 1024
SHAREGPT_TOTAL_MAX = 2048

Prompt = str | list[int]
Count = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Item:
    """One request to make.

    Attributes:
        prompt: text, or token ids where the server takes them.
        prompt_tokens: as planned; what the server counts is what is reported.
        output_tokens: to ask for.
        at_s: when a trace says that it is due, seconds from the start; else None.
    """

    prompt: Prompt
    prompt_tokens: int
    output_tokens: int
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Symbols that prompts are made of: token ids, so that lengths are exact, or words.

    Attributes:
        symbols: ids that stand for ordinary text in the model, or words.
    """

    symbols: Sequence[int] | Sequence[str]

    def draw(self, chance: random.Random, count: int) -> list[Any]:
        """Symbols at random."""
        return chance.choices(self.symbols, k=count)

    def prompt(self, symbols: Sequence[Any]) -> Prompt:
        """Symbols as a prompt."""
        if isinstance(self.symbols[0], int):
            return list(symbols)
        return " ".join(symbols)

    def item(self, symbols: Sequence[Any], output_tokens: int, at_s: float | None = None) -> Item:
        """Symbols as a request."""
        return Item(self.prompt(symbols), len(symbols), output_tokens, at_s)


def words_text() -> str:
    """What to tokenize for vocabulary_of: WORDS as running text has them."""
    return " " + " ".join(WORDS)


def vocabulary_of(ids: Sequence[int] | None) -> Vocabulary:
    """The symbols of prompts: the different ids of words_text, or WORDS where there are none."""
    return Vocabulary(sorted(set(ids)) if ids else WORDS)


def warm_up_items(vocabulary: Vocabulary, like: Item, count: int, seed: int) -> list[Item]:
    """Requests as long as one of the run that share nothing with any of them."""
    chance = random.Random(f"{seed}/warm-up")
    return [
        vocabulary.item(vocabulary.draw(chance, like.prompt_tokens), like.output_tokens)
        for _ in range(count)
    ]


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """Prompts that share nothing but a prefix.

    Attributes:
        input_tokens: mean length behind the prefix.
        output_tokens: mean length of the answers.
        prefix_tokens: at the beginning of all of them, the same.
        range_ratio: lengths are even between (1 - ratio) and (1 + ratio) times their mean.
    """

    input_tokens: int = 1024
    output_tokens: int = 128
    prefix_tokens: int = 0
    range_ratio: float = 0.0

    def items(self, vocabulary: Vocabulary, count: int, seed: int) -> list[Item]:
        """Make count requests."""
        if not 0 <= self.range_ratio < 1:
            raise ConfigInvalid(f"--random-range-ratio: {self.range_ratio} is not in [0, 1)")
        check_lengths("--random", self.input_tokens, self.output_tokens, self.prefix_tokens)
        chance = random.Random(seed)
        prefix = vocabulary.draw(chance, self.prefix_tokens)
        made = []
        for _ in range(count):
            input_tokens = self._length(chance, self.input_tokens)
            output_tokens = self._length(chance, self.output_tokens)
            made.append(
                vocabulary.item([*prefix, *vocabulary.draw(chance, input_tokens)], output_tokens)
            )
        return made

    def _length(self, chance: random.Random, mean: int) -> int:
        low, high = int(mean * (1 - self.range_ratio)), int(mean * (1 + self.range_ratio))
        return chance.randint(max(1, low), max(1, high))


@dataclass(frozen=True, slots=True)
class RepeatedPrefixes:
    """Prompts of a few prefixes, each with suffixes of their own, in random order.

    Attributes:
        prefix_tokens: of each prefix.
        suffix_tokens: behind it.
        prefixes: how many.
        output_tokens: of each answer.
    """

    prefix_tokens: int = 256
    suffix_tokens: int = 256
    prefixes: int = 10
    output_tokens: int = 128

    def items(self, vocabulary: Vocabulary, count: int, seed: int) -> list[Item]:
        """Make count requests, the same number for each prefix, one more for the first ones."""
        name = "--prefix-repetition"
        check_lengths(name, self.prefix_tokens + self.suffix_tokens, self.output_tokens, 0)
        if self.prefixes < 1:
            raise ConfigInvalid(f"{name}-num-prefixes: give 1 or more")
        chance = random.Random(seed)
        prefixes = [vocabulary.draw(chance, self.prefix_tokens) for _ in range(self.prefixes)]
        made = [
            vocabulary.item(
                [*prefixes[number % self.prefixes], *vocabulary.draw(chance, self.suffix_tokens)],
                self.output_tokens,
            )
            for number in range(count)
        ]
        chance.shuffle(made)
        return made


def check_lengths(flags: str, input_tokens: int, output_tokens: int, prefix_tokens: int) -> None:
    """Lengths make sense.

    Raises:
        ConfigInvalid: names the family of flags.
    """
    if input_tokens < 1 or output_tokens < 1 or prefix_tokens < 0:
        raise ConfigInvalid(
            f"{flags}-...: prompts and answers need at least one token, got {input_tokens} "
            f"and {output_tokens}" + (f", prefix {prefix_tokens}" if prefix_tokens else "")
        )


def sharegpt_items(
    path: Path, count: int, seed: int, tokens_of: Count, output_tokens: int | None
) -> list[Item]:
    """First turns of conversations, in random order; answers as long as the recorded ones.

    Args:
        path: JSON list of {"conversations": [{"value": text}, ...]}.
        tokens_of: counts the tokens of a text.
        output_tokens: of every answer, instead of the recorded one's.

    Raises:
        ConfigInvalid: the file is not such a list, or no conversation fits.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"--dataset-path: {path}: {error}") from None
    if not isinstance(document, list):
        raise ConfigInvalid(f"--dataset-path: {path}: not a list of conversations")
    talks = [talk for talk in map(_first_turns, document) if talk is not None]
    random.Random(seed).shuffle(talks)
    made: list[Item] = []
    for question, answer in talks:
        if len(made) == count:
            break
        prompt_tokens = tokens_of(question)
        wanted = tokens_of(answer) if output_tokens is None else output_tokens
        if (
            SHAREGPT_TOKENS_MIN <= prompt_tokens <= SHAREGPT_PROMPT_MAX
            and (wanted >= SHAREGPT_TOKENS_MIN or output_tokens is not None)
            and prompt_tokens + wanted <= SHAREGPT_TOTAL_MAX
        ):
            made.append(Item(question, prompt_tokens, wanted))
    return _repeat(made, count, path)


def _first_turns(entry: object) -> tuple[str, str] | None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    question, answer = texts
    return (question, answer) if isinstance(question, str) and isinstance(answer, str) else None


def burstgpt_items(path: Path, count: int, seed: int, vocabulary: Vocabulary) -> list[Item]:
    """Made-up requests as long as those of BurstGPT (Wang et al., 2024), in random order.

    Args:
        path: CSV with the columns Model, Request tokens, Response tokens; perhaps .gz or .xz. As in
            vLLM's benchmark, those of GPT-4 that got an answer are taken.

    Raises:
        ConfigInvalid: the file is none, or has no such request.
    """
    lengths = []
    try:
        with _opened(path) as file:
            for row in csv.DictReader(file):
                asked, given = row["Request tokens"], row["Response tokens"]
                if row["Model"] == "GPT-4" and asked.isdigit() and given.isdigit():
                    lengths.append((int(asked), int(given)))
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ConfigInvalid(f"--dataset-path: {path}: {error}") from None
    except (KeyError, AttributeError, csv.Error):
        raise ConfigInvalid(
            f"--dataset-path: {path}: not a CSV with the columns Model, Request tokens and "
            "Response tokens"
        ) from None
    chance = random.Random(seed)
    lengths = [each for each in lengths if min(each) > 0]
    chance.shuffle(lengths)
    made = [vocabulary.item(vocabulary.draw(chance, a), b) for a, b in lengths[:count]]
    return _repeat(made, count, path)


def custom_items(path: Path, count: int, tokens_of: Count, output_tokens: int) -> list[Item]:
    """Prompts of a file, in its order.

    Args:
        path: JSON lines, each {"prompt": text or token ids} and perhaps "output_tokens".
        output_tokens: where a line does not say.

    Raises:
        ConfigInvalid: a line is not such an object; the message says which.
    """
    made = []
    for number, document in read_lines(path):
        prompt, wanted = document.get("prompt"), document.get("output_tokens", output_tokens)
        ids = isinstance(prompt, list) and prompt and all(type(each) is int for each in prompt)
        if not (ids or (isinstance(prompt, str) and prompt)):
            raise ConfigInvalid(f"{path} line {number}: prompt: no text and no list of token ids")
        if type(wanted) is not int or wanted < 1:
            raise ConfigInvalid(f"{path} line {number}: output_tokens: no number over 0")
        assert prompt is not None
        tokens = tokens_of(prompt) if isinstance(prompt, str) else len(prompt)
        made.append(Item(prompt, tokens, wanted))
        if len(made) == count:
            break
    return _repeat(made, count, path)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file of JSON lines with their line numbers; .xz and .gz are unpacked.

    Raises:
        ConfigInvalid: it cannot be read, or a line is not an object.
    """
    try:
        with _opened(path) as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                document = json.loads(text)
                if not isinstance(document, dict):
                    raise ConfigInvalid(f"{path} line {number}: not an object")
                yield number, document
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ConfigInvalid(f"--dataset-path: {path}: {error}") from None


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _repeat(made: list[Item], count: int, path: Path) -> list[Item]:
    """As many as asked for: a file with too few is used more than once."""
    if not made:
        raise ConfigInvalid(f"--dataset-path: {path}: no prompt in it can be used")
    return [made[number % len(made)] for number in range(count)]
