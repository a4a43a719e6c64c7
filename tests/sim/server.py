"""`kvist serve` with the scripted core, as a child process with a log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx

from kvist.engine.local import LocalProcess, free_port
from sim.core import SIM_COMMAND

START_SECONDS = 60.0


class SimServer(LocalProcess):
    """Real HTTP, real processes, real wire; only the core's tokens are made up.

    Args:
        model: folder with a tokenizer.
        log: file for its output.
        flags: of `kvist serve`.
    """

    def __init__(self, model: Path, log: Path, flags: Sequence[str] = ()) -> None:
        port = free_port()
        command = [*SIM_COMMAND, "serve", str(model), "--port", str(port), *flags]
        super().__init__(command, f"http://127.0.0.1:{port}", "/health", log)

    @property
    def core_pid(self) -> int:
        """Process id of the core."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])


def metric(url: str, name: str) -> float:
    """Sum of the samples of that name at a server's /metrics, whatever their labels."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    found = [
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith((f"{name} ", f"{name}{{"))
    ]
    assert found, f"no metric {name}"
    return sum(found)
