"""A vLLM engine in a process of its own, for tests that run with vLLM's Python."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sim.sidecar import Sidecar

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "benchmarks" / "peers" / "vllm_host.py"
Prompt = list[int]

ONE_BLOCK_STEPS = ("--max-num-batched-tokens", "128")
"""Flags for steps that end where blocks end, whatever is cached."""


def transfer_config(socket: Path) -> dict[str, Any]:
    """The one flag."""
    return {
        "kv_connector": "KvistConnector",
        "kv_connector_module_path": "kvist.engine.plugins.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvist.cache": str(socket)},
    }


def draw_prompts(count: int, seed: int) -> list[Prompt]:
    """Random tokens of 20 to 1,500, the shorter ones more often; every third begins as the one
    before it."""
    draw = random.Random(seed)
    prompts: list[Prompt] = []
    for number in range(count):
        length = int(20 * 75 ** draw.random())
        prompt = [draw.randrange(100, 49000) for _ in range(length)]
        if number % 3 == 2:
            prompt = prompts[-1][: draw.randrange(len(prompts[-1])) + 1] + prompt
        prompts.append(prompt)
    return prompts


def usable_tokens(prompts: list[Prompt]) -> int:
    """Of full blocks of 128; the last token is always computed."""
    return sum((len(prompt) - 1) // 128 * 128 for prompt in prompts)


def sidecar_metric(sidecar: Sidecar, name: str) -> float:
    """One value of a sidecar's /metrics, labels in the name."""
    lines = [line for line in sidecar.get("/metrics").splitlines() if line.startswith(name + " ")]
    assert lines, name
    return float(lines[0].rsplit(" ", 1)[1])


def settled(sidecar: Sidecar, tier: str) -> None:
    """Wait until no more blocks arrive in a tier."""
    seen = -1.0
    while (now := sidecar_metric(sidecar, f'kvist_tier_used_slots{{tier="{tier}"}}')) != seen:
        seen = now
        time.sleep(1.0)


class VllmProcess:
    """See benchmarks/peers/vllm_host.py, whose commands the methods are.

    Args:
        model: folder of the model.
        socket: of the sidecar; None runs vLLM without a connector.
        log: file that takes what it says.
        split: vLLM's own process split, VLLM_ENABLE_V1_MULTIPROCESSING.
        flags: further flags of the host.
    """

    def __init__(
        self, model: Path, socket: Path | None, log: Path, split: bool = False, *flags: str
    ) -> None:
        transfer = "" if socket is None else json.dumps(transfer_config(socket))
        environment = {
            **os.environ,
            # Two threads wait for each other by spinning: beside other work, a second a step. And
            # left to itself vLLM takes one in one process and two with its split: other last bits.
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(split)),
            "PYTHONSAFEPATH": "1",
        }
        with log.open("ab") as opened:
            self.process = subprocess.Popen(
                [sys.executable, str(HOST), str(model), "--transfer", transfer, *flags],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=opened, text=True,
                env=environment, cwd=log.parent, start_new_session=True,
            )  # fmt: skip
        self._log = log
        self._lock = threading.Lock()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()[-6000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def send(self, do: str, **fields: object) -> None:
        """Begin a command; its answer is not waited for."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.process.stdin.flush()

    def ask(self, do: str, **fields: object) -> dict[str, Any]:
        """One command and its answer."""
        with self._lock:
            self.send(do, **fields)
            return self._answer()

    def answers(self, prompts: list[Prompt], tokens: int = 6, **fields: object) -> list[Prompt]:
        """Greedy answers."""
        reply = self.ask("generate", prompts=prompts, max_tokens=tokens, **fields)
        found: list[Prompt] = reply["tokens"]
        return found

    def count(self, name: str) -> float:
        """One of the plugin's counters, like hit_tokens{"tier": "dram"}."""
        metrics = self.ask("metrics", prefix="vllm:kvist_")["metrics"]
        return float(metrics.get(f"vllm:kvist_{name}", 0))

    def forget(self, connector: bool = False) -> bool:
        """vLLM's own cache is empty after it; with connector, Kvist's is not used any more."""
        return bool(self.ask("reset", connector=connector)["done"])

    def kill(self) -> None:
        """End it and what it started, as a crash would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20.0)
        self._let_go()

    def close(self) -> None:
        """End it as its owner would."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(60.0)
            self._let_go()

    def _let_go(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
