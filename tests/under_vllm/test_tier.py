"""Kvist as a tier under vLLM's own offloading: vLLM's real TieringOffloadingManager with its host
memory, a real sidecar, and requests as vLLM's scheduler describes them. Runs with vLLM's Python
only (make test-vllm); vLLM moves blocks between device and host on CUDA and XPU only, so that half
is done by hand here."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from sim.sidecar import Sidecar, wait_until
from sim.vllm_process import sidecar_metric
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

CHUNK_TOKENS = 16
ROW_BYTES = 8192
ROWS = 8
Rows = npt.NDArray[np.uint8]


def spec(folder: Path, cache: str, **tier: object) -> TieringOffloadingSpec:
    """vLLM's, with Kvist as its second tier."""
    listed = {
        "type": "KvistTier", "module_path": "kvist.engine.plugins.vllm.tier", "cache": cache, **tier
    }  # fmt: skip
    parallel = OffloadingParallelConfig(
        rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
        data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=False,
    )  # fmt: skip
    return TieringOffloadingSpec(
        OffloadingConfig(
            groups=(OffloadingGroupConfig(CHUNK_TOKENS, ("layer.0", "layer.1"), 0),),
            worker_kv_bytes_per_block=ROW_BYTES,
            enable_kv_cache_events=True,
            extra_config={"cpu_bytes_to_use": ROWS * ROW_BYTES, "secondary_tiers": [listed]},
            engine_id=uuid.uuid4().hex,
            model=OffloadingModelConfig(str(folder), "bfloat16"),
            cache=OffloadingCacheConfig(CHUNK_TOKENS, 1),
            parallel=parallel,
        )
    )


def rows_of(chunks: int, seed: int) -> Rows:
    """Bytes of some chunks."""
    return np.random.default_rng(seed).integers(0, 256, (chunks, ROW_BYTES)).astype(np.uint8)


class Offloading:
    """One vLLM's offloading; what its workers and its scheduler do is done by hand."""

    def __init__(self, folder: Path, cache: str, **tier: object) -> None:
        self.manager = spec(folder, cache, **tier).get_manager()
        self.rows = np.frombuffer(self.manager.primary_tier.get_kv_memoryview(), np.uint8)
        self.rows = self.rows.reshape(ROWS, ROW_BYTES)
        (self.tier,) = self.manager.secondary_tiers

    def request(self, name: str, prompt: str, chunks: int) -> tuple[ReqContext, list[OffloadKey]]:
        """A request and the names of its chunks, which chain as vLLM's block hashes do."""
        context, keys, chain = ReqContext(name), [], prompt.encode()
        for at in range(chunks):
            chain = hashlib.sha256(chain).digest()
            keys.append(make_offload_key(chain, 0))
            context.set_offload_key_position(keys[-1], (at + 1) * CHUNK_TOKENS)
        self.manager.on_new_request(context)
        return context, keys

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def compute(self, context: ReqContext, keys: list[OffloadKey], made: Rows) -> Rows:
        """A worker's copies into host memory end; vLLM hands them on. Returns what was made."""
        output = self.manager.prepare_store(keys, context)
        assert output is not None
        assert output.keys_to_store == keys
        self.rows[output.store_spec.chunk_ids] = made
        self.manager.complete_store(keys, context)
        self.settle()
        return made

    def settle(self) -> None:
        """Steps until no job is under way."""

        def idle() -> bool:
            self.step()
            return not self.manager.has_pending_work()

        wait_until(idle, "jobs to end")

    def looked_up(self, context: ReqContext, keys: list[OffloadKey]) -> list[LookupResult]:
        """As vLLM's scheduler asks: at every step again, until nothing is on its way."""
        seen: list[LookupResult] = []

        def known() -> bool:
            seen[:] = [self.manager.lookup(key, context) for key in keys]
            self.step()
            return not {LookupResult.RETRY, LookupResult.HIT_PENDING} & set(seen)

        wait_until(known, "chunks to be known")
        return seen

    def loaded(self, context: ReqContext, keys: list[OffloadKey]) -> Rows:
        """The bytes that a worker would take to the device."""
        found = self.manager.prepare_load(keys, context)
        taken = self.rows[found.chunk_ids].copy()
        self.manager.complete_load(keys, context)
        return taken

    def finish(self, context: ReqContext) -> None:
        self.manager.on_request_finished(context)

    def close(self) -> None:
        del self.rows
        self.manager.shutdown()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    flash = ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "8MiB"]
    made = Sidecar(
        tmp_path / "sidecar", ["--slot-bytes", "16KiB", *flash, "--flash-admission", "always"]
    )
    made.start()
    yield made
    made.close()


