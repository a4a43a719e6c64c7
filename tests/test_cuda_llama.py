"""The model for devices, in Triton's interpreter: logits of the CPU model, bits that depend on no
chunk and no neighbour, and decode steps that need nothing from the host."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sim.device import DEVICE, on_gpu
from sim.models import tiny_llama
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvist.engine.models.base import Chunk
from kvist.engine.models.decode_batch import DecodeBatch
from kvist.engine.models.llama import LlamaModel
from kvist.engine.models.llama_cuda import CudaLlama
from kvist.engine.request import SamplingParams
from kvist.engine.sampler import DrawState
from kvist.engine.weights import LoadedModel, load_model
from kvist.kernels.device.worklist import _cut_kernel
from kvist.kernels.narrow import FLOAT8

BLOCK_TOKENS = 8
PROMPT = [(7 * i * i + 3) % 200 for i in range(19)]
OTHER = [(5 * i + 11) % 200 for i in range(10)]
PAGES, OTHERS_PAGES = [3, 1, 4], [5, 0]
GREEDY = DrawState(SamplingParams(temperature=0), seed=0)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(tiny_llama(tmp_path_factory.mktemp("tiny")), request.param)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(tiny_llama(tmp_path_factory.mktemp("wide")), "float32")


def new_pool(loaded: LoadedModel) -> torch.Tensor:
    """8 pages of NaN: what is read before it is written is found out."""
    config = loaded.config
    shape = (8, config.layers, 2, config.kv_heads, BLOCK_TOKENS, config.head_dim)
    dtype = getattr(torch, loaded.dtype)
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def cpu_logits(loaded: LoadedModel, chunks: list[Chunk]) -> torch.Tensor:
    return LlamaModel(loaded).forward(chunks, new_pool(loaded).cpu())


def both() -> list[Chunk]:
    return [Chunk(PROMPT, 0, PAGES, True), Chunk(OTHER, 0, OTHERS_PAGES, True)]


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.cpu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("fast", [False, True], ids=["invariant", "fast"])
def test_logits_are_the_cpu_models(loaded: LoadedModel, wide: LoadedModel, fast: bool) -> None:
    model = CudaLlama(loaded, DEVICE.type, fast=fast)
    pool = new_pool(loaded)
    prefilled = model.forward(both(), pool)
    # One row of each is decoded on what the prefill left in the pages, beside a prefill.
    steps = [
        Chunk(PROMPT[-1:], len(PROMPT) - 1, PAGES, True),
        Chunk([1, 2, 3], 0, [7], False),
        Chunk(OTHER[-1:], len(OTHER) - 1, OTHERS_PAGES, True),
    ]
    decoded = model.forward(steps, pool)
    exact = cpu_logits(wide, both())
    # bfloat16 weights and activations of two layers; the interpreter cuts off instead of rounding.
    limit = 1e-5 if loaded.dtype == "float32" else 0.05
    assert relative_error(prefilled, exact) < limit
    assert relative_error(decoded, exact) < limit


def test_a_prompt_cut_anywhere_beside_anyone_gives_the_same_logits_and_pages(
    loaded: LoadedModel,
) -> None:
    model = CudaLlama(loaded, DEVICE.type)
    pool, cut_pool = new_pool(loaded), new_pool(loaded)
    whole = model.forward(both(), pool)
    model.forward([Chunk(PROMPT[:10], 0, PAGES, False)], cut_pool)
    middle = [Chunk(OTHER[:9], 0, OTHERS_PAGES, False), Chunk(PROMPT[10:18], 10, PAGES, False)]
    model.forward(middle, cut_pool)
    ends = [Chunk(OTHER[9:], 9, OTHERS_PAGES, True), Chunk(PROMPT[18:], 18, PAGES, True)]
    parts = model.forward(ends, cut_pool)
    assert torch.equal(parts.flip(0), whole)
    written = [*PAGES[:2], OTHERS_PAGES[0]]
    assert torch.equal(cut_pool[written], pool[written])


@pytest.mark.parametrize("fast", [False, True], ids=["invariant", "fast"])
def test_a_persistent_batch_decodes_what_whole_prompts_would(wide: LoadedModel, fast: bool) -> None:
    model = CudaLlama(wide, DEVICE.type, fast=fast)
    pool = new_pool(wide)
    model.forward(both(), pool)
    batch = DecodeBatch(model, pool, rows=4, width=4, keys=200)
    # Rows 1 and 3 are nobody's; the third page of one request is told only when it is needed.
    batch.place(0, PROMPT[-1], len(PROMPT), PAGES, GREEDY)
    batch.place(2, OTHER[-1], len(OTHER), OTHERS_PAGES[:1], GREEDY)
    batch.set_pages(2, 1, OTHERS_PAGES[1:])
    texts = {0: list(PROMPT), 2: list(OTHER)}
    for _ in range(2):
        batch.run(3)
        for row, text in texts.items():
            exact = cpu_logits(wide, [Chunk(text, 0, PAGES, True)])
            text.append(int(batch.tokens[row]))
            assert text[-1] == int(exact.argmax())
    batch.clear(0)
    before = pool[PAGES].clone()
    batch.run(4)
    after = pool[PAGES]
    assert torch.equal(after.nan_to_num(), before.nan_to_num()), "a cleared row wrote to its pages"


def test_a_row_draws_by_its_own_seed_and_count(wide: LoadedModel) -> None:
    model = CudaLlama(wide, DEVICE.type, fast=True)
    drawn = []
    for row, rows in ((0, 1), (2, 3)):
        pool = new_pool(wide)
        batch = DecodeBatch(model, pool, rows=3, width=2, keys=64)
        batch.place(
            row, 5, 1, OTHERS_PAGES, DrawState(SamplingParams(temperature=1.0), seed=2**64 - 11)
        )
        tokens = []
        for _ in range(3):
            batch.run(rows)
            tokens.append(int(batch.tokens[row]))
        drawn.append(tokens)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


def test_a_drawn_stream_goes_on_where_it_was_when_its_request_is_seated_again(
    wide: LoadedModel,
) -> None:
    model = CudaLlama(wide, DEVICE.type, fast=True)
    draws = DrawState(SamplingParams(temperature=1.0), seed=5)
    batch = DecodeBatch(model, new_pool(wide), rows=1, width=2, keys=16)
    batch.place(0, 5, 1, OTHERS_PAGES, draws)
    tokens = []
    for _ in range(3):
        batch.run(1)
        tokens.append(int(batch.tokens[0]))
    batch.clear(0)
    batch.place(0, tokens[1], 3, OTHERS_PAGES, dataclasses.replace(draws, drawn=2))
    batch.run(1)
    assert int(batch.tokens[0]) == tokens[2]


def test_a_step_without_a_page_or_a_place_for_each_key_is_refused(wide: LoadedModel) -> None:
    model = CudaLlama(wide, DEVICE.type, fast=True)
    batch = DecodeBatch(model, new_pool(wide), rows=3, width=2, keys=12)
    batch.place(1, 5, BLOCK_TOKENS + 1, OTHERS_PAGES[:1], GREEDY)
    with pytest.raises(AssertionError, match="no page"):
        batch.run(2)
    batch.set_pages(1, 1, OTHERS_PAGES[1:])
    with pytest.raises(AssertionError, match="not in the first 1"):
        batch.run(1)
    with pytest.raises(AssertionError, match="row 1 is used"):
        batch.place(1, 5, 1, OTHERS_PAGES, GREEDY)
    batch.place(0, 5, 4, PAGES[:1], GREEDY)
    with pytest.raises(AssertionError, match="more than 12 keys"):
        batch.run(2)


def test_pages_may_be_filled_until_a_layer_reads_them(wide: LoadedModel) -> None:
    model = CudaLlama(wide, DEVICE.type, fast=True)
    pool = new_pool(wide)
    whole = model.forward([Chunk(PROMPT, 0, PAGES, True)], pool)
    kept = pool[PAGES[:2]].clone()
    pool[PAGES[:2]] = float("nan")
    asked: list[int] = []

    def fill(layer: int) -> None:
        pool[PAGES[:2], layer] = kept[:, layer]
        asked.append(layer)

    cached = 2 * BLOCK_TOKENS
    part = model.forward([Chunk(PROMPT[cached:], cached, PAGES, True)], pool, before_layer=fill)
    assert asked == list(range(wide.config.layers))
    assert relative_error(part, whole.cpu()) < 1e-5


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8], ids=str)
def test_a_captured_step_draws_what_an_eager_one_does(
    wide: LoadedModel, dtype: torch.dtype
) -> None:
    model = CudaLlama(wide, DEVICE.type, fast=True)
    drawn = []
    told: list[tuple[int, int, int]] = []
    for captured in (False, True):
        pool = new_pool(wide).to(dtype)
        model.forward(both(), pool)
        batch = DecodeBatch(model, pool, rows=4, width=4, keys=200)
        if captured:
            batch.capture((4, 2), lambda *graph: told.append(graph))
            assert [graph[:2] for graph in told] == [(1, 4), (2, 2)]
        batch.place(
            1, PROMPT[-1], len(PROMPT), PAGES, DrawState(SamplingParams(temperature=1), seed=3)
        )
        tokens = []
        for _ in range(4):
            batch.run(2)
            tokens.append(int(batch.tokens[1]))
        drawn.append(tokens)
    assert drawn[0] == drawn[1]


def test_blocks_of_fast_and_invariant_models_are_told_apart(wide: LoadedModel) -> None:
    names = {CudaLlama(wide, DEVICE.type, fast=fast).compute for fast in (False, True)}
    assert len(names) == 2


@pytest.mark.parametrize("fast", [False, True], ids=["invariant", "fast"])
def test_float8_pages_are_near_float32_and_read_as_exactly_what_they_hold(
    wide: LoadedModel, fast: bool
) -> None:
    scale = 0.25
    model = CudaLlama(wide, DEVICE.type, fast=fast, kv_scale=scale)
    pool = new_pool(wide).to(FLOAT8)
    model.forward([Chunk(OTHER[:-1], 0, OTHERS_PAGES, False)], pool)
    logits = model.forward([Chunk(OTHER[-1:], len(OTHER) - 1, OTHERS_PAGES, True)], pool)
    chunks = [Chunk(OTHER, 0, OTHERS_PAGES, True)]
    # A sixteenth of each key and value at most; the interpreter halves what it should round up to
    # a power of two.
    limit = 0.3 if DEVICE.type == "cpu" else 0.15
    assert relative_error(logits, cpu_logits(wide, chunks)) < limit
    held, copy = pool.float().cpu() * scale, new_pool(wide).cpu()

    def take_what_is_held(layer: int) -> None:
        copy[OTHERS_PAGES, layer] = held[OTHERS_PAGES, layer].nan_to_num()

    exact = LlamaModel(wide).forward(chunks, copy, take_what_is_held)
    assert relative_error(logits, exact) < 1e-5


def test_float8_pages_are_the_same_however_a_prompt_is_cut(wide: LoadedModel) -> None:
    model = CudaLlama(wide, DEVICE.type, kv_scale=0.25)
    pool, cut_pool = (new_pool(wide).to(FLOAT8) for _ in range(2))
    whole = model.forward([Chunk(PROMPT, 0, PAGES, True)], pool)
    model.forward([Chunk(PROMPT[:11], 0, PAGES, False)], cut_pool)
    part = model.forward([Chunk(PROMPT[11:], 11, PAGES, True)], cut_pool)
    assert torch.equal(part, whole)
    full, cut = (one.view(torch.uint8)[PAGES[:2]] for one in (pool, cut_pool))
    assert torch.equal(full, cut)


def test_a_checkpoint_on_the_device_is_not_copied(tmp_path: Path) -> None:
    loaded = load_model(tiny_llama(tmp_path), "float32")
    model = CudaLlama(loaded, "cpu")
    assert model._embedding.data_ptr() == loaded.tensors["model.embed_tokens.weight"].data_ptr()


class Operations(TorchDispatchMode):
    """Names of what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_row_is_cleared_without_a_number_that_comes_from_the_host(wide: LoadedModel) -> None:
    batch = DecodeBatch(CudaLlama(wide, DEVICE.type), new_pool(wide), rows=3, width=2, keys=64)
    batch.place(1, 5, 1, OTHERS_PAGES, GREEDY)
    with Operations() as asked:
        batch.clear(1)
    # On a CUDA device `lengths[1] = 0` is such a copy, which waits for every step before it.
    assert asked.names == ["aten.slice.Tensor", "aten.zero_.default"]
    assert batch._lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize("fast", [False, True], ids=["invariant", "fast"])
def test_a_decode_step_reads_nothing_back_from_the_device(
    wide: LoadedModel, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []

    def launch(kernel: Any, *_args: Any, **_named: Any) -> None:
        launched.append(kernel.fn.__name__)

    # Fake tensors have shapes and no values: whoever asks for one gets an error, as a capture does.
    monkeypatch.setattr(type(_cut_kernel), "run", launch)
    with FakeTensorMode():
        tensors = {name: torch.empty(tensor.shape) for name, tensor in wide.tensors.items()}
        model = CudaLlama(dataclasses.replace(wide, tensors=tensors), "cpu", fast=fast)
        pool = torch.empty((8, wide.config.layers, 2, wide.config.kv_heads, 8, 16))
        batch = DecodeBatch(model, pool, rows=4, width=4, keys=200)
        with pytest.raises(DataDependentOutputException):
            batch.tokens.tolist()
        batch._step(3)
    attention = "_split_kernel" if fast else "_prefill_kernel"
    assert launched.count(attention) == wide.config.layers
    assert launched[0] == "_cut_kernel"
    assert launched[-1] == "_sample_kernel"
