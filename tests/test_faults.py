"""Kill things and flip bytes under a running engine: misses with reasons, never a wrong token."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from sim.cluster import Cluster, attached, cluster, complete, metrics, settled, slots, wait_until
from sim.models import tiny_llama

from kvist.engine.local import LocalEngine, LocalSidecar


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, str(tiny_llama(tmp_path / "model"))) as made:
        yield made


def prompts(count: int, seed: int = 0, tokens: int = 400) -> list[list[int]]:
    """Prompts that share their first half."""
    draw = np.random.default_rng(seed)
    shared = draw.integers(5, 200, tokens // 2).tolist()
    return [shared + draw.integers(5, 200, tokens // 2).tolist() for _ in range(count)]


def references(engine: LocalEngine, asked: list[list[int]]) -> list[str]:
    return [complete(engine, ids, kv_cache="bypass").text for ids in asked]


def test_killing_the_sidecar_under_traffic_fails_no_request_and_engines_come_back(
    small: Cluster,
) -> None:
    sidecar = small.sidecar()
    engine = small.engine("a", str(sidecar.socket))
    asked = prompts(12)
    want = references(engine, asked)
    wrong: list[int] = []
    served = 0
    stop = threading.Event()

    def traffic(offset: int) -> None:
        nonlocal served
        number = offset
        while not stop.is_set():
            number = (number + 5) % len(asked)
            if complete(engine, asked[number]).text != want[number]:
                wrong.append(number)
            served += 1

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(traffic, offset) for offset in range(3)]
        took = []
        for _ in range(3):
            time.sleep(0.7)
            sidecar.kill()
            wait_until(lambda: not attached(engine), "the engine to notice", 5.0)
            time.sleep(0.3)
            sidecar.start()
            sidecar.wait_ready()
            took.append(wait_until(lambda: attached(engine), "the engine to attach", 5.0))
        stop.set()
        for done in running:
            done.result()

    assert served > 20
    assert wrong == []
    assert max(took) < 2.0, f"attached again after {took} s"
    assert metrics(engine)["kvist_engine_reattaches_total"] >= 3


def test_killing_an_engine_while_it_stores_gives_its_slots_back(small: Cluster) -> None:
    sidecar = small.sidecar()
    for life in range(3):
        engine = small.engine(f"life-{life}", str(sidecar.socket), "--block-size", "16")
        asked = prompts(40, seed=life, tokens=800)
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(complete, engine, ids, 4) for ids in asked]
            time.sleep(0.4)
            engine.kill()
            for done in running:
                done.exception()
        wait_until(
            lambda: sidecar.stats()["reserved_slots"] == 0 and sidecar.stats()["sessions"] == 0,
            "reserved slots to come back",
            2.0,
        )


def test_a_client_that_goes_away_frees_its_pages(small: Cluster) -> None:
    engine = small.engine("a", "off")
    body = {"model": "m", "prompt": prompts(1)[0], "max_tokens": 1500, "ignore_eos": True}
    with (
        httpx.Client() as client,
        client.stream("POST", f"{engine.url}/v1/completions", json={**body, "stream": True}) as it,
    ):
        lines = it.iter_lines()  # kept: when the generator goes, httpx hangs up
        next(lines)
        running = metrics(engine)
        assert running["vllm:num_requests_running"] == 1
        assert running["vllm:kv_cache_usage_perc"] > 0
    wait_until(lambda: metrics(engine)["vllm:kv_cache_usage_perc"] == 0, "pages to be free")
    assert metrics(engine)["vllm:num_requests_running"] == 0


class Stored:
    """A prompt whose blocks are on flash and in no engine's HBM."""

    def __init__(self, made: Cluster) -> None:
        self.made = made
        self.sidecar: LocalSidecar = made.sidecar()
        self.engine = made.engine("a", str(self.sidecar.socket))
        self.prompt = prompts(1)[0]
        self.want = complete(self.engine, self.prompt, kv_cache="bypass").text
        complete(self.engine, self.prompt)
        wait_until(lambda: settled(self.sidecar), "blocks to reach flash")

    def restart(self, between: str) -> None:
        """Restart both; call what `between` names in the moment when nothing runs."""
        self.engine.stop()
        self.sidecar.stop()
        getattr(self, between)()
        self.sidecar.start()
        self.sidecar.wait_ready()
        self.engine.start()
        self.made.ready(self.engine)

    def flip_in_every_segment_payload(self) -> None:
        """Flip one byte of every page-sized piece that holds a record's payload."""
        for path in (self.sidecar.socket.parent / "flash").rglob("*"):
            if path.is_file() and "segment" in path.name:
                data = np.memmap(path, dtype=np.uint8, mode="r+")
                used = np.flatnonzero(data.reshape(-1, 4096).any(axis=1))
                for page in used:
                    data[page * 4096 + 2048] ^= 0x40
                data.flush()

    def flip_in_lmdb(self) -> None:
        """Flip a byte in each 64 of every page of the index that is in use."""
        for path in (self.sidecar.socket.parent / "flash").rglob("index.mdb"):
            data = np.memmap(path, dtype=np.uint8, mode="r+")
            used = np.flatnonzero(data[8192:].astype(bool)) + 8192
            data[used[::64]] ^= 0x10
            data.flush()


def test_a_flipped_byte_on_flash_is_a_miss_with_a_reason(small: Cluster) -> None:
    stored = Stored(small)
    stored.restart("flip_in_every_segment_payload")
    answer = complete(stored.engine, stored.prompt)
    assert answer.text == stored.want
    assert answer.cached_tokens == 0
    assert metrics(stored.engine)["kvist_engine_missed_tokens_total{reason=corrupt}"] > 0
    wait_until(
        lambda: (
            sum(
                value
                for name, value in metrics(stored.sidecar).items()
                if name.startswith("kvist_corrupt_blocks_total") and "flash" in name
            )
            > 0
        ),
        "the sidecar to count it",
    )


def test_a_flipped_byte_in_the_flash_index_is_found_and_the_index_rebuilt(small: Cluster) -> None:
    stored = Stored(small)
    stored.restart("flip_in_lmdb")
    assert complete(stored.engine, stored.prompt).text == stored.want
    seen = metrics(stored.sidecar)
    assert sum(n for name, n in seen.items() if name.startswith("kvist_flash_rebuilds_total")) == 1
    wait_until(lambda: slots(stored.sidecar, "flash") > 0, "the index to be rebuilt")


def test_a_flipped_byte_in_a_dram_slot_is_a_miss_with_a_reason(small: Cluster) -> None:
    stored = Stored(small)
    b = small.engine("b", str(stored.sidecar.socket))
    arena = next(path for path in Path("/dev/shm").rglob("*arena*") if mapped_by(path, b))
    data = np.memmap(arena, dtype=np.uint8, mode="r+")
    used = np.flatnonzero(data.reshape(-1, 4096)[:, 256:].any(axis=1))
    for page in used:
        data[page * 4096 + 2048] ^= 0x40
    answer = complete(b, stored.prompt)
    assert answer.text == stored.want
    assert answer.cached["dram"] == 0
    assert metrics(b)["kvist_engine_missed_tokens_total{reason=corrupt}"] > 0


def mapped_by(path: Path, engine: LocalEngine) -> bool:
    """Whether the engine or one of its children has the file mapped."""
    children = Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text().split()
    return any(
        str(path) in Path(f"/proc/{pid}/maps").read_text() for pid in (str(engine.pid), *children)
    )