@pytest.fixture
def start(model: Path, sidecar: Sidecar) -> Iterator[Callable[[], Offloading]]:
    made: list[Offloading] = []

    def begin() -> Offloading:
        made.append(Offloading(model, str(sidecar.socket)))
        return made[-1]

    yield begin
    for one in made:
        one.close()


MISS, HIT = LookupResult.MISS, LookupResult.HIT


def test_chunks_of_one_vllm_come_back_in_another_byte_for_byte(
    start: Callable[[], Offloading], sidecar: Sidecar
) -> None:
    first, other = start(), start()
    context, keys = first.request("a", "prompt", 4)
    assert first.looked_up(context, keys) == [MISS] * 4
    made = first.compute(context, keys, rows_of(len(keys), 1))
    first.finish(context)
    again, keys = other.request("b", "prompt", 5)
    # The first look-up finds them in Kvist and asks for them; vLLM says that they are on their way.
    assert other.manager.lookup(keys[0], again) is LookupResult.HIT_PENDING
    assert other.looked_up(again, keys) == [HIT] * 4 + [MISS]
    assert np.array_equal(other.loaded(again, keys[:4]), made)
    other.finish(again)
    wait_until(
        lambda: sidecar_metric(sidecar, 'kvist_hit_tokens_total{tier="dram"}') == 64, "counts"
    )
    assert sidecar_metric(sidecar, 'kvist_miss_tokens_total{reason="never_stored"}') == 80
    assert sidecar_metric(sidecar, "kvist_reserved_slots") == 0


def test_another_model_finds_nothing_and_a_model_by_name_has_to_be_described(
    start: Callable[[], Offloading], model: Path, sidecar: Sidecar
) -> None:
    first = start()
    context, keys = first.request("a", "prompt", 2)
    first.compute(context, keys, rows_of(len(keys), 1))
    (model / "model.safetensors").write_bytes(b"Weights")
    other = start()
    again, keys = other.request("b", "prompt", 2)
    assert other.looked_up(again, keys) == [MISS] * 2
    with pytest.raises(ValueError, match='put "model"'):
        spec(Path("some/name"), str(sidecar.socket)).get_manager()
    with pytest.raises(ValueError, match='"cache" is missing'):
        spec(model, "").get_manager()


def test_chunks_on_flash_are_asked_for_again_until_they_have_risen(
    start: Callable[[], Offloading], sidecar: Sidecar
) -> None:
    first = start()
    context, keys = first.request("a", "prompt", 3)
    made = first.compute(context, keys, rows_of(len(keys), 1))
    sidecar.stop()  # writes what is in DRAM only to flash
    sidecar.start()
    other = start()
    again, keys = other.request("b", "prompt", 3)
    assert other.manager.lookup(keys[0], again) is LookupResult.RETRY
    assert other.looked_up(again, keys) == [HIT] * 3
    assert np.array_equal(other.loaded(again, keys), made)


def test_a_damaged_chunk_is_a_failed_promotion_and_then_a_miss_and_the_others_come(
    start: Callable[[], Offloading], sidecar: Sidecar
) -> None:
    first, other = start(), start()
    context, keys = first.request("a", "prompt", 3)
    made = first.compute(context, keys, rows_of(len(keys), 1))
    arena = next((sidecar.folder / "shm").rglob("*arena*"))
    data = np.memmap(arena, dtype=np.uint8, mode="r+")
    place = data.tobytes().find(made[1].tobytes())
    data[place + 100] ^= 1
    again, keys = other.request("b", "prompt", 3)
    assert other.looked_up(again, keys) == [HIT, MISS, HIT]
    assert np.array_equal(other.loaded(again, [keys[0], keys[2]]), made[[0, 2]])
    # It is computed, stored anew and found by the next one.
    other.compute(again, [keys[1]], made[1:2])
    other.finish(again)
    third = start()
    late, keys = third.request("c", "prompt", 3)
    assert third.looked_up(late, keys) == [HIT] * 3
    assert np.array_equal(third.loaded(late, keys), made)


