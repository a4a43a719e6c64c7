"""A real SGLang engine in a process of its own, on a CPU, asked line by line; needs SGLang.

    python -m sim.sglang_engine MODEL SIDECAR_SOCKET

Its parts that need a GPU are stood in for by sim.sglang_cpu, in each process that it starts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PAGE = 16
MARK = "ANSWER "
START_S = 240.0
FLUSH_S = 30.0


def serve(model: str, socket: str) -> None:
    """Answer questions from stdin until it ends."""
    import sglang

    extra = {
        "backend_name": "kvist", "module_path": "kvist.engine.plugins.sglang",
        "class_name": "KvistStorage", "interface_v1": 1, "kvist.cache": socket,
        "hicache_storage_pass_prefix_keys": True, "prefetch_threshold": PAGE,
    }  # fmt: skip
    engine = sglang.Engine(
        model_path=model, device="cpu", attention_backend="torch_native", page_size=PAGE,
        max_total_tokens=4096, mem_fraction_static=0.6, disable_overlap_schedule=True,
        sampling_backend="pytorch", grammar_backend="none", skip_server_warmup=True,
        skip_tokenizer_init=True, log_level="warning", enable_hierarchical_cache=True,
        hicache_mem_layout="page_first_direct", hicache_io_backend="direct", hicache_ratio=1.2,
        hicache_storage_backend="dynamic", hicache_storage_prefetch_policy="wait_complete",
        hicache_storage_backend_extra_config=json.dumps(extra),
    )  # fmt: skip
    print(MARK + "{}", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any] = {}
        if question["ask"] == "flush":
            answer["flushed"] = bool(engine.flush_cache().success)
        else:
            wanted = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
            out = engine.generate(input_ids=question["prompt"], sampling_params=wanted)
            details = out["meta_info"].get("cached_tokens_details") or {}
            answer = {"tokens": out["output_ids"], "storage": details.get("storage", 0)}
            answer["cached"] = out["meta_info"]["cached_tokens"]
        print(MARK + json.dumps(answer), flush=True)
    engine.shutdown()


class SglangProcess:
    """The other side of serve.

    Args:
        model: folder. socket: of the sidecar. log: file for what it says besides.
    """

    def __init__(self, model: Path, socket: Path, log: Path) -> None:
        tests = str(Path(__file__).parent.parent)
        with log.open("wb") as opened:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sim.sglang_engine", str(model), str(socket)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=opened, text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "2"},
            )  # fmt: skip
        self._log = log
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ended = time.monotonic() + START_S
        for line in self._process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line[len(MARK) :])
                return found
            assert time.monotonic() < ended
        raise AssertionError(self._log.read_text()[-4000:])

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def generate(self, prompt: list[int]) -> dict[str, Any]:
        """Eight greedy tokens; cached says how many tokens were, storage how many by Kvist."""
        return self._ask(ask="generate", prompt=prompt)

    def flush(self) -> None:
        """Empty SGLang's own caches, on the device and on the host; refused while it is busy."""
        ended = time.monotonic() + FLUSH_S
        while not self._ask(ask="flush")["flushed"]:
            assert time.monotonic() < ended, "SGLang does not flush its caches"
            time.sleep(0.2)

    def close(self) -> None:
        """End it and all that it started."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20.0)


# SGLang's scheduler is spawned and so imports this file under another name.
if __name__ in ("__main__", "__mp_main__"):
    from sim import sglang_cpu

    sglang_cpu.declare_vision()
    sglang_cpu.stand_in()
    if __name__ == "__main__":
        serve(sys.argv[1], sys.argv[2])
