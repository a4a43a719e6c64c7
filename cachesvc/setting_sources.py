"""Where settings come from: a TOML file and the environment; names that nobody knows are errors."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvist.proto.errors import ConfigInvalid

VARIABLE_PREFIX = "KVIST_"
# Variables of the other programs of Kvist, which may stand in the same environment.
FOREIGN_VARIABLES = (
    "KVIST_API_KEY",
    "KVIST_DEBUG",
)
# What Kubernetes sets in every pod for a Service whose name begins with "kvist".
_SERVICE_LINK = re.compile(r"\w+(_SERVICE_(HOST|PORT)(_\w+)?|_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


def from_file(path: Path, known: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What a file sets.

    Args:
        path: of the file. known: the settings that there are.

    Returns: key -> text, and where it came from.

    Raises:
        ConfigInvalid: it cannot be read, or sets what there is not; the message says the fix.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"--config: cannot read {path}: {error.strerror}") from None
    # Not all that tomllib raises says TOML: numbers of 5000 digits, brackets in brackets.
    except (ValueError, RecursionError) as error:
        raise ConfigInvalid(f"--config: {path} is not TOML: {error}") from None
    layer: dict[str, tuple[str, str]] = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigInvalid(f"{key} (from file {path}): no such setting{_nearest(key, known)}")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ConfigInvalid(f"{key} (from file {path}): give a string or a number")
        layer[key] = (str(value), f"file {path}")
    return layer


def from_environment(
    environment: Mapping[str, str], known: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """What the environment sets.

    Args:
        environment: the process's variables. known: variable -> key of each setting.

    Returns: key -> text, and where it came from.

    Raises:
        ConfigInvalid: a variable begins like ours and is none.
    """
    layer: dict[str, tuple[str, str]] = {}
    for name, text in environment.items():
        if not name.startswith(VARIABLE_PREFIX):
            continue
        if name not in known:
            if name in FOREIGN_VARIABLES or _SERVICE_LINK.fullmatch(name):
                continue
            raise ConfigInvalid(
                f"{name} (from the environment): no such variable{_nearest(name, list(known))}"
            )
        layer[known[name]] = (text, f"environment {name}")
    return layer


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
