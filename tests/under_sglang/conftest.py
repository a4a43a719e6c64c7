"""SGLang's own objects on a machine without a GPU, over a real sidecar."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sim.sidecar import Sidecar

if importlib.util.find_spec("sglang") is not None:
    from sim.sglang_cpu import declare_vision

    declare_vision()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that SGLang takes for a model; no weights are ever loaded."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,'
        ' "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3,'
        ' "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 2048,'
        ' "torch_dtype": "bfloat16"}'
    )
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="session", autouse=True)
def published(model: Path) -> None:
    from sim.sglang_pools import publish_arguments

    publish_arguments(model)


@pytest.fixture(scope="session")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    folder = tmp_path_factory.mktemp("under-sglang")
    made = Sidecar(folder, ["--slot-bytes", "16KiB"])
    made.start()
    yield made
    made.close()


@pytest.fixture
def make_controller() -> Iterator[Callable[..., Any]]:
    """SGLang's own controller over pools and a sidecar; ended with the test."""
    from sim.sglang_pools import make_controller

    made: list[Any] = []

    def make(*args: Any) -> Any:
        made.append(make_controller(*args))
        return made[-1]

    yield make
    for controller in made:
        controller.detach_storage_backend()
