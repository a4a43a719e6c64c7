"""A real kvistd for a test, and small blocks to put into it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import numpy as np

from kvist.cachesvc.client import CacheClient, StoreItem, open_cache
from kvist.cachesvc.log import Log
from kvist.proto.keys import NO_KEY, BlockKey, Namespace, block_keys
from kvist.proto.layout import BlockFormat
from kvist.proto.record import Bytes, Wanted

BLOCK_TOKENS = 16
KVISTD = Path(sys.executable).parent / "kvistd"
READY = " ready socket="
QUIET = Log(sys.stderr, "error")


def namespace(salt: str = "", layers: int = 2) -> Namespace:
    """Of blocks of a few KiB."""
    shape = BlockFormat(layers, 2, 16, "float32", BLOCK_TOKENS)
    return Namespace("tiny", shape, "theta=10000", "float32/test", salt=salt)


class Prompt:
    """A prompt's blocks with payloads that differ from block to block.

    Attributes:
        keys: one per block.
        items: to store.
        wanted: to load.
    """

    def __init__(self, seed: int, blocks: int, of: Namespace | None = None) -> None:
        of = of or namespace()
        draw = np.random.default_rng(seed)
        tokens = draw.integers(0, 50000, blocks * BLOCK_TOKENS).astype("<u4")
        digest = of.digest()
        self.keys = block_keys(digest, tokens, BLOCK_TOKENS)
        self.items: list[StoreItem] = []
        self.wanted: list[Wanted] = []
        parent = NO_KEY
        for depth, key in enumerate(self.keys):
            own = tokens[depth * BLOCK_TOKENS : (depth + 1) * BLOCK_TOKENS].tobytes()
            payload = draw.integers(0, 256, of.format.payload_bytes).astype(np.uint8)
            self.items.append(StoreItem(key, parent, digest, depth, own, payload))
            self.wanted.append(Wanted(key, digest, own, of.format.payload_bytes))
            parent = BlockKey(key)


def load_all(client: CacheClient, prompt: Prompt, wait_s: float = 2.0) -> list[str | None]:
    """Load every block; checks that what came is what was stored."""
    reasons: list[str | None] = []
    for item, wanted in zip(prompt.items, prompt.wanted, strict=True):
        out: Bytes = np.empty(wanted.payload_bytes, np.uint8)
        reasons.append(client.load(wanted, out, time.monotonic() + wait_s))
        assert reasons[-1] is not None or np.array_equal(out, item.payload)
    return reasons


def wait_until(ready: Callable[[], bool], what: str, timeout_s: float = 10.0) -> float:
    """Poll until ready; returns the seconds it took."""
    started = time.monotonic()
    while not ready():
        assert time.monotonic() - started < timeout_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)
    return time.monotonic() - started


class Sidecar:
    """A kvistd process with its folders under one folder.

    Args:
        folder: of this sidecar; flash/ in it survives restarts.
        flags: further flags.
        program: what to start instead of the kvistd script.
    """

    def __init__(
        self, folder: Path, flags: Sequence[str] = (), program: Sequence[str] = (str(KVISTD),)
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.socket = folder / "kvistd.sock"
        self.address = f"unix:{self.socket}"
        self.log = folder / "kvistd.log"
        own = ["--socket", str(self.socket), "--run-dir", str(folder / "run")]
        own += ["--shm-dir", str(folder / "shm"), "--http-listen", "127.0.0.1:0"]
        self._command = [*program, *own, "--dram-bytes", "8MiB", *flags]
        self.process: subprocess.Popen[bytes] | None = None
        self.clients: list[CacheClient] = []

    def start(self) -> None:
        """Start it and wait until it is ready."""
        said = len(self.text())
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVIST_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment, "PYTHONSAFEPATH": "1"},
            )

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.text()
            return READY in self.text()[said:]

        wait_until(ready, "kvistd to be ready", 30.0)

    def text(self) -> str:
        """What it logged so far, in all its lives."""
        return self.log.read_text() if self.log.exists() else ""

    def said(self, field: str) -> str:
        """A field of its last `ready` line."""
        line = next(line for line in reversed(self.text().splitlines()) if READY in line)
        return next(w.partition("=")[2] for w in line.split() if w.startswith(f"{field}="))

    def get(self, path: str) -> str:
        """Read a page of its HTTP server."""
        with urllib.request.urlopen(self.said("page") + path, timeout=5.0) as answer:
            text: str = answer.read().decode()
        return text

    def client(self, name: str = "test", of: Namespace | None = None) -> CacheClient:
        """An attached client, closed with the sidecar."""
        client = open_cache(self.address, of or namespace(), name, QUIET)
        self.clients.append(client)
        assert client.wait_attached(10.0)
        return client

    def channel(self, address: str | None = None) -> grpc.Channel:
        """A plain channel."""
        return grpc.insecure_channel(address or self.address)

    def kill(self) -> None:
        """End it as a crash would."""
        self._signal(signal.SIGKILL)

    def stop(self) -> int:
        """End it as an operator would; returns its exit code."""
        return self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20.0)

    def close(self) -> None:
        """End whatever runs."""
        for client in self.clients:
            client.close()
        if self.process is not None and self.process.poll() is None:
            self.stop()
