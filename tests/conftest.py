"""Options of the tests: --seed replays one history of the simulation, and nothing else."""

from __future__ import annotations

import pytest

REPLAY = "test_seed_finds_nothing"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="replay one seed of the simulation, step by step")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--seed") is not None:
        others = [item for item in items if not item.name.startswith(REPLAY)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.name.startswith(REPLAY)]
