"""A token's logits and KV depend on the tokens before it and on nothing else, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.models import tiny_llama

from kvist.engine.models.base import Chunk, Model
from kvist.engine.models.build import missing_for_own_kernels
from kvist.engine.models.llama import LlamaModel
from kvist.engine.weights import LoadedModel, load_model
from kvist.tiers.hbm import PagePool

# Of the computation and of K and V in the pool, by torch; and by kernels/cpu with its weights in
# bfloat16 or codes.
DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"))
CODES = ("none", "int8", "int4")
lacks = missing_for_own_kernels()
own = pytest.mark.skipif(bool(lacks), reason=f"needs {lacks}")
TINY = [
    *DTYPES,
    ("float32", "float16"),
    *(pytest.param(("own", codes), marks=own) for codes in CODES),
]
REAL = [*DTYPES, *(pytest.param(("own", codes), marks=own) for codes in ("none", "auto"))]
LONGEST = 100
POOL_PAGES = 64


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked."""

    loaded: LoadedModel
    model: Model
    kv_dtype: str

    def pool(self, block_tokens: int, pages: int = POOL_PAGES) -> PagePool:
        return PagePool(self.loaded.block_format(block_tokens, self.kv_dtype), pages)

    def prompt(self, tokens: int, seed: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(self.loaded.config.vocab) for _ in range(tokens)]

    def whole(self, prompt: Sequence[int], block_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the last token, and the pages, of one prefill."""
        pages = list(range(-(-len(prompt) // block_tokens)))
        pool = self.pool(block_tokens).tensor
        return self.model.forward([Chunk(prompt, 0, pages, True)], pool), pool[: len(pages)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def subject(path: str | Path, kind: tuple[str, str]) -> Subject:
    """A model by torch, (dtype, K and V); or by kernels/cpu on two threads, ("own", codes)."""
    if kind[0] != "own":
        loaded = load_model(path, kind[0])
        return Subject(loaded, LlamaModel(loaded), kind[1])
    # Not everywhere: numba is an option.
    from kvist.engine.models.llama_cpu import CpuLlama

    loaded = load_model(path, "bfloat16", quantization=kind[1])
    return Subject(loaded, CpuLlama(loaded, threads=2), "bfloat16")


@pytest.fixture(scope="module", params=TINY, ids="/".join)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    head_dim = 32 if request.param[0] == "own" else 16
    folder = tiny_llama(tmp_path_factory.mktemp("tiny"), head_dim=head_dim)
    return subject(folder, request.param)


@pytest.fixture(scope="module", params=REAL, ids="/".join)
def real(request: pytest.FixtureRequest) -> Subject:
    return subject("demo", request.param)


def forward_in_parts(
    subject: Subject, prompt: Sequence[int], cuts: Sequence[int], seed: int, block_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like Subject.whole, but cut at cuts, in other pages, with strangers in half of the steps."""
    draw = random.Random(seed)
    pool = subject.pool(block_tokens).tensor
    pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(seed)))
    own, theirs = split_pages(draw, -(-len(prompt) // block_tokens))
    logits = torch.empty(0)
    bounds = sorted({0, len(prompt), *cuts})
    for first, last in pairwise(bounds):
        chunks = [Chunk(prompt[first:last], first, own, True)]
        if draw.random() < 0.5:
            # A stranger that decodes where we are, and one that prefills.
            place = first % block_tokens
            chunks.append(Chunk([draw.randrange(200)], place, theirs[:1], True))
            length = draw.randrange(1, 2 * block_tokens)
            chunks.insert(0, Chunk(subject.prompt(length, seed), 0, theirs[1:3], False))
        logits = subject.model.forward(chunks, pool)[:1]
    return logits, pool[own]


def split_pages(draw: random.Random, count: int) -> tuple[list[int], list[int]]:
    """Pages of a request, in no order, and pages of others."""
    pages = draw.sample(range(POOL_PAGES), POOL_PAGES)
    return pages[:count], pages[count:]


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, LONGEST),
    cuts=st.sets(st.integers(1, LONGEST - 1), max_size=8),
    block_tokens=st.sampled_from([4, 16, 64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_prompt_cut_anywhere_beside_anyone_gives_the_same_logits_and_pages(
    tiny: Subject, tokens: int, cuts: set[int], block_tokens: int, seed: int
) -> None:
    prompt = tiny.prompt(tokens, seed)
    inside = [cut for cut in cuts if cut < tokens]
    logits, pages = tiny.whole(prompt, block_tokens)
    other_logits, other_pages = forward_in_parts(tiny, prompt, inside, seed, block_tokens)
    assert torch.equal(other_logits, logits)
    written = list_written(pages, tokens, block_tokens)
    assert torch.equal(list_written(other_pages, tokens, block_tokens), written)


def list_written(pages: torch.Tensor, tokens: int, block_tokens: int) -> torch.Tensor:
    """K and V of the positions that a prompt wrote: (layers, 2, kv_heads, tokens, head_dim)."""
    assert pages.shape[4] == block_tokens
    return pages.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[:, :, :, :tokens]


def test_decoding_one_by_one_gives_what_a_prefill_gives(tiny: Subject) -> None:
    prompt = tiny.prompt(75, seed=1)
    cuts = range(37, 75)
    logits, pages = tiny.whole(prompt, 16)
    other_logits, other_pages = forward_in_parts(tiny, prompt, cuts, seed=2, block_tokens=16)
    assert torch.equal(other_logits, logits)
    assert torch.equal(list_written(other_pages, 75, 16), list_written(pages, 75, 16))


def test_requests_that_decode_together_get_what_each_gets_alone(tiny: Subject) -> None:
    pool = tiny.pool(16).tensor
    prompts = [tiny.prompt(length, seed=length) for length in (3, 16, 17, 40, 41, 47, 90, 5)]
    tables = [list(range(6 * i, 6 * i + 6)) for i in range(len(prompts))]
    for prompt, table in zip(prompts, tables, strict=True):
        tiny.model.forward([Chunk(prompt[:-1], 0, table, False)], pool)
    chunks = [
        Chunk(prompt[-1:], len(prompt) - 1, table, True)
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    together = tiny.model.forward(chunks, pool)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row : row + 1], tiny.whole(prompt, 16)[0])


def test_pages_moved_as_bytes_to_another_pool_go_on_as_if_computed_there(tiny: Subject) -> None:
    prompt = tiny.prompt(50, seed=3)
    here, there = tiny.pool(16), tiny.pool(16)
    tiny.model.forward([Chunk(prompt[:48], 0, [5, 1, 9], False)], here.tensor)
    for source, target in ((5, 2), (1, 3), (9, 4)):
        there.page_bytes(target)[:] = here.page_bytes(source)
    logits = tiny.model.forward([Chunk(prompt[48:], 48, [2, 3, 4, 7], True)], there.tensor)
    assert torch.equal(logits, tiny.whole(prompt, 16)[0])


def test_what_an_earlier_owner_left_in_a_page_is_never_read(tiny: Subject) -> None:
    prompt = tiny.prompt(40, seed=4)
    pool = tiny.pool(16).tensor.fill_(float("nan"))
    tiny.model.forward([Chunk(prompt[:20], 0, [0, 1], False)], pool)
    tiny.model.forward([Chunk(prompt[20:32], 20, [0, 1], False)], pool)
    logits = tiny.model.forward([Chunk(prompt[32:], 32, [0, 1, 2], True)], pool)
    assert torch.equal(logits, tiny.whole(prompt, 16)[0])


def test_a_step_that_wants_no_logits_gives_none(tiny: Subject) -> None:
    logits = tiny.model.forward([Chunk([1, 2, 3], 0, [0], False)], tiny.pool(16).tensor)
    assert logits.shape == (0, tiny.loaded.config.vocab)
    assert logits.dtype == torch.float32


def test_logits_come_in_the_order_of_the_chunks(tiny: Subject) -> None:
    prompts = [tiny.prompt(length, seed=9) for length in (30, 1, 12, 1)]
    pool = tiny.pool(16).tensor
    wanted = (True, False, True, True)
    chunks = [
        Chunk(prompt, 0, [2 * i, 2 * i + 1], want)
        for i, (prompt, want) in enumerate(zip(prompts, wanted, strict=True))
    ]
    logits = tiny.model.forward(chunks, pool)
    assert len(logits) == 3
    for row, i in enumerate((0, 2, 3)):
        assert torch.equal(logits[row : row + 1], tiny.whole(prompts[i], 16)[0])


def test_a_prompt_in_chunks_of_one_token_gives_the_logits_of_every_position(tiny: Subject) -> None:
    prompt = tiny.prompt(40, seed=11)
    pool = tiny.pool(16).tensor.fill_(float("nan"))
    chunks = [Chunk([token], place, [4, 9, 2], True) for place, token in enumerate(prompt)]
    logits = tiny.model.forward(chunks, pool)
    for length in (1, 15, 16, 17, 33, 40):
        assert torch.equal(logits[length - 1 : length], tiny.whole(prompt[:length], 16)[0])


def test_an_untied_output_projection_is_used(tmp_path: Path) -> None:
    tied = load_model(tiny_llama(tmp_path / "tied"), "float32")
    untied = load_model(tiny_llama(tmp_path / "untied", tied=False), "float32")
    first, second = (Subject(loaded, LlamaModel(loaded), "float32") for loaded in (tied, untied))
    prompt = first.prompt(10, seed=5)
    assert not torch.allclose(first.whole(prompt, 16)[0], second.whole(prompt, 16)[0])


def test_each_layer_is_announced_before_it_reads_the_pages(tiny: Subject) -> None:
    prompt = tiny.prompt(50, seed=8)
    pages = tiny.whole(prompt, 16)[1]
    pool, seen = tiny.pool(16).tensor, []

    def bring(layer: int) -> None:
        seen.append(layer)
        pool[[7, 2, 5], layer] = pages[:3, layer]

    logits = tiny.model.forward([Chunk(prompt[48:], 48, [7, 2, 5, 1], True)], pool, bring)
    assert seen == [0, 1]
    assert torch.equal(logits, tiny.whole(prompt, 16)[0])


@own
def test_a_step_given_up_amid_its_layers_leaves_a_model_that_computes(tmp_path: Path) -> None:
    this = subject(tiny_llama(tmp_path, head_dim=32), ("own", "none"))
    prompt = this.prompt(20, seed=9)

    def fail(layer: int) -> None:
        if layer:
            raise OSError("no such block")

    with pytest.raises(OSError, match="no such block"):
        this.model.forward([Chunk(prompt, 0, [0, 1], True)], this.pool(16).tensor, fail)
    assert torch.equal(this.whole(prompt, 16)[0], this.whole(prompt, 16)[0])


@pytest.mark.model
@pytest.mark.parametrize(("threads", "cuts"), [(1, (7, 128, 138, 139)), (2, (31,))])
def test_the_real_model_keeps_the_contract_too(
    real: Subject, threads: int, cuts: tuple[int, ...]
) -> None:
    torch.set_num_threads(threads)
    prompt = real.prompt(140, seed=6)
    logits, pages = real.whole(prompt, 64)
    other_logits, other_pages = forward_in_parts(real, prompt, cuts, seed=1, block_tokens=64)
    assert torch.equal(other_logits, logits)
    assert torch.equal(list_written(other_pages, 140, 64), list_written(pages, 140, 64))
