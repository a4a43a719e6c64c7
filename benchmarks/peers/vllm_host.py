"""One vLLM engine as a process that takes commands as lines of JSON; no part of Kvist in it.

    {"do": "generate", "prompts": [[ids]], "max_tokens": 8, "at_once": false, "salt": null,
     "lora": null}
        -> {"tokens": [[ids]], "cached": [tokens], "seconds": [s]}
    {"do": "abort", "prompts": [[ids]], "steps": 3}     -> {"left": requests}  begin, step, give up
    {"do": "reset", "connector": false}      -> {"done": bool}     forget vLLM's own cache
    {"do": "metrics"}                        -> {"metrics": {name: value}}

Answers go to standard output, one line each; {"ready": seconds} is the first. vLLM's log goes to
standard error. Run it with the Python that has vLLM: vllm_host.py MODEL [--transfer JSON] ...
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

os.environ.update(
    VLLM_LOGGING_STREAM="ext://sys.stderr", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
)


class Host:
    """The engine and what it is asked to do."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from vllm import LLM

        self._adapters: dict[str, int] = {}
        transfer = json.loads(arguments.transfer) if arguments.transfer else None
        self._llm = LLM(
            model=arguments.model,
            enforce_eager=True,
            max_model_len=arguments.max_model_len,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            max_num_seqs=16,
            enable_chunked_prefill=True,
            # Of its own accord vLLM's CPU build takes what the process has left of a share.
            kv_cache_memory_bytes=arguments.kv_bytes,
            num_gpu_blocks_override=arguments.blocks,
            enable_prefix_caching=not arguments.no_prefix_caching,
            kv_transfer_config=transfer,
            tensor_parallel_size=arguments.tensor_parallel_size,
            skip_tokenizer_init=arguments.no_tokenizer,
            **({"enable_lora": True, "max_loras": 2} if arguments.lora else {}),
            disable_log_stats=False,
        )

    def generate(self, command: dict[str, Any]) -> dict[str, Any]:
        """Greedy answers, one request after the other or all at once."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=command["max_tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [
            {"prompt_token_ids": one, **({"cache_salt": salt} if salt else {})}
            for one in command["prompts"]
            for salt in [command.get("salt")]
        ]
        lora = self._adapter(command.get("lora"))
        groups = [prompts] if command.get("at_once") else [[one] for one in prompts]
        reply: dict[str, list[Any]] = {"tokens": [], "cached": [], "seconds": []}
        for group in groups:
            started = time.perf_counter()
            outputs = self._llm.generate(group, params, use_tqdm=False, lora_request=lora)
            reply["seconds"].append(time.perf_counter() - started)
            reply["tokens"] += [list(output.outputs[0].token_ids) for output in outputs]
            reply["cached"] += [output.num_cached_tokens for output in outputs]
        return reply

    def _adapter(self, path: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        if path is None:
            return None
        number = self._adapters.setdefault(path, len(self._adapters) + 1)
        return LoRARequest(path.rsplit("/", 1)[-1], number, path)

    def abort(self, command: dict[str, Any]) -> dict[str, Any]:
        """Begin requests, let the engine make some steps, give all of them up."""
        from vllm import SamplingParams

        engine, params = self._llm.llm_engine, SamplingParams(temperature=0.0, max_tokens=64)
        names = [f"aborted-{number}" for number in range(len(command["prompts"]))]
        for name, ids in zip(names, command["prompts"], strict=True):
            engine.add_request(name, {"prompt_token_ids": ids}, params)
        for _ in range(command["steps"]):
            engine.step()
        engine.abort_request(names)
        return {"left": engine.get_num_unfinished_requests()}

    def reset(self, command: dict[str, Any]) -> dict[str, Any]:
        """Forget what vLLM itself has cached; with connector, what it may take from outside."""
        return {"done": self._llm.reset_prefix_cache(reset_connector=bool(command["connector"]))}

    def metrics(self, command: dict[str, Any]) -> dict[str, Any]:
        """Counters and gauges whose name begins with a prefix, labels in the name."""
        from prometheus_client import REGISTRY

        found = {}
        for (
            metric
        ) in REGISTRY.collect():  # LLM.get_metrics() cuts a counter's seconds to whole ones
            ending = {"counter": "_total", "gauge": ""}.get(metric.type)
            for sample in metric.samples:
                if ending is None or sample.name != metric.name + ending:
                    continue
                if metric.name.startswith(command.get("prefix", "vllm:")):
                    labels = {
                        k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")
                    }
                    found[metric.name + (json.dumps(labels) if labels else "")] = sample.value
        return {"metrics": found}


def main() -> None:
    """Take commands until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--transfer", default="", help="kv_transfer_config as JSON")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--kv-bytes", type=int, default=1 << 30, help="KV memory")
    parser.add_argument("--blocks", type=int, default=None, help="KV blocks, instead of by memory")
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--no-tokenizer", action="store_true", help="the model has none")
    parser.add_argument("--lora", action="store_true", help="adapters may be asked for")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    started = time.perf_counter()
    host = Host(arguments)
    print(json.dumps({"ready": time.perf_counter() - started}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        reply = getattr(host, command["do"])(command)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
