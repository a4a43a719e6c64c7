"""64 workers in 4 processes at one sidecar: all are served, and the dead ones leave nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sim.sidecar import Prompt, Sidecar, wait_until

from kvist.proto import cache_pb2
from kvist.proto.cache_pb2_grpc import CacheStub

HERE = Path(__file__).resolve().parent
PROCESSES = 4
WORKERS = 16
BLOCKS = 8
HELD = 3
SHARED_SEED = 7

# A process with 16 workers. Each stores a prompt of its own and one that all share, loads both,
# and then holds three slots until the process ends.
PROCESS = f"""
import sys, threading
sys.path.insert(0, sys.argv[1])
from sim.sidecar import QUIET, Prompt, load_all, namespace
from kvist.cachesvc.client import open_cache
from kvist.proto import cache_pb2

first = int(sys.argv[3])
clients = [open_cache(sys.argv[2], namespace(), f"w{{first + n}}", QUIET) for n in range({WORKERS})]
stored = []

def work(number, client):
    assert client.wait_attached(30)
    own, shared = Prompt(1000 + number, {BLOCKS}), Prompt({SHARED_SEED}, {BLOCKS})
    result = client.store(own.items)
    assert result.stored == {BLOCKS}, result
    assert load_all(client, own) == [None] * {BLOCKS}
    stored.append(client.store(shared.items).stored)
    held = Prompt(5000 + number, {HELD})
    names = [cache_pb2.BlockName(key=item.key, parent=item.parent) for item in held.items]
    session = client._life.session
    reply = client._control.reserve(cache_pb2.ReserveRequest(session=session, blocks=names))
    assert [one.outcome for one in reply.reservations] == [1] * {HELD}

threads = [threading.Thread(target=work, args=(first + n, c)) for n, c in enumerate(clients)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
shared = Prompt({SHARED_SEED}, {BLOCKS})
print(len(stored), sum(stored), flush=True)
sys.stdin.readline()
assert load_all(clients[0], shared) == [None] * {BLOCKS}
for client in clients:
    client.close()
"""


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path, ["--dram-bytes", "16MiB"])
    made.start()
    yield made
    made.close()


def test_64_workers_are_served_at_once_and_the_killed_ones_leave_nothing(sidecar: Sidecar) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(start(sidecar, number)) for number in range(PROCESSES)]
        said = [process.stdout.readline().split() for process in processes if process.stdout]
        assert [int(line[0]) for line in said] == [WORKERS] * PROCESSES
        # What all of them stored at once is there once.
        assert sum(int(line[1]) for line in said) == BLOCKS
        now = stats(sidecar)
        assert (now.sessions, now.reserved_slots) == (64, 64 * HELD)
        assert now.blocks == 64 * BLOCKS + BLOCKS

        for process in processes[:2]:
            process.send_signal(signal.SIGKILL)
            process.wait(10.0)
        wait_until(lambda: stats(sidecar).sessions == 32, "the dead to be gone")
        assert stats(sidecar).reserved_slots == 32 * HELD
        client = sidecar.client()
        assert client.store(Prompt(5000, HELD).items).stored == HELD, "a dead one had reserved them"

        for process in processes[2:]:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.wait(20.0) == 0
        wait_until(lambda: stats(sidecar).sessions == 1, "the others to leave")
        assert stats(sidecar).reserved_slots == 0
        assert stats(sidecar).blocks == 64 * BLOCKS + BLOCKS + HELD


def start(sidecar: Sidecar, number: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", PROCESS, str(HERE), sidecar.address]
    return subprocess.Popen(
        [*command, str(number * WORKERS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=sidecar.folder,
    )


def stats(sidecar: Sidecar) -> cache_pb2.StatsReply:
    with sidecar.channel() as channel:
        return CacheStub(channel).Stats(cache_pb2.StatsRequest(), timeout=5.0)
