"""Opening a core: model, pool, cache and the limits that follow from them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.events.journal import Journal
from kvist.cachesvc.events.publisher import Publisher
from kvist.cachesvc.events.settings import checked_kv_events
from kvist.cachesvc.log import Log
from kvist.engine.backend import Backend, CpuBackend, Progress
from kvist.engine.cache_address import CACHE_EMBEDDED, CACHE_OFF
from kvist.engine.cache_words import cache_words
from kvist.engine.config import EngineConfig
from kvist.engine.connector import Connector
from kvist.engine.device.found import CPU, Device, find_device
from kvist.engine.device.near import near
from kvist.engine.kv_dtype import KV_DTYPES, is_float8
from kvist.engine.models.base import ModelConfig
from kvist.engine.models.build import compute_tag
from kvist.engine.pages import Pages
from kvist.engine.request import Ready
from kvist.engine.runner import StepRunner
from kvist.engine.sequence import Digests, Limits
from kvist.engine.trial_page import PoolPage
from kvist.engine.weighing import Weigher
from kvist.engine.weights import LoadedModel, load_model
from kvist.proto.errors import ConfigInvalid
from kvist.proto.keys import Namespace
from kvist.proto.layout import BlockFormat
from kvist.proto.sizes import format_bytes
from kvist.tiers.hbm import PagePool
from kvist.transfer.pace import Pace

ATTACH_WAIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What a core works with.

    Attributes:
        runner: computes steps.
        pages: the pool's books.
        connector: to the cache; to be closed.
        limits: of every sequence.
        format: of a page.
        digests: namespaces by tenant.
        dtype: what is computed in.
        kernels: what computes, for people.
        device: where it computes.
        memory: what is left there, for people.
        kv_scale: see EngineConfig.kv_cache_scale.
        cache: the tiers beyond the pool, for people.
        events: tells routers what the tiers hold, None when that is off; to be closed last.
    """

    runner: StepRunner
    pages: Pages
    connector: Connector
    limits: Limits
    format: BlockFormat
    digests: Digests
    dtype: str
    kernels: str = ""
    device: Device = CPU
    memory: str = ""
    kv_scale: float = 1.0
    cache: str = ""
    events: Publisher | None = None

    def close(self) -> None:
        """Let the cache go, and then tell routers so."""
        self.connector.close()
        if self.events is not None:
            self.events.close()

    def ready(self) -> Ready:
        """What the API process needs to know."""
        return Ready(
            max_model_len=self.limits.max_model_len,
            block_tokens=self.limits.block_tokens,
            pages=self.pages.total,
            page_bytes=self.format.payload_bytes,
            dtype=self.dtype,
            kv_dtype=self.format.dtype,
            namespace=self.digests.of("").hex(),
            kv_scale=self.kv_scale,
            cache=self.cache,
            kernels=self.kernels,
            device=", ".join(filter(None, (self.device.name, self.memory))),
        )


def open_parts(
    config: EngineConfig,
    log: Log,
    now: Callable[[], float],
    progress: Progress | None = None,
) -> Parts:
    """Load the model, size and make the pool, open the cache.

    Args:
        config: checked settings.
        log: where the opening is told.
        now: clock of waiting times, seconds.
        progress: told how far the start has come.

    Raises:
        ConfigInvalid: a setting does not fit the model or the machine.
        ModelFilesError: the model cannot be loaded.
    """
    started = now()
    tell = progress or _silent
    backend = open_backend(config)
    built = _build(config, backend, tell)
    # Not info: the line would break into the bar that the API process draws on the terminal.
    log.debug("model loaded", dtype=built.dtype, seconds=now() - started)
    namespace, format = built.namespace, built.namespace.format
    count = pool_pages(config, format, backend.pool_bytes)
    limits = limits_of(config, built.shape, count)
    pool = PagePool(format, count, backend.device.torch)
    _prefault(pool)
    pages = Pages(count)
    runner = backend.runner(pool, limits, tell)
    copies, pinner = backend.copies(pool, log)
    page = PoolPage(format, backend.device.torch, pinner)
    events = open_events(config, pages, log)
    with near(backend.device):
        cache = open_tiers(config, namespace, log, page, pages.journal)
        connector = Connector(cache, copies, pages, log, now)
    connector.weigher = _weigher(config, format, copies.run_bytes)
    return Parts(
        runner=runner, pages=pages, connector=connector, limits=limits, format=format,
        digests=Digests(namespace), dtype=built.dtype, kernels=built.kernels,
        device=backend.device, memory=backend.memory(), kv_scale=config.kv_cache_scale,
        cache=cache_words(config, cache), events=events,
    )  # fmt: skip


