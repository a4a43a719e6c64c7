"""Fixtures of the tests of vLLM's plugin: a module takes them by assigning them to its names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sim.sidecar import Sidecar
from sim.vllm_engine import Engine


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path_factory.mktemp("vllm-plugin"), ["--slot-bytes", "16KiB"])
    made.start()
    yield made
    made.close()


@pytest.fixture
def engine(sidecar: Sidecar) -> Iterator[Engine]:
    made = Engine(sidecar)
    yield made
    made.close()
