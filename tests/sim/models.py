"""A tiny random Llama on disk, in Hugging Face's layout, for tests that need any model at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "the and that with this from have are was for you not but can all one two there which "
    "block cache token page memory system user assistant hello world"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 2, 4, 2, 16, 128
HIDDEN = HEADS * HEAD_DIM
MAX_MODEL_LEN = 2048


def tiny_llama(path: Path, seed: int = 0, tied: bool = True, head_dim: int = HEAD_DIM) -> Path:
    """Write a model of 2 layers, a tokenizer and a chat template to a folder.

    Weights are random but large enough that greedy outputs vary; the same seed writes the same
    bytes. The model computes with 4 heads of 16, 2 KV heads, at most 2048 positions.

    Args:
        path: folder, made if it is not there.
        seed: of the weights.
        tied: whether the output projection is the embedding.
        head_dim: elements of a head; the kernels of kernels/cpu want 32 or more.

    Returns:
        The folder.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    save_file(tiny_tensors(vocab, seed, tied, head_dim), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(tiny_config(vocab, tied, head_dim), indent=1))
    names = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2], "unk_token": SPECIALS[0]}
    extra = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings = {**names, **extra, "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return path


def tiny_config(vocab: int, tied: bool, head_dim: int = HEAD_DIM) -> dict[str, object]:
    """The fields of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": HEADS * head_dim,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tiny_tensors(
    vocab: int, seed: int, tied: bool, head_dim: int = HEAD_DIM
) -> dict[str, torch.Tensor]:
    """Random float32 weights by name; the variance of activations is kept about 1."""
    hidden = HEADS * head_dim
    generator = torch.Generator().manual_seed(seed)

    def weight(outputs: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator).mul_(gain * math.sqrt(1 / inputs))

    tensors = {"model.embed_tokens.weight": weight(vocab, hidden, gain=4.0)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        keys = KV_HEADS * head_dim
        tensors |= {
            prefix + "input_layernorm.weight": 1 + 0.1 * torch.randn(hidden, generator=generator),
            prefix + "self_attn.q_proj.weight": weight(hidden, hidden, gain=2.0),
            prefix + "self_attn.k_proj.weight": weight(keys, hidden, gain=2.0),
            prefix + "self_attn.v_proj.weight": weight(keys, hidden),
            prefix + "self_attn.o_proj.weight": weight(hidden, hidden),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden),
            prefix + "mlp.gate_proj.weight": weight(INTERMEDIATE, hidden),
            prefix + "mlp.up_proj.weight": weight(INTERMEDIATE, hidden),
            prefix + "mlp.down_proj.weight": weight(hidden, INTERMEDIATE),
        }
    tensors["model.norm.weight"] = torch.ones(hidden)
    if not tied:
        tensors["lm_head.weight"] = weight(vocab, hidden)
    return tensors


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE over 256 bytes and the beginnings of some English words."""
    vocab = {token: number for number, token in enumerate(SPECIALS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        left = "Ġ"
        for letter in word:
            if left + letter not in vocab:
                merges.append((left, letter))
                vocab[left + letter] = len(vocab)
            left += letter
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return tokenizer
