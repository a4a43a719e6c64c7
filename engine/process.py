"""The engine core as a process: how its parent starts, watches and stops it, and its first lines.

`python -m kvist.engine.process ENDPOINT PARENT_PID` reads an EngineConfig as JSON from standard
input (a command line would show the API key to every user of the machine) and runs the core.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import NoReturn

import msgspec

from kvist.engine.config import EngineConfig
from kvist.engine.ipc import ApiLink
from kvist.engine.request import Fatal
from kvist.proto.errors import KvistError

CORE_COMMAND = (sys.executable, "-P", "-m", "kvist.engine.process")
# With the default of libgomp a barrier spins for a scheduler slice (8 ms) whenever anything else
# wants the core: a decode step on 2 threads took 546 ms beside one busy process, 50 ms with short
# spins. 10,000 rounds are about 20 us, enough to catch a barrier that is about to open.
SPIN_ROUNDS = "10000"
STOP_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def core_environment(config: EngineConfig, base: Mapping[str, str]) -> dict[str, str]:
    """The core's environment: OpenMP must know its threads before torch is imported."""
    environment = dict(base)
    environment["OMP_NUM_THREADS"] = str(config.threads)
    environment.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)
    return environment


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, whatever ends it.

    Raises:
        SystemExit: the parent has already gone.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise SystemExit("the parent process ended before its core had started")


class CoreProcess:
    """The engine core, seen from the API process.

    Args:
        command: program and first arguments; the endpoint and this process's id are appended.
    """

    def __init__(self, command: Sequence[str] = CORE_COMMAND) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, config: EngineConfig, endpoint: str) -> None:
        """Start it. Must be called on the main thread: a child dies with the thread that made it.

        Raises:
            OSError: the program cannot be started.
        """
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            endpoint,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            env=core_environment(config, os.environ),
            # Ctrl-C in a terminal goes to the whole group; when to stop the core is for us to say.
            start_new_session=True,
        )
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(ConnectionError):  # wait() tells why it died so early
            pipe.write(msgspec.json.encode(config))
            await pipe.drain()
        pipe.close()

    async def wait(self) -> str:
        """Wait until it has ended, and say how in words."""
        assert self._process is not None
        code = await self._process.wait()
        if code >= 0:
            return f"the engine core ended with exit code {code}"
        hint = "; the system may be out of memory" if code == -signal.SIGKILL else ""
        return f"the engine core was ended by signal {signal.Signals(-code).name}{hint}"

    async def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL after STOP_SECONDS. A core that has ended is ignored."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def run_as_core(
    arguments: Sequence[str],
    stdin: bytes,
    core: Callable[[EngineConfig, str], None],
) -> int:
    """The core process's main: tie its life to the parent's, run, report what ended it.

    Args:
        arguments: endpoint and the parent's process id.
        stdin: the EngineConfig as JSON.
        core: runs until it is told to stop by SystemExit.

    Returns:
        exit code: 0 after SIGTERM, 1 after an error (which the parent was told as Fatal).
    """
    endpoint, parent_pid = arguments
    die_with_parent(int(parent_pid))
    signal.signal(signal.SIGTERM, _leave)
    try:
        core(msgspec.json.decode(stdin, type=EngineConfig), endpoint)
    except Exception as error:
        # It is ending already: a SIGTERM that the message brings would break into torch's exit.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        link = ApiLink(endpoint)
        # Of these the message is enough; others are bugs and leave a trace.
        known = isinstance(error, KvistError | OSError)
        text = str(error) or "no message"
        link.send(Fatal(text if known else f"{type(error).__name__}: {text}"))
        link.close()
        if not known:
            raise
        return 1
    return 0


def _leave(_signum: int, _frame: FrameType | None) -> NoReturn:
    # An exception, so that the core's own `finally` blocks give back files and shared memory.
    raise SystemExit(0)


def main() -> int:
    """Run the real core; torch is imported here, after the environment is set, never before."""
    from kvist.engine.core import run_core

    return run_as_core(sys.argv[1:], sys.stdin.buffer.read(), run_core)


if __name__ == "__main__":
    sys.exit(main())
