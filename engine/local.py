"""A sidecar and engines on this machine, as child processes: for the demo, benchmarks and tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 120.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.02
BIN = Path(sys.executable).parent


def free_port() -> int:
    """A TCP port on the loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalProcess:
    """A child process with a log file and a URL that answers when it is ready.

    Attributes:
        url: base URL of its HTTP port.
        log: where its output goes.
    """

    def __init__(self, command: Sequence[str], url: str, health: str, log: Path) -> None:
        self._command = list(command)
        self._health = url + health
        self._child: subprocess.Popen[bytes] | None = None
        self.url = url
        self.log = log

    @property
    def pid(self) -> int:
        """Process id while it runs."""
        assert self._child is not None, "not started"
        return self._child.pid

    @property
    def running(self) -> bool:
        """Started and not ended."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start it; do not wait.

        Raises:
            OSError: the program cannot be started.
        """
        assert not self.running, "already started"
        with self.log.open("ab") as log:
            # PYTHONSAFEPATH: from a checkout's root the folders' bare names would be importable.
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = START_SECONDS) -> None:
        """Wait until the health URL answers 200.

        Raises:
            RuntimeError: it ended, or did not answer in time; the message has its last lines.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.running:
                raise RuntimeError(f"{self._command[0]} ended at its start:\n{self.tail()}")
            try:
                if httpx.get(self._health, timeout=2.0).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(POLL_SECONDS)
        raise RuntimeError(
            f"{self._command[0]} is not ready after {timeout_s:.0f} s:\n{self.tail()}"
        )

    def tail(self, lines: int = 15) -> str:
        """The last lines of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> int:
        """End it with SIGTERM, with SIGKILL if it does not go; return its exit code."""
        assert self._child is not None, "not started"
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._child.kill()
        return self._child.wait()

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        assert self._child is not None, "not started"
        self._child.kill()
        self._child.wait()


class LocalSidecar(LocalProcess):
    """One kvistd with its socket, shared memory and flash under a folder.

    Args:
        folder: its own; flash/ in it survives restarts.
        settings: further settings as kvistd's environment names them without KVIST_, for
            example {"dram_bytes": "256MiB"}.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.socket = folder / "kvistd.sock"
        port = free_port()
        named = {
            "socket": str(self.socket),
            "http_listen": f"127.0.0.1:{port}",
            "run_dir": str(folder / "run"),
            "flash_path": str(folder / "flash"),
            **settings,
        }
        flags = [
            part for key, value in named.items() for part in (f"--{key.replace('_', '-')}", value)
        ]
        super().__init__(
            [str(BIN / "kvistd"), *flags],
            f"http://127.0.0.1:{port}",
            "/healthz",
            folder / "kvistd.log",
        )

    def stats(self) -> dict[str, Any]:
        """What /stats.json says now."""
        answer = httpx.get(f"{self.url}/stats.json", timeout=5.0)
        answer.raise_for_status()
        stats: dict[str, Any] = answer.json()
        return stats


class LocalEngine(LocalProcess):
    """One `kvist serve` on a port of its own.

    Args:
        model: as `kvist serve` takes it.
        log: file for its output.
        flags: further flags of `kvist serve`.
    """

    def __init__(self, model: str, log: Path, flags: Sequence[str]) -> None:
        port = free_port()
        command = [str(BIN / "kvist"), "serve", model, "--port", str(port), *flags]
        super().__init__(command, f"http://127.0.0.1:{port}", "/health", log)


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer, as its client saw it.

    Attributes:
        text: what was generated.
        ttft_s: seconds from sending the request to the first streamed choice.
        total_s: seconds to the end of the stream.
        prompt_tokens: as usage says.
        completion_tokens: as usage says.
        cached: tier -> prompt tokens that were not computed.
    """

    text: str
    ttft_s: float
    total_s: float
    prompt_tokens: int
    completion_tokens: int
    cached: dict[str, int]

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens from any tier."""
        return sum(self.cached.values())


def ask(
    url: str,
    body: Mapping[str, Any],
    on_text: Callable[[str], None] | None = None,
    timeout_s: float = 300.0,
) -> Answer:
    """Send a chat (body has "messages") or a completion, streamed, and take its measure.

    Raises:
        RuntimeError: the server answered with an error; the message is the server's.
        httpx.HTTPError: the server does not answer.
    """
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
    pieces: list[str] = []
    first: float | None = None
    usage: dict[str, Any] = {}
    with httpx.Client(timeout=timeout_s) as client:  # 40 ms, most of it TLS that nobody uses
        started = time.perf_counter()
        answer = client.send(client.build_request("POST", url + path, json=sent), stream=True)
        if answer.status_code != httpx.codes.OK:
            raise RuntimeError(f"{answer.status_code}: {answer.read().decode(errors='replace')}")
        for event in _events(answer):
            for choice in event.get("choices", ()):
                piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                if first is None and (piece or choice.get("finish_reason")):
                    first = time.perf_counter() - started
                pieces.append(piece)
                if piece and on_text is not None:
                    on_text(piece)
            usage = event.get("usage") or usage
    total = time.perf_counter() - started
    by_tier = usage["prompt_tokens_details"]["cached_tokens_by_tier"]
    return Answer(
        "".join(pieces),
        total if first is None else first,
        total,
        usage["prompt_tokens"],
        usage["completion_tokens"],
        dict(by_tier),
    )


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
        yield event
