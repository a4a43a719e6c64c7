"""Settings of the sidecar: files, variables and flags of any content."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from fuzz.target import Check, Target
from kvist.cachesvc.config import SETTINGS, Loaded, add_flags, as_toml, load_config
from kvist.proto.errors import ConfigInvalid

_KEYS = [setting.key for setting in SETTINGS]
_PIECES = [
    "=", "[", "]", "{", "}", '"', "'", '"""', "\n", "#", ".", ",", "\\u0000", "\\ud800", "\x00",
    "\x7f", "\r", "1", "-1", "0x10", "1e999", "nan", "inf", "true", "1979-05-27", "4GiB", "9" * 400,
    "9" * 5000, "[" * 2000, "{a=" * 2000, "a." * 2000, "²", "٣", "auto", "/tmp/x", "::", "off",
]  # fmt: skip
_VALUES = (
    st.sampled_from([setting.default for setting in SETTINGS] + _PIECES)
    | st.text(max_size=30)
    | (st.text('\0\x1b\x7f\x85\ud800\u2028\n"\\#', max_size=3)).map(lambda text: f"/tmp/{text}")
    | st.integers().map(str)
    | st.floats().map(str)
)


@dataclass(frozen=True, slots=True)
class Words:
    """One start of kvistd.

    Attributes:
        file: bytes of the settings file; None is no file.
        variables: name -> value.
        flags: key -> value.
    """

    file: bytes | None
    variables: dict[str, str]
    flags: dict[str, str]


def _line(key: str, value: str, quoted: bool) -> str:
    return f'{key} = "{value}"\n' if quoted else f"{key} = {value}\n"


_LINES = st.builds(_line, st.sampled_from(_KEYS) | st.text(max_size=8), _VALUES, st.booleans())
_SOUP = st.lists(_LINES | st.sampled_from(_PIECES + _KEYS) | st.text(max_size=8), max_size=8)
_FILES = st.none() | st.binary(max_size=60) | _SOUP.map(lambda soup: _encoded("".join(soup)))
_VARIABLES = st.dictionaries(
    st.sampled_from([*_KEYS, "api_key", "x"]).map(lambda key: f"KVIST_{key.upper()}"),
    _VALUES,
    max_size=2,
)
_FLAGS = st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=2)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@contextmanager
def _opened() -> Iterator[Check]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    with tempfile.TemporaryDirectory(prefix="kvist-fuzz-") as folder:
        file = Path(folder) / "kvistd.toml"

        def load(words: Words) -> Loaded:
            flags = vars(parser.parse_args([])) | words.flags
            if words.file is not None:
                file.write_bytes(words.file)
                flags["config"] = str(file)
            return load_config(argparse.Namespace(**flags), words.variables, Path(folder) / "none")

        def check(data: object) -> None:
            """Settings come out, or ConfigInvalid; and what is printed reads back the same."""
            assert isinstance(data, Words)
            try:
                loaded = load(data)
            except ConfigInvalid:
                return
            again = load(Words(as_toml(loaded).encode(), {}, {}))
            assert again.config == loaded.config

        yield check


TARGET = Target("config", st.builds(Words, _FILES, _VARIABLES, _FLAGS), _opened)
