"""Options: --seed replays one history of the simulation; --prompts sizes the runs under vLLM.
Triton's kernels run in its interpreter, also beside a GPU, but for make test-gpu."""

from __future__ import annotations

import os
import signal

import pytest

# Read when a kernel is defined, so before any test imports one.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell's job in the background ignores it, and so would all the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPLAY = "test_seed_finds_nothing"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prompts", type=int, default=200, help="prompts of make test-vllm")
    parser.addoption("--seed", type=int, help="replay one seed of the simulation, step by step")


def pytest_configure() -> None:
    if os.environ["TRITON_INTERPRET"] != "1":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("TRITON_INTERPRET=0: torch sees no CUDA device to test on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--seed") is not None:
        others = [item for item in items if not item.name.startswith(REPLAY)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.name.startswith(REPLAY)]
