"""LMCache's objects in the cache without LMCache: a real sidecar, real threads, and keys that have
the fields of its ObjectKey (pinned in under_lmcache/)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim.sidecar import QUIET, Sidecar, wait_until

from kvist.cachesvc.client import open_cache
from kvist.engine.plugins.lmcache.objects import ObjectStore, Piece
from kvist.proto.record import Bytes

CHUNK = 16
BYTES = 4096
FLAGS = ["--slot-bytes", "16KiB"]


@dataclass(frozen=True)
class Key:
    """The fields of LMCache's ObjectKey that the plugin reads."""

    chunk_hash: bytes
    model_name: str = "m"
    kv_rank: int = 0x01000100
    object_group_id: int = 0
    cache_salt: str = ""


def keys(name: str, count: int) -> list[Key]:
    return [Key(hashlib.sha256(f"{name}/{at}".encode()).digest()) for at in range(count)]


def draw(seed: int, size: int = BYTES) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)


def pieces(names: list[Key], layout: str = "bf16(2, 16)", size: int = BYTES) -> list[Piece]:
    return [Piece(key, layout, draw(at, size)) for at, key in enumerate(names)]


def empty(like: list[Piece]) -> list[Piece]:
    return [replace(piece, data=np.zeros_like(piece.data)) for piece in like]


class Asked:
    """An ObjectStore whose answers are waited for."""

    def __init__(self, sidecar: Sidecar, words: str = "") -> None:
        def connect(namespace: Any) -> Any:
            client = open_cache(sidecar.address, namespace, "lmcache", QUIET)
            client.wait_attached(2.0)
            return client

        self.objects = ObjectStore(connect, words, CHUNK, QUIET)

    def _wait(self, begin: Callable[[Callable[..., None]], None]) -> Any:
        ended, answers = threading.Event(), []

        def done(*answer: Any) -> None:
            answers.append(answer)
            ended.set()

        begin(done)
        assert ended.wait(20.0)
        assert len(answers) == 1
        return answers[0]

    def store(self, some: list[Piece]) -> tuple[bool, int]:
        ok, new = self._wait(lambda done: self.objects.store(some, done))
        return ok, len(new)

    def find(self, names: list[Key], sizes: tuple[int, ...] = ()) -> list[bool]:
        (found,) = self._wait(lambda done: self.objects.find(names, sizes, done))
        return list(found)

    def load(self, some: list[Piece]) -> list[bool]:
        (came,) = self._wait(lambda done: self.objects.load(some, done))
        return list(came)

    def close(self) -> None:
        self.objects.close()


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    made = Sidecar(tmp_path_factory.mktemp("lmcache-plugin"), FLAGS)
    made.start()
    yield made
    made.close()


@pytest.fixture
def asked(sidecar: Sidecar) -> Iterator[Asked]:
    made = Asked(sidecar)
    yield made
    made.close()


def test_objects_come_back_as_they_were_and_are_stored_once(asked: Asked) -> None:
    some = pieces(keys("once", 5))
    assert asked.find([piece.key for piece in some], (BYTES,)) == [False] * 5
    assert asked.store(some) == (True, 5)
    assert asked.store(some) == (True, 0)
    asked_for = [*keys("once", 5), *keys("other", 1)]
    assert asked.find(asked_for) == [True] * 5 + [False]
    targets = empty(some)
    assert asked.load(targets) == [True] * 5
    assert all(np.array_equal(one.data, two.data) for one, two in zip(some, targets, strict=True))


def test_each_field_of_a_key_sets_objects_apart_and_so_do_words(
    asked: Asked, sidecar: Sidecar
) -> None:
    (key,) = keys("fields", 1)
    assert asked.store(pieces([key])) == (True, 1)
    others = [
        replace(key, model_name="other"),
        replace(key, kv_rank=1),
        replace(key, object_group_id=1),
        replace(key, cache_salt="acme:1"),
        replace(key, chunk_hash=b"\1" * 32),
    ]
    assert asked.find([key, *others]) == [True] + [False] * 5
    assert asked.load(empty(pieces(others))) == [False] * 5
    elsewhere = Asked(sidecar, "vllm-0.33")
    assert elsewhere.find([key], (BYTES,)) == [False]
    elsewhere.close()


def test_an_object_of_another_layout_or_size_is_not_taken_for_this_one(asked: Asked) -> None:
    some = pieces(keys("layout", 2))
    assert asked.store(some) == (True, 2)
    for wrong in (pieces(keys("layout", 2), "bf16(16, 2)"), pieces(keys("layout", 2), size=2048)):
        targets = empty(wrong)
        assert asked.load(targets) == [False, False]
    assert asked.load(empty(some)) == [True, True]


def test_sizes_that_are_not_served_cost_only_their_objects(asked: Asked) -> None:
    odd = pieces(keys("odd", 1), size=4095)
    large = pieces(keys("large", 1), size=64 << 10)  # more than a slot of the sidecar
    assert asked.store(odd) == (False, 0)
    assert asked.store(large) == (False, 0)
    assert asked.load(empty(odd)) == [False]
    good = pieces(keys("good", 2))
    assert asked.store([*good, *large]) == (False, 2)
    assert asked.load(empty(good)) == [True, True]


def test_a_sidecar_that_goes_is_a_miss_and_one_that_comes_is_taken_up(tmp_path: Path) -> None:
    late = Sidecar(tmp_path / "late", FLAGS)
    asked, some = Asked(late), pieces(keys("late", 3))
    assert asked.store(some) == (False, 0)
    assert asked.find([piece.key for piece in some]) == [False] * 3
    assert asked.load(empty(some)) == [False] * 3
    assert asked.objects.state == "detached"
    late.start()
    wait_until(lambda: asked.store(some)[0], "to be attached")
    assert asked.load(empty(some)) == [True] * 3
    late.kill()
    wait_until(lambda: asked.load(empty(some)) == [False] * 3, "the end to be seen")
    asked.close()
    late.close()


def test_objects_on_flash_rise_when_they_are_looked_up(tmp_path: Path) -> None:
    flash = ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "8MiB"]
    slow = Sidecar(tmp_path / "slow", [*FLAGS, *flash, "--flash-admission", "always"])
    slow.start()
    asked, some = Asked(slow), pieces(keys("flash", 4))
    assert asked.store(some) == (True, 4)
    slow.stop()
    slow.start()
    names = [piece.key for piece in some]
    wait_until(lambda: asked.find(names) == [True] * 4, "objects on flash to be found")
    assert asked.load(empty(some)) == [True] * 4
    asked.close()
    slow.close()


def test_a_closed_store_answers_all_the_same(sidecar: Sidecar) -> None:
    asked, some = Asked(sidecar), pieces(keys("closed", 2))
    asked.close()
    assert asked.store(some) == (False, 0)
    assert asked.find([piece.key for piece in some]) == [False, False]
    assert asked.load(empty(some)) == [False, False]


def test_a_mistake_in_a_task_ends_it_once_and_not_the_thread(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = pieces(keys("mistake", 3))
    with monkeypatch.context() as broken:
        broken.setattr(ObjectStore, "_names_of", lambda *_: 1 / 0)
        assert asked.store(some) == (False, 0)
        assert asked.find([piece.key for piece in some], (BYTES,)) == [False] * 3
        assert asked.load(empty(some)) == [False] * 3
    assert asked.store(some) == (True, 3)
    assert asked.load(empty(some)) == [True] * 3
