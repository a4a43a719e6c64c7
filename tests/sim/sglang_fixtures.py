"""Fixtures of the tests of SGLang's plugin: a module takes them by assigning them to its names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sim.sglang_memory import HostPool, filled, make_storage, standins
from sim.sidecar import Sidecar

FLAGS = ["--slot-bytes", "16KiB"]


@pytest.fixture(scope="module", autouse=True)
def sglang() -> Iterator[None]:
    with standins():
        yield


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path_factory.mktemp("sglang-plugin"), FLAGS)
    made.start()
    yield made
    made.close()


@pytest.fixture
def pool() -> HostPool:
    return filled(HostPool())


@pytest.fixture
def store(sidecar: Sidecar, pool: HostPool) -> Iterator[Any]:
    made = make_storage(sidecar, pool)
    yield made
    made.close()
