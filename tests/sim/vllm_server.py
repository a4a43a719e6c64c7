"""vLLM's own OpenAI server as a process, for tests that run with vLLM's Python."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from sim.vllm_process import transfer_config

KV_BYTES = 256 << 20


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class VllmServer:
    """vllm.entrypoints.openai.api_server, serving a model as "model".

    Args:
        model: folder of the model. socket: of the sidecar.
        log: file that takes what it says.
        flags: further flags.
    """

    def __init__(self, model: Path, socket: Path, log: Path, *flags: str) -> None:
        self.page = f"http://127.0.0.1:{free_port()}"
        self._log = log
        own = ["--model", str(model), "--served-model-name", "model", "--enforce-eager"]
        own += ["--host", "127.0.0.1", "--port", self.page.rsplit(":", 1)[1]]
        own += ["--kv-cache-memory-bytes", str(KV_BYTES), "--max-model-len", "2048"]
        own += ["--kv-transfer-config", json.dumps(transfer_config(socket))]
        environment = {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1", "PYTHONSAFEPATH": "1",
        }  # fmt: skip
        with log.open("ab") as opened:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *own, *flags],
                stdin=subprocess.DEVNULL, stdout=opened, stderr=opened, cwd=log.parent,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_ready(time.monotonic() + 300.0)
        except BaseException:
            self.close()
            raise

    def _wait_ready(self, until: float) -> None:
        while True:
            try:
                self.get("/health")
                return
            except (OSError, urllib.error.URLError):
                assert self._process.poll() is None, self._log.read_text()[-6000:]
                assert time.monotonic() < until, self._log.read_text()[-6000:]
                time.sleep(0.5)

    def get(self, path: str) -> str:
        """A page."""
        with urllib.request.urlopen(self.page + path, timeout=120.0) as answer:
            text: str = answer.read().decode()
        return text

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a call answers, {} when it says nothing."""
        request = urllib.request.Request(
            self.page + path,
            json.dumps(body or {}).encode(),
            {"content-type": "application/json"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=600.0) as answer:
            said = answer.read()
        reply: dict[str, Any] = json.loads(said) if said else {}
        return reply

    def complete(self, prompt: list[int], **fields: object) -> dict[str, Any]:
        """A greedy completion of token ids, 4 tokens if not said otherwise."""
        asked = {"model": "model", "prompt": prompt, "max_tokens": 4, "temperature": 0}
        return self.post("/v1/completions", {**asked, "return_token_ids": True, **fields})

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics with these labels among its own; 0 when there is none."""
        for line in self.get("/metrics").splitlines():
            head, _, value = line.rpartition(" ")
            own, _, rest = head.partition("{")
            if own == name and all(f'{key}="{text}"' in rest for key, text in labels.items()):
                return float(value)
        return 0.0

    def close(self) -> None:
        """End it as its owner would."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(60.0)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(20.0)