def open_events(config: EngineConfig, pages: Pages, log: Log) -> Publisher | None:
    """The publisher of KV events, with a journal that pages writes to; None when it is off.

    Raises:
        ConfigInvalid: an address cannot be bound.
    """
    settings = checked_kv_events(config.kv_events_config)
    if settings is None or not config.enable_prefix_caching:
        return None
    pages.journal = Journal()
    return Publisher(settings, pages.journal, log)


def _prefault(pool: PagePool) -> None:
    stop = threading.Event()  # never set: the process ends first
    threading.Thread(target=pool.prefault, args=(stop,), name="kvist-pool", daemon=True).start()


def _weigher(config: EngineConfig, format: BlockFormat, run_bytes: int) -> Weigher:
    weigher = Weigher(format.layers, format.payload_bytes, format.block_tokens, run_bytes)
    weigher.by_layers = config.cache_overlap
    return weigher


class _Built(NamedTuple):
    """What is known of a model that a backend has built."""

    namespace: Namespace
    shape: ModelConfig
    dtype: str
    kernels: str


def _build(config: EngineConfig, backend: Backend, progress: Progress) -> _Built:
    """Load a model and have it built; where the backend has its own, the weights go with this."""
    loaded = load_model(config.model, backend.dtype, progress, backend.quantization())
    kv_dtype = kv_dtype_of(config, loaded)
    backend.build(loaded, kv_dtype)
    compute = backend.compute(loaded, kv_dtype)
    namespace = namespace_of(loaded, config.block_tokens, kv_dtype, compute)
    return _Built(namespace, loaded.config, loaded.dtype, backend.kernels(loaded))


def _silent(done: int, total: int, what: str = "") -> None:
    """Nobody is told."""


def open_backend(config: EngineConfig) -> Backend:
    """What --device stands for; raises ConfigInvalid when it is not there, or its kernels do not
    read pages of --kv-cache-dtype."""
    device = find_device(config.device)
    if device.host:
        if is_float8(config.kv_cache_dtype):
            raise ConfigInvalid(
                f"--kv-cache-dtype {config.kv_cache_dtype}: kernels for processors read bfloat16, "
                "float16 and float32; leave it out, or give --device cuda where there is one"
            )
        return CpuBackend(config)
    # Here and not at the top: an engine on a CPU starts without Triton.
    from kvist.engine.device.backend import DeviceBackend

    return DeviceBackend(config, device)


def namespace_of(
    loaded: LoadedModel, block_tokens: int, kv_dtype: str, compute: str | None = None
) -> Namespace:
    """What the KV of this model, computed by this program on this machine, is.

    Args:
        loaded: the model. block_tokens: of a page. kv_dtype: of K and V.
        compute: see Namespace; None is what a processor computes with.
    """
    return Namespace(
        model=loaded.fingerprint,
        format=loaded.block_format(block_tokens, kv_dtype),
        rope=f"theta={loaded.config.rope_theta}",
        compute=compute or compute_tag(loaded.config, loaded.dtype, kv_dtype),
    )


