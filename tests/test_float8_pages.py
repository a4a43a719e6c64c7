"""An engine whose pages are float8: the same bits wherever a prefix was, never another's blocks,
and no NaN from what they cannot hold. How near it comes to float32: test_cuda_llama."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sim.core_thread import CoreThread
from sim.device_core import BLOCK_TOKENS, WHERE, DeviceCores
from sim.models import tiny_llama
from sim.sidecar import Sidecar

from kvist.engine.config import EngineConfig
from kvist.engine.device import found
from kvist.engine.device.found import Device
from kvist.engine.opening import _build, open_backend
from kvist.kernels.narrow import FLOAT8, range_shares, to_float8
from kvist.proto.errors import ConfigInvalid

FLOAT8_PAGES = {"kv_cache_dtype": "fp8", "kv_cache_scale": 0.25, "deterministic": True}
PROMPT = [(7 * i * i + 3) % 200 for i in range(19)]
CACHED = len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS
COUNT = 3
Answer = list[tuple[int, float]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[DeviceCores]:
    cores = DeviceCores(model, tmp_path)
    yield cores
    cores.stop()


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    flash = ["--flash-path", str(tmp_path / "flash"), "--flash-bytes", "16MiB"]
    flags = [*flash, "--flash-admission", "always"]
    # As a module: a machine with a GPU may have kvist on its path only.
    made = Sidecar(tmp_path / "sidecar", flags, (sys.executable, "-P", "-m", "kvist.cachesvc"))
    made.start()
    yield made
    made.close()


def ask(core: CoreThread) -> tuple[Answer, tuple[int, ...]]:
    """Tokens with their log-probabilities, which tell of any wrong bit; and what was cached in
    HBM, DRAM and on flash."""
    request = core.submit(PROMPT, COUNT, ignore_eos=True, logprobs=0)
    tokens = core.tokens(request)
    deltas = core.deltas[request]
    cached = deltas[0].cached
    assert cached is not None
    told = [one.chosen for delta in deltas for one in delta.logprobs]
    return list(zip(tokens, told, strict=True)), (cached.hbm, cached.dram, cached.flash)


def test_an_answer_is_the_same_bits_cold_and_from_every_tier_and_no_other_pages_are_taken(
    start: DeviceCores, sidecar: Sidecar
) -> None:
    first = start(cache=sidecar.address, **FLOAT8_PAGES)
    assert first.ready is not None
    assert (first.ready.kv_dtype, first.ready.kv_scale) == ("float8_e4m3fn", 0.25)
    # 2 layers, K and V, 2 heads of 16, a byte each.
    assert first.ready.page_bytes == BLOCK_TOKENS * 2 * 2 * 2 * 16
    assert first.ready.pages == (1 << 20) // first.ready.page_bytes
    cold, cached = ask(first)
    assert cached == (0, 0, 0)
    assert ask(first) == (cold, (CACHED, 0, 0))
    first.settle()
    first.stop()

    other = start(cache=sidecar.address, **{**FLOAT8_PAGES, "kv_cache_scale": 0.5})
    assert ask(other)[1] == (0, 0, 0), "took blocks of another scale"
    assert other.stats.misses_tokens["namespace"] == CACHED
    other.settle()
    other.stop()

    second = start(cache=sidecar.address, **FLOAT8_PAGES)
    assert ask(second) == (cold, (0, CACHED, 0))
    second.stop()
    assert sidecar.stop() == 0  # what is in DRAM only is gone
    sidecar.start()
    third = start(cache=sidecar.address, **FLOAT8_PAGES)
    assert ask(third) == (cold, (0, 0, CACHED))


def test_pages_of_another_dtype_or_scale_have_another_namespace(model: str) -> None:
    digests = set()
    for dtype, scale in (("fp8", 0.25), ("fp8", 0.5), ("fp8", 1.0), ("bfloat16", 1.0)):
        chosen = {"kv_cache_dtype": dtype, "kv_cache_scale": scale, "dtype": "float32"}
        config = EngineConfig(model=model, device=WHERE, **chosen)  # type: ignore[arg-type]
        digests.add(_build(config, open_backend(config), lambda *_: None).namespace.digest())
    assert len(digests) == 4


def test_what_pages_cannot_hold_is_clamped_and_answers_are_numbers(start: DeviceCores) -> None:
    # 448 * 2^-16: every key and value is beyond it.
    core = start(kv_cache_dtype="fp8", kv_cache_scale=2.0**-16)
    answer, _ = ask(core)
    assert all(math.isfinite(told) for _, told in answer)


def test_float8_is_refused_where_no_kernel_reads_it_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigInvalid, match=r"--kv-cache-dtype fp8: .* give --device cuda"):
        open_backend(EngineConfig(model="m", device="cpu", kv_cache_dtype="fp8"))
    ampere = Device("cuda", "cuda:1", "A100")
    monkeypatch.setattr(found.torch.cuda, "get_device_capability", lambda number: (8, 9 - number))
    with pytest.raises(ConfigInvalid, match=r"fp8_e4m3: A100 has compute capability 8\.8; .* 8\.9"):
        found.check_float8(ampere, "fp8_e4m3")
    found.check_float8(Device("cuda", "cuda:0", "L40"), "fp8")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype: 'fp8_e5m2' is not one of auto, bf"),
        ({"kv_cache_scale": 0.5}, "--kv-cache-scale: 0.5 is for --kv-cache-dtype fp8"),
        ({"kv_cache_dtype": "fp8", "kv_cache_scale": 0.0}, "--kv-cache-scale: 0.0 is out of"),
        ({"kv_cache_dtype": "fp8", "kv_cache_scale": math.nan}, "--kv-cache-scale: nan is out"),
        ({"kv_cache_dtype": "fp8", "kv_cache_scale": math.inf}, "--kv-cache-scale: inf is out"),
    ],
)
def test_a_dtype_or_scale_that_cannot_be_is_refused_by_its_flag(
    chosen: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        EngineConfig(model="m", **chosen)  # type: ignore[arg-type]


def test_numbers_are_rounded_to_the_nearest_and_clamped_to_the_range() -> None:
    x = torch.tensor([0.0, 1.06, 1.0625, 1.0626, -1.94, 447.0, 1e9, -math.inf, 2**-10, 2**-7])
    values = to_float8(x, 1.0)
    assert values.float().tolist() == [0, 1, 1, 1.125, -2, 448, 448, -448, 0, 2**-7]
    assert to_float8(x * 4, 4.0).float().equal(values.float())
    clipped, small = range_shares(values)
    assert (clipped, small) == pytest.approx((0.3, 0.3))
    assert values.dtype == FLOAT8
