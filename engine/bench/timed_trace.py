"""Replay of a recorded trace: prompts that share what the recorded ones shared, when they did."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.engine.bench.workload import Item, Vocabulary, read_lines
from kvist.proto.errors import ConfigInvalid

MOONCAKE_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TimedTrace:
    """Requests from JSON lines {"timestamp", "input_length", "output_length", "hash_ids"}.

    As in the traces of Mooncake (Qin et al., FAST 2025): an id names chunk_tokens tokens, so
    prompts with the same leading ids begin with the same text. The text of an id is drawn from
    the seed and the id. A last id may name less than a chunk (as Mooncake's do), or whole chunks
    alone may have ids: the rest of the prompt is then text of its own.

    Attributes:
        path: of the file, perhaps .xz or .gz.
        chunk_tokens: tokens that one id stands for.
        time_scale: seconds per unit of timestamp; 0.001 reads milliseconds, and a smaller one
            replays faster than recorded.
        input_scale: factor of every prompt's length, the shared parts included.
        output_scale: factor of every answer's length; at least one token stays.
        max_tokens: leave out requests whose prompt and answer are longer, as scaled; 0 keeps all.
    """

    path: Path
    chunk_tokens: int = MOONCAKE_CHUNK_TOKENS
    time_scale: float = 1.0
    input_scale: float = 1.0
    output_scale: float = 1.0
    max_tokens: int = 0

    def items(self, vocabulary: Vocabulary, count: int, seed: int) -> list[Item]:
        """The first count requests that are not left out, in order of time, the first at 0 s.

        Raises:
            ConfigInvalid: the file is no such trace, or nothing of it is left.
        """
        size = round(self.chunk_tokens * self.input_scale)
        if self.chunk_tokens < 1 or size < 1:
            raise ConfigInvalid("--timed-trace-input-scale: less than a token is left of a chunk")
        if self.time_scale < 0 or self.output_scale < 0:
            raise ConfigInvalid("--timed-trace-...: a scale is below 0")
        texts: dict[Any, list[Any]] = {}
        made: list[Item] = []
        for number, document in read_lines(self.path):
            if len(made) == count:
                break
            time, tokens, wanted, ids = self._fields(number, document)
            length = max(1, round(tokens * self.input_scale))
            output = max(1, round(wanted * self.output_scale))
            if self.max_tokens and length + output > self.max_tokens:
                continue
            symbols: list[Any] = []
            for each in ids:
                if each not in texts:
                    texts[each] = vocabulary.draw(random.Random(f"{seed}/{each}"), size)
                symbols += texts[each]
            rest = random.Random(f"{seed}//{number}")
            symbols += vocabulary.draw(rest, max(0, length - len(symbols)))
            made.append(vocabulary.item(symbols[:length], output, time * self.time_scale))
        if not made:
            raise ConfigInvalid(f"--dataset-path: {self.path}: no request is left of it")
        made.sort(key=lambda item: item.at_s or 0.0)
        first = made[0].at_s or 0.0
        return [
            Item(each.prompt, each.prompt_tokens, each.output_tokens, (each.at_s or 0.0) - first)
            for each in made
        ]

    def _fields(self, line: int, document: dict[str, Any]) -> tuple[float, int, int, list[Any]]:
        where = f"{self.path} line {line}"
        for key in ("timestamp", "input_length"):
            value = document.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigInvalid(f"{where}: {key}: {value!r} is no number from 0 on")
        ids, wanted = document.get("hash_ids"), document.get("output_length", 1)
        if not isinstance(ids, list) or not all(isinstance(each, int | str) for each in ids):
            raise ConfigInvalid(f"{where}: hash_ids: not a list of numbers or strings")
        if isinstance(wanted, bool) or not isinstance(wanted, int | float) or wanted < 0:
            raise ConfigInvalid(f"{where}: output_length: {wanted!r} is no number from 0 on")
        tokens = int(document["input_length"])
        if not tokens // self.chunk_tokens <= len(ids) <= -(-tokens // self.chunk_tokens):
            raise ConfigInvalid(
                f"{where}: {len(ids)} hash_ids for {tokens} tokens do not go with chunks of "
                f"{self.chunk_tokens}; say how many tokens an id stands for with "
                "--timed-trace-chunk-hash-size"
            )
        return float(document["timestamp"]), tokens, int(wanted), ids