def kv_dtype_of(config: EngineConfig, loaded: LoadedModel) -> str:
    """Dtype of K and V in all tiers.

    With nothing said bfloat16, whatever the processor computes fastest in: half the bytes to
    hold and to move. Who asks for a dtype gets it for K and V too, unless he says otherwise.
    """
    if config.kv_cache_dtype != "auto":
        return KV_DTYPES[config.kv_cache_dtype]
    return "bfloat16" if config.dtype == "auto" else loaded.dtype


def pool_pages(
    config: EngineConfig, format: BlockFormat, room: Callable[[BlockFormat], int]
) -> int:
    """Pages of the pool: as many as the setting has room for.

    Args:
        room: bytes for pages when nothing is set; asked only then.

    Raises:
        ConfigInvalid: not even one.
    """
    size = room(format) if config.kv_cache_bytes is None else config.kv_cache_bytes
    if size < format.payload_bytes:
        raise ConfigInvalid(
            f"--kv-cache-memory-bytes: {format_bytes(max(size, 0))} holds no page; one of "
            f"{format.block_tokens} tokens needs {format_bytes(format.payload_bytes)}"
        )
    return size // format.payload_bytes


def limits_of(config: EngineConfig, model: ModelConfig, pages: int) -> Limits:
    """Limits of a sequence: what the model can, what was asked for, what fits the pool alone.

    Raises:
        ConfigInvalid: more was asked for than the model or the pool can hold.
    """
    room = pages * config.block_tokens
    asked = config.max_model_len
    if asked is not None and asked > model.max_model_len:
        raise ConfigInvalid(
            f"--max-model-len: {asked} is more than the model's {model.max_model_len}"
        )
    if asked is not None and asked > room:
        raise ConfigInvalid(
            f"--max-model-len: {asked} tokens do not fit the pool of {pages} pages of "
            f"{config.block_tokens}; raise --kv-cache-memory-bytes or ask for {room} at most"
        )
    longest = min(asked or model.max_model_len, room)
    return Limits(longest, config.block_tokens, model.eos_token_ids)


def open_tiers(
    config: EngineConfig,
    namespace: Namespace,
    log: Log,
    page: PoolPage,
    journal: Journal | None = None,
) -> CacheClient | None:
    """Open the cache beyond the pool; None when it is off.

    Args:
        config: checked settings. namespace: of the blocks. log: for the client.
        page: for the trial.
        journal: where an embedded cache writes what its tiers hold.

    Raises:
        ConfigInvalid: the address cannot be used, or the embedded cache has no room.
    """
    if config.cache == CACHE_OFF or not config.enable_prefix_caching:
        return None
    name = f"kvist-{os.getpid()}"
    if config.cache == CACHE_EMBEDDED:
        client = _open_embedded(config, namespace, name, log, page, journal)
    else:
        client = open_cache(config.cache, namespace, name, log, page, config.model_names[0])
    client.pace = Pace(config.cache_load_bytes_per_s, config.cache_store_bytes_per_s)
    # A sidecar that is there answers in milliseconds; one that is not comes when it comes.
    client.wait_attached(ATTACH_WAIT_S)
    return client


def _open_embedded(
    config: EngineConfig,
    namespace: Namespace,
    name: str,
    log: Log,
    page: PoolPage,
    journal: Journal | None,
) -> CacheClient:
    # Here and not at the top: an engine with a sidecar needs no store in its own process.
    from kvist.cachesvc.embedded import StoreConfig, open_embedded

    flash = Path(config.cache_flash_path) if config.cache_flash_bytes else None
    store = StoreConfig(
        run_dir=Path(),  # open_embedded puts a private folder in place of both
        shm_dir=Path(),
        dram_bytes=config.cache_dram_bytes,
        flash_path=flash,
        flash_bytes=config.cache_flash_bytes,
        slot_bytes=None,
        journal=journal,
    )
    return open_embedded(store, namespace, name, log, page, config.model_names[0])
