"""The engine's Llama computes what transformers computes from the same weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from sim.models import tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kvist.engine.models.base import Chunk
from kvist.engine.models.files import model_path
from kvist.engine.models.llama import LlamaModel
from kvist.engine.tokenizer import load_tokenizer
from kvist.engine.weights import LoadedModel, load_model
from kvist.tiers.hbm import PagePool

BLOCK_TOKENS = 64
NEW_TOKENS = 64
LOGITS_TOLERANCE = 1e-3
STORY = (
    "The harbour was quiet when the last boat came in. Nobody on the pier had expected it, and "
    "the old woman who kept the light put down her book and went to the window. "
)
CODE = "def merge(left, right):\n    out = []\n    while left and right:\n        out.append(\n"
PROMPTS = [
    "Hello",
    "The capital of France is",
    "1, 2, 3, 5, 8, 13,",
    "Once upon a time",
    "import numpy as np\n\n",
    "Water boils at",
    "<|im_start|>user\nWhat is a twig?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?"
    "<|im_end|>\n<|im_start|>assistant\n",
    "Übermäßig naïve café 北京 🎉",
    '{"name": "kvist", "tags": ["cache", "kv',
    "To be, or not to be, that is",
    "E = mc^2 means that",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: How many legs has a spider?\nA:",
    "SELECT name, count(*) FROM users",
    "A B C D E F G",
    STORY,
    STORY * 4,
    CODE * 6,
    STORY * 9 + "In one sentence, this story is about",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("demo", "float32")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer("demo")
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def theirs(loaded: LoadedModel) -> LlamaForCausalLM:
    config = loaded.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_model_len,
            rms_norm_eps=config.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    head = {"lm_head.weight": loaded.tensors["model.embed_tokens.weight"]}
    model.load_state_dict({**loaded.tensors, **head})
    return model.eval()


@torch.inference_mode()
def their_logits(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def greedy(
    model: LlamaModel, loaded: LoadedModel, prompts: list[list[int]], count: int
) -> list[list[int]]:
    """Continue all prompts together, each prefilled alone."""
    room = max(len(prompt) for prompt in prompts) + count
    each = -(-room // BLOCK_TOKENS)
    pool = PagePool(loaded.block_format(BLOCK_TOKENS, loaded.dtype), each * len(prompts)).tensor
    tables = [range(each * i, each * (i + 1)) for i in range(len(prompts))]
    outputs = [
        model.forward([Chunk(prompt, 0, table, True)], pool).argmax(-1).tolist()
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    for done in range(1, count):
        chunks = [
            Chunk(output[-1:], len(prompt) + done - 1, table, True)
            for prompt, output, table in zip(prompts, outputs, tables, strict=True)
        ]
        for output, token in zip(outputs, model.forward(chunks, pool).argmax(-1), strict=True):
            output.append(int(token))
    return outputs


@pytest.mark.model
def test_dequantized_weights_are_those_that_transformers_loads(loaded: LoadedModel) -> None:
    path = model_path("demo")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    state = theirs.state_dict()
    assert set(state) - {"lm_head.weight"} == set(loaded.tensors)
    for name, tensor in loaded.tensors.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.model
def test_logits_differ_by_less_than_a_thousandth(
    loaded: LoadedModel, theirs: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    model = LlamaModel(loaded)
    pool = PagePool(loaded.block_format(BLOCK_TOKENS, loaded.dtype), 16).tensor
    for prompt in prompts:
        expected = their_logits(theirs, prompt)
        bounds = sorted({0, len(prompt) // 3, len(prompt) // 2, len(prompt)})
        for first, last in pairwise(bounds):
            chunk = Chunk(prompt[first:last], first, range(16), True)
            difference = model.forward([chunk], pool)[0] - expected[last - 1]
            assert difference.abs().max() < LOGITS_TOLERANCE


@pytest.mark.model
def test_greedy_outputs_of_64_tokens_are_equal(
    loaded: LoadedModel, theirs: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    outputs = greedy(LlamaModel(loaded), loaded, prompts, NEW_TOKENS)
    for prompt, output in zip(prompts, outputs, strict=True):
        # If each token is the likeliest after those before it, greedy search finds the same.
        logits = their_logits(theirs, prompt + output[:-1])
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == output


@pytest.mark.model
def test_generate_of_transformers_gives_the_same_text(
    loaded: LoadedModel, theirs: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    chosen = [prompts[1], prompts[6]]
    outputs = greedy(LlamaModel(loaded), loaded, chosen, NEW_TOKENS)
    for prompt, output in zip(chosen, outputs, strict=True):
        ids = torch.tensor([prompt])
        full = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert full[0, len(prompt) :].tolist() == output


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ],
    ids=lambda scaling: str(scaling["rope_type"]),
)
def test_a_folder_with_any_supported_rope_loads_and_computes_as_transformers_does(
    tmp_path: Path, scaling: dict[str, object]
) -> None:
    tiny_llama(tmp_path / "base", tied=False)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base.config.rope_parameters = {"rope_theta": 10000.0, **scaling}
    base.save_pretrained(tmp_path / "saved")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    loaded = load_model(tmp_path / "saved", "float32")
    prompt = [number * 7 % loaded.config.vocab for number in range(300)]
    pool = PagePool(loaded.block_format(BLOCK_TOKENS, loaded.dtype), 5).tensor
    logits = LlamaModel(loaded).forward([Chunk(prompt, 0, range(5), True)], pool)[0]
    assert (logits - their_logits(theirs, prompt)[-1]).abs().max() < LOGITS_TOLERANCE