def test_a_dead_sidecar_is_a_miss_and_every_job_ends(
    start: Callable[[], Offloading], sidecar: Sidecar
) -> None:
    one = start()
    context, keys = one.request("a", "prompt", 3)
    one.compute(context, keys, rows_of(len(keys), 1))
    other = start()
    again, keys = other.request("b", "prompt", 3)
    assert other.manager.lookup(keys[0], again) is LookupResult.HIT_PENDING
    sidecar.kill()
    other.step()  # submits the load
    other.tier.drain_jobs()
    assert set(other.looked_up(again, keys)) <= {MISS, HIT}  # what came before it died may be there
    fresh, names = other.request("c", "another prompt", 2)
    other.compute(fresh, names, rows_of(len(names), 3))  # vLLM keeps it itself, and goes on
    assert other.looked_up(fresh, names) == [HIT] * 2
    sidecar.start()

    def stored() -> bool:
        late, last = other.request("d", "a third prompt", 1)
        if other.looked_up(late, last) == [MISS]:
            other.compute(late, last, rows_of(len(last), 4))
        other.finish(late)
        return sidecar_metric(sidecar, "kvist_blocks") > 0

    wait_until(lambda: sidecar_metric(sidecar, "kvist_sessions") == 2, "both to be back")
    assert stored()
    assert sidecar_metric(sidecar, "kvist_reserved_slots") == 0


def test_after_a_reset_nothing_of_before_is_found_here_and_events_tell_what_is_held(
    start: Callable[[], Offloading],
) -> None:
    """As after a change of weights, of which vLLM tells a tier no more than this."""
    one = start()
    context, keys = one.request("a", "prompt", 4)
    one.compute(context, keys, rows_of(len(keys), 1))
    events = [event for event in one.manager.take_events() if event.ownership == "KvistTier"]
    assert [key for event in events for key in event.keys] == keys
    assert not any(event.removed for event in events)
    one.finish(context)
    again, keys = one.request("b", "prompt", 4)
    one.manager.reset_cache()
    assert not one.manager.has_pending_work()
    assert one.looked_up(again, keys) == [MISS] * 4
    assert {event.removed for event in one.manager.take_events()} == {True}
    # A request that began before the reset has blocks of both weights.
    one.compute(again, keys, rows_of(len(keys), 2))
    one.finish(again)
    fresh, keys = one.request("c", "prompt", 4)
    one.manager.primary_tier.reset_cache()
    assert one.looked_up(fresh, keys) == [MISS] * 4
    made = one.compute(fresh, keys, rows_of(len(keys), 3))
    one.manager.primary_tier.reset_cache()
    late, keys = one.request("d", "prompt", 4)
    assert one.looked_up(late, keys) == [HIT] * 4
    assert np.array_equal(one.loaded(late, keys), made)
    # For other processes all is there.
    other = start()
    elsewhere, keys = other.request("e", "prompt", 4)
    assert other.looked_up(elsewhere, keys) == [HIT] * 4
    assert np.array_equal(other.loaded(elsewhere, keys), rows_of(len(keys), 1))


def test_names_that_do_not_name_the_content_are_not_kept(start: Callable[[], Offloading]) -> None:
    """vLLM's other hashes are shorter, and seeded anew in each process."""
    one = start()
    context = ReqContext("a")
    one.manager.on_new_request(context)
    short = make_offload_key(b"sixteen bytes...", 0)
    one.compute(context, [short], rows_of(1, 1))
    other = start()
    again = ReqContext("b")
    other.manager.on_new_request(again)
    assert other.looked_up(again, [short]) == [MISS]
