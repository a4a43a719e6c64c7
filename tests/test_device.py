"""What --device means, what is refused there, which row is whose, how many pages fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.device import DEVICE, interpreted
from sim.models import tiny_llama

from kvist.engine.config import EngineConfig
from kvist.engine.device import found
from kvist.engine.device.backend import DeviceBackend
from kvist.engine.device.found import Device, find_device
from kvist.engine.device.rows import Row, Rows
from kvist.engine.device.sizing import PoolSizing, batch_keys
from kvist.engine.models.decode_batch import GRAPH_ROWS, DecodeBatch, graph_sizes
from kvist.engine.models.llama_cuda import CudaLlama
from kvist.engine.request import NewRequest, SamplingParams
from kvist.engine.sequence import Limits, Sequence
from kvist.engine.step import Work
from kvist.engine.weights import load_model
from kvist.kernels.device.worklist import _cut_kernel
from kvist.proto.errors import ConfigInvalid
from kvist.tiers.hbm import PagePool

GiB = 1 << 30
HERE = (
    Device("interpreter", "cpu", "none")
    if DEVICE.type == "cpu"
    else Device("cuda", "cuda:0", "a GPU")
)
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_a_device_that_is_none_is_refused_before_the_start() -> None:
    for wrong in ("gpu", "cuda:", "cuda:x", "cpu:0", ""):
        with pytest.raises(ConfigInvalid, match="--device: "):
            EngineConfig(model="m", device=wrong)
    with pytest.raises(ConfigInvalid, match=r"--gpu-memory-utilization: 1\.5"):
        EngineConfig(model="m", gpu_memory_utilization=1.5)


@no_cuda
def test_without_a_gpu_auto_is_the_cpu_and_cuda_says_what_is_missing() -> None:
    assert find_device("auto") is find_device("cpu")
    with pytest.raises(ConfigInvalid, match=r"--device cuda:1: torch .* sees no CUDA device"):
        find_device("cuda:1")


def test_the_interpreter_is_for_tests_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not find_device("interpreter").host
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigInvalid, match="set TRITON_INTERPRET=1"):
        find_device("interpreter")


def test_without_triton_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigInvalid, match=r"'\.\[gpu\]'"):
        find_device("cuda")


def test_a_gpu_without_bfloat16_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = found.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_device_name", lambda number: f"GPU {number}")
    monkeypatch.setattr(cuda, "get_device_capability", lambda number: (7, 5) if number else (9, 0))
    assert find_device("cuda") == Device("cuda", "cuda:0", "GPU 0")
    with pytest.raises(ConfigInvalid, match=r"GPU 1 has compute capability 7\.5; .* need 8\.0"):
        find_device("cuda:1")
    with pytest.raises(ConfigInvalid, match="--device cuda:2: there are 2, cuda:0 to cuda:1"):
        find_device("cuda:2")


@interpreted
def test_graphs_that_cannot_be_captured_name_the_way_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("2 GiB are wanted")

    monkeypatch.setattr(DecodeBatch, "capture", refuse)
    backend = DeviceBackend(EngineConfig(model="m"), Device("interpreter", "cpu", "none"))
    loaded = load_model(tiny_llama(tmp_path), "float32")
    backend.build(loaded, "float32")
    backend.device = Device("cuda", "cpu", "a GPU that lacks memory")
    pool = PagePool(loaded.block_format(8, "float32"), 4)
    with pytest.raises(ConfigInvalid, match=r"2 GiB are wanted.*give --enforce-eager"):
        backend.runner(pool, Limits(32, 8), lambda *_: None)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "invariant"])
def test_what_a_first_request_needs_is_compiled_before_it_comes(
    deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model="m", deterministic=deterministic, max_num_seqs=4)
    backend = DeviceBackend(config, HERE)
    loaded = load_model(tiny_llama(tmp_path), "float32")
    backend.build(loaded, "float32")
    pool = PagePool(loaded.block_format(8, "float32"), 4, HERE.torch)
    launched: list[str] = []
    launch = type(_cut_kernel).__getitem__

    def note(kernel: Any, grid: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return launch(kernel, grid)

    monkeypatch.setattr(type(_cut_kernel), "__getitem__", note)
    runner = backend.runner(pool, Limits(32, 8), lambda *_: None)
    attention = {"_prefill_kernel"} | (set() if deterministic else {"_split_kernel"})
    assert attention | {"_rope_store_kernel", "_sample_kernel"} < set(launched)
    assert not pool.tensor.any(), "something was left in a page"
    before = set(launched)
    sequence = a_sequence(1)
    sequence.draws, sequence.pages = runner.begin(SamplingParams()), [1]
    runner.launch([Work(sequence, 0, 1, True, 0)]).result()
    assert set(launched) == before


def test_weights_of_4_and_8_bits_are_refused_with_a_reason() -> None:
    device = Device("interpreter", "cpu", "none")
    for asked in ("auto", "none"):
        config = EngineConfig(model="m", quantization=asked)
        assert DeviceBackend(config, device).quantization() == "none"
    with pytest.raises(ConfigInvalid, match="--quantization int8: kernels for devices"):
        DeviceBackend(EngineConfig(model="m", quantization="int8"), device).quantization()


def test_steps_overlap_on_a_device_unless_told_otherwise() -> None:
    assert EngineConfig(model="m").overlaps("cuda")
    assert not EngineConfig(model="m").overlaps("cpu")
    assert not EngineConfig(model="m", async_scheduling=False).overlaps("cuda")


def test_a_step_is_longer_on_a_device_unless_told_otherwise() -> None:
    default, asked = EngineConfig(model="m"), EngineConfig(model="m", max_num_batched_tokens=100)
    assert [default.step_tokens(kind) for kind in ("cpu", "cuda")] == [512, 8192]
    assert [asked.step_tokens(kind) for kind in ("cpu", "cuda")] == [100, 100]
    with pytest.raises(ConfigInvalid, match="--max-num-seqs: 600 requests need a token each"):
        EngineConfig(model="m", max_num_seqs=600)


@pytest.mark.parametrize("rows", [1, 3, 8, 32, 100, 256, 300])
def test_the_largest_graph_holds_all_rows_up_to_a_limit(rows: int) -> None:
    sizes = graph_sizes(rows)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == min(rows, GRAPH_ROWS[-1])


class Memory:
    """A device whose steps take what the test says."""

    def __init__(self, free: int, total: int, *peaks: int) -> None:
        self._room = free, total
        self._peaks = list(peaks)
        self.ran = 0

    def room(self) -> tuple[int, int]:
        return self._room

    def peak(self, run: Callable[[], object]) -> int:
        run()
        self.ran += 1
        return self._peaks.pop(0)


def test_pages_get_what_is_left_beside_weights_and_the_largest_steps(tmp_path: Path) -> None:
    loaded = load_model(tiny_llama(tmp_path), "float32")
    format = loaded.block_format(8, "float32")
    small = {"max_num_batched_tokens": 6, "max_num_seqs": 2, "max_model_len": 16}
    config = EngineConfig(model="m", gpu_memory_utilization=0.5, **small)  # type: ignore[arg-type]
    model = CudaLlama(loaded, DEVICE.type, fast=True)
    memory = Memory(60 * GiB, 80 * GiB, 3 * GiB, 2 * GiB)
    # Half of 80, without the 20 in use and the 5 of the steps, which have both been run.
    assert PoolSizing(config, model, memory).pool_bytes(format) == 15 * GiB
    assert memory.ran == 2
    with pytest.raises(ConfigInvalid, match=r"--gpu-memory-utilization: 0\.5 of 80GiB leaves no"):
        PoolSizing(config, model, Memory(42 * GiB, 80 * GiB, GiB, GiB)).pool_bytes(format)
    assert batch_keys(config, 16, 1000) == 32
    assert batch_keys(config, 16, 5) == 20


LIMITS = Limits(1000, 4)


def a_sequence(number: int) -> Sequence:
    return Sequence(NewRequest(str(number), [1], SamplingParams()), number, LIMITS, None, 0.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 11), max_size=6), max_size=20))
def test_who_stays_keeps_its_row_and_gaps_can_be_closed(steps: list[set[int]]) -> None:
    rows, sequences = Rows(6), [a_sequence(number) for number in range(12)]
    had: dict[int, int] = {}
    for step in steps:
        gone = rows.keep([sequences[number] for number in step])
        assert sorted(gone) == sorted(had.pop(number) for number in set(had) - step)
        for number in sorted(step):
            sequence = sequences[number]
            row = rows.get(sequence)
            assert (None if row is None else row.number) == had.get(number)
            if row is None:
                row = rows.seat(Work(sequence, 0, 1, True, 0), 1, [])
            had[number] = row.number
        assert len(set(had.values())) == len(rows) == len(step)
        free = set(range(6)) - set(had.values())
        for source, target in rows.close_gaps(max(len(step), 2)):
            assert target in free
            mover = next(number for number, row in had.items() if row == source)
            free = free - {target} | {source}
            had[mover] = target
        assert rows.end <= max(len(step), 2)


def test_a_row_is_told_only_the_pages_that_changed() -> None:
    row = Row(0, life=0, length=1, pages=[5, 6], registered=1)
    assert row.new_pages([5, 6], 1) is None
    assert row.new_pages([5, 6, 7], 1) == 2
    # A page that became complete was in the pool already, and is exchanged for that.
    assert row.new_pages([5, 9, 7], 2) == 1
    assert row.pages == [5, 9, 7]
    assert row.new_pages([5, 9, 7, 8], 2) == 3
