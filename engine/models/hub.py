"""Names as on Hugging Face, ORG/NAME: where a copy of such a model is on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def looks_like_name(text: str) -> bool:
    """Whether a text may be a model's name on Hugging Face, rather than a path."""
    return _NAME.fullmatch(text) is not None


def hub_folder(environment: Mapping[str, str]) -> Path:
    """The local cache of models: $HF_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub.

    Source: huggingface_hub, constants.py.
    """
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"]).expanduser()
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{base}/huggingface"
    return Path(home).expanduser() / "hub"


def local_copy(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of a model in the local cache, at its branch main; None when it is not there.

    Asks nobody: what was downloaded last is taken.

    Args:
        name: as looks_like_name says.
    """
    folder = hub_folder(environment) / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and (snapshot / "config.json").is_file() else None


def advice(name: str) -> str:
    """What to do about a model that is not there."""
    return (
        f"and no model {name} in {hub_folder(os.environ)}; Kvist does not download, so run "
        f"`hf download {name} --local-dir {name.partition('/')[2]}` and give that folder"
    )
