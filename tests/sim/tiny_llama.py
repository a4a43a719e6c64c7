"""A random Llama of two KV heads, for what SmolLM2 with its three cannot show. Needs transformers
and safetensors, which come with vLLM."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512
HIDDEN = 256
LAYERS = 2


def make_tiny_llama(folder: Path) -> Path:
    """Write configuration and weights (3 MB); there is no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=512,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(folder))
    return folder


def make_tiny_adapter(folder: Path, seed: int) -> Path:
    """Write a LoRA adapter of the tiny Llama's query and value projections, strong enough to
    change its words."""
    import json

    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, out in (("q_proj", HIDDEN), ("v_proj", HIDDEN // 2)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(8, HIDDEN, generator=draw)
            weights[f"{place}.lora_B.weight"] = torch.randn(out, 8, generator=draw)
    save_file(weights, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "none",
                "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"],
            }
        )
    )  # fmt: skip
    return folder
