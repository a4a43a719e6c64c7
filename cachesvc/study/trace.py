"""Traces: who asked for which prompt, and when. Read from JSON lines, one request each.

    {"timestamp": seconds, "input_length": tokens, "hash_ids": [one id per block]}

as in the traces of Mooncake (Qin et al., FAST 2025), whose timestamps are milliseconds. An id may
be a number or a string. A block is known by its id and all ids before it, so ids that name a
block's own text alone are fine too. A request may have a hint, "cache_hints", with the fields of
proto/hints.py, as in the API. Other fields are not read.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from kvist.cachesvc.catalog.blocks import NO_ROW
from kvist.proto.errors import ConfigInvalid
from kvist.proto.hints import NO_HINT, Hint

_NAME_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
_NAME_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time. Blocks are numbered by first use; see eviction.Tree.

    Attributes:
        name: of the file.
        times_s: (requests,), from the first one on, never falling.
        tokens: (requests,), of each prompt.
        starts: (requests + 1,), where each prompt's blocks begin in blocks.
        blocks: (events,), int64.
        parents, depths: (distinct blocks,), int32.
        hints: by request, of those that have one.
    """

    name: str
    times_s: NDArray[np.float64]
    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    blocks: NDArray[np.int64]
    parents: NDArray[np.int32]
    depths: NDArray[np.int32]
    hints: Mapping[int, Hint] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """How many."""
        return len(self.times_s)

    @property
    def distinct(self) -> int:
        """Different blocks."""
        return len(self.parents)

    @property
    def parent(self) -> memoryview:
        """See eviction.Tree."""
        return self.parents.data

    @property
    def depth(self) -> memoryview:
        """See eviction.Tree."""
        return self.depths.data

    def name_of(self, row: int) -> int:
        """64 bits that stand for a block."""
        return (row + 1) * _NAME_STEP & _NAME_MASK

    def prompt(self, request: int) -> NDArray[np.int64]:
        """The blocks of a request."""
        return self.blocks[self.starts[request] : self.starts[request + 1]]


class _Builder:
    """Numbers blocks and collects requests."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int | str], int] = {}
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.requests: list[tuple[float, int, list[int], Hint]] = []

    def add(self, document: object) -> None:
        """Take a request in.

        Raises: ValueError: what is wrong with it.
        """
        if not isinstance(document, dict):
            raise ValueError("not an object with timestamp, input_length and hash_ids")
        time_s = _number(document, "timestamp")
        tokens = _number(document, "input_length")
        ids = document.get("hash_ids")
        if not isinstance(ids, list):
            raise ValueError("hash_ids: not a list")
        row, rows = NO_ROW, []
        for depth, each in enumerate(ids):
            if isinstance(each, bool) or not isinstance(each, int | str):
                raise ValueError(f"hash_ids: {each!r} is no number and no string")
            parent, row = row, self.numbers.setdefault((row, each), len(self.parents))
            if row == len(self.parents):
                self.parents.append(parent)
                self.depths.append(depth)
            rows.append(row)
        self.requests.append((time_s, int(tokens), rows, _hint(document)))

    def finish(self, name: str, units_per_s: float) -> Trace:
        """All requests, in order of time."""
        self.requests.sort(key=lambda request: request[0])
        times_s = np.array([request[0] for request in self.requests]) / units_per_s
        prompts = [request[2] for request in self.requests]
        return Trace(
            name=name,
            times_s=times_s - times_s[0],
            tokens=np.array([request[1] for request in self.requests]),
            starts=np.concatenate([[0], np.cumsum([*map(len, prompts)])]).astype(np.int64),
            blocks=np.array([row for rows in prompts for row in rows], np.int64),
            parents=np.array(self.parents, np.int32),
            depths=np.array(self.depths, np.int32),
            hints={
                number: request[3]
                for number, request in enumerate(self.requests)
                if request[3] != NO_HINT
            },
        )


def _hint(document: dict[str, object]) -> Hint:
    """Raises: ValueError."""
    told = document.get("cache_hints")
    if told is None:
        return NO_HINT
    if not isinstance(told, dict):
        raise ValueError("cache_hints: not an object")
    known = {"session_end": bool, "tool_pause_s": int | float, "priority": int}
    for name, value in told.items():
        if name not in known:
            raise ValueError(f"cache_hints: {name!r} is not one of {', '.join(known)}")
        if not isinstance(value, known[name]) or (name != "session_end" and value is True):
            raise ValueError(f"cache_hints: {name}: {value!r} is of another type")
    hint = Hint(**told)
    if hint.problem():
        raise ValueError(f"cache_hints: {hint.problem()}")
    return hint


def _number(document: dict[str, object], key: str) -> float:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise ValueError(f"{key}: {value!r} is no number from 0 on")
    return float(value)


def read_trace(path: Path, milliseconds: bool, progress: Callable[[str], None]) -> Trace:
    """Read a trace; .xz and .gz are unpacked.

    Args:
        milliseconds: the unit of its timestamps, instead of seconds.
        progress: told what is done, now and then.

    Raises: ConfigInvalid: it cannot be read or is not a trace; names the line and the fault.
    """
    builder = _Builder()
    line = 0
    try:
        with _opened(path) as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    builder.add(json.loads(text))
                if not line % 1000:
                    progress(f"reading {path.name}: {line} requests")
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigInvalid(f"{path}: not UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigInvalid(f"{path} line {line}: not JSON: {error}") from None
    except ValueError as error:
        raise ConfigInvalid(f"{path} line {line}: {error}") from None
    if not builder.parents:
        raise ConfigInvalid(f"{path}: no request with a block in it")
    return builder.finish(path.name, 1000.0 if milliseconds else 1.0)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Raises: OSError."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as file:
            yield file
    elif path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield file
    else:
        with path.open(encoding="utf-8") as file:
            yield file
