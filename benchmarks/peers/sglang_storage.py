"""SGLang's storage backends beside each other: Kvist and SGLang's own HiCacheFile.

Runs with SGLang's Python (make test-sglang sets one up); no GPU. One of SGLang's own host pools,
pages as a model with --layers, --heads and --head-dim has them. In each round every backend stores
the same pages under fresh names (batch_set_v2, as SGLang's controller does for pools) and brings
them into other pages of the pool (batch_get_v2); all take turns with numpy's copy of the same
pages, which is the measure. Figures are medians of the rounds, GB/s and ratios to the copy.

HiCacheFile writes to --folder without a sync, so to the page cache; it verifies nothing. Kvist
verifies each page that it brings, against its hash and its checksum, and holds it in DRAM.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvist.engine.local import LocalSidecar

_VISION: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
for _name in ("nms", "qnms"):  # torchvision's wheel for CUDA has none on a CPU; nobody calls them
    _VISION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheFile,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls  # noqa: E402

from kvist.engine.plugins.sglang import KvistStorage  # noqa: E402

WARMUP = 2
LAYOUTS = ("page_first_direct", "page_first", "page_head", "layer_first")


def make_pool(arguments: argparse.Namespace) -> Any:
    """A host pool of twice the pages of a round, and some."""
    size, page = 2 * arguments.pages * arguments.page_tokens, arguments.page_tokens
    device = MHATokenToKVPool(
        size=page, page_size=page, dtype=torch.bfloat16, head_num=arguments.heads,
        head_dim=arguments.head_dim, layer_num=arguments.layers, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip
    info = device.get_device_pool_infos()[0].buffer_info
    with host_memory_budget_scope(64 << 30):
        pool = get_mha_host_pool_cls(info)(
            info, 1.0, 0, page, arguments.layout, pin_memory=False,
            device_capacity_tokens=size, start_layer=0, end_layer=arguments.layers,
        )  # fmt: skip
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    return pool


def make_config(socket: Path) -> HiCacheStorageConfig:
    """Of one rank."""
    extra = {"kvist.cache": str(socket), "kvist.model": "benchmark", "interface_v1": 1}
    return HiCacheStorageConfig(
        0, 1, 0, 1, 0, 1, False, False, False, "benchmark", extra_config=extra
    )


class Rounds:
    """Times of each backend's stores and loads.

    Args:
        pool: first half stored, second half loaded into.
    """

    def __init__(self, pool: Any, pages: int) -> None:
        self._pool = pool
        half = pages * pool.page_size
        self._from, self._to = torch.arange(half), torch.arange(half, 2 * half)
        self._pages = pages
        self.seconds: dict[str, list[float]] = {}
        self.page_bytes = pool.get_data_page(0).nbytes
        self._out = np.zeros(pages * self.page_bytes, np.uint8)

    def copy(self) -> None:
        """numpy's copy of the pages to memory outside of the pool."""
        view = self._pool.kv_buffer.view(torch.uint8).numpy().reshape(-1)
        self._time("memcpy", lambda: np.copyto(self._out, view[: self._out.nbytes]))

    def backend(self, name: str, storage: Any, number: int) -> None:
        """A round of one backend; its pages are checked after."""
        keys = [
            hashlib.sha256(f"{name}/{number}/{at}".encode()).hexdigest()
            for at in range(self._pages)
        ]
        extra = HiCacheStorageExtraInfo([])
        for what, call, indices in (
            ("set", storage.batch_set_v2, self._from),
            ("get", storage.batch_get_v2, self._to),
        ):
            transfer = PoolTransfer(PoolName.KV, host_indices=indices, keys=keys)
            done = self._time(f"{name}.{what}", functools.partial(call, [transfer], extra))
            if not all(done[PoolName.KV]):
                raise SystemExit(f"{name}: {done[PoolName.KV].count(False)} pages failed: {what}")
        for start in self._from[:: self._pool.page_size].tolist():
            there = start + len(self._from)
            same = self._pool.get_data_page(start), self._pool.get_data_page(there)
            if not torch.equal(*same):
                raise SystemExit(f"{name}: a page came back as another")
            self._pool.set_from_flat_data_page(there, torch.zeros_like(same[0]))

    def _time(self, name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def report(self, warmup: int) -> dict[str, Any]:
        """Medians behind the warm-up, spread as the quartiles' distance over the median."""
        total = self._pages * self.page_bytes
        kept = {name: sorted(times[warmup:]) for name, times in self.seconds.items()}
        copy = statistics.median(kept["memcpy"])
        return {
            name: {
                "gb_per_s": round(total / statistics.median(times) / 1e9, 2),
                "of_memcpy": round(copy / statistics.median(times), 3),
                "spread": round(
                    (times[len(times) * 3 // 4] - times[len(times) // 4])
                    / statistics.median(times), 2,
                ),
            }
            for name, times in kept.items()
        }  # fmt: skip


def run(arguments: argparse.Namespace, socket: Path, rounds: Rounds, pool: Any) -> None:
    """All rounds."""
    kvist, file = KvistStorage(make_config(socket)), HiCacheFile(make_config(socket))
    for storage in (kvist, file):
        storage.register_mem_pool_host(pool)
        storage.register_mem_host_pool_v2(pool, PoolName.KV)
    for number in range(WARMUP + arguments.rounds):
        rounds.copy()
        rounds.backend("kvist", kvist, number)
        rounds.backend("file", file, number)
        file.clear()
    kvist.close()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="page_first_direct")
    parser.add_argument("--page-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--pages", type=int, default=64, help="of a call")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where HiCacheFile writes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(
            arguments.folder or folder / "files"
        )
        pool = make_pool(arguments)
        rounds = Rounds(pool, arguments.pages)
        dram = 4 * arguments.pages * (rounds.page_bytes + 8192)
        settings = {"dram_bytes": str(dram), "flash_path": ""}
        sidecar = LocalSidecar(folder / "sidecar", settings)
        sidecar.start()
        try:
            sidecar.wait_ready()
            run(arguments, sidecar.socket, rounds, pool)
        finally:
            sidecar.stop()
    found = rounds.report(WARMUP)
    print(
        json.dumps(
            {
                "layout": arguments.layout, "page_bytes": rounds.page_bytes,
                "pages": arguments.pages, "rounds": arguments.rounds, **found,
                "kvist_over_file": {
                    what: round(
                        found[f"kvist.{what}"]["gb_per_s"] / found[f"file.{what}"]["gb_per_s"], 2
                    )
                    for what in ("set", "get")
                },
            }
        ),
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
