"""Opening a core: model, pool, cache and the limits that follow from them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvist.cachesvc.client import CacheClient, open_cache
from kvist.cachesvc.events.journal import Journal
from kvist.cachesvc.events.publisher import Publisher
from kvist.cachesvc.events.settings import checked_kv_events
from kvist.cachesvc.log import Log
from kvist.engine.config import CACHE_EMBEDDED, CACHE_OFF, EngineConfig
from kvist.engine.connector import Connector
from kvist.engine.models.base import ModelConfig
from kvist.engine.models.build import build_model, compute_tag, kernels_of, quantization_of
from kvist.engine.pages import Pages
from kvist.engine.request import Ready
from kvist.engine.runner import Runner
from kvist.engine.sampler import Sampler
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

# Share of the free memory that the pool takes when nothing is said: the cache's own memory, the
# API process and the file cache want room too.
POOL_SHARE = 0.25
POOL_BYTES_MAX = 4 << 30
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
        events: tells routers what the tiers hold, None when that is off; to be closed last.
    """

    runner: Runner
    pages: Pages
    connector: Connector
    limits: Limits
    format: BlockFormat
    digests: Digests
    dtype: str
    kernels: str = ""
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
            kernels=self.kernels,
        )


def open_parts(
    config: EngineConfig,
    log: Log,
    now: Callable[[], float],
    progress: Callable[[int, int], None] | None = None,
) -> Parts:
    """Load the model, size and make the pool, open the cache.

    Args:
        config: checked settings.
        log: where the opening is told.
        now: clock of waiting times, seconds.
        progress: see kvist.engine.weights.load_model.

    Raises:
        ConfigInvalid: a setting does not fit the model or the machine.
        ModelFilesError: the model cannot be loaded.
    """
    started = now()
    loaded = load_model(config.model, config.dtype, progress, quantization_of(config))
    kv_dtype = kv_dtype_of(config, loaded)
    model = build_model(config, loaded, kv_dtype)
    namespace = namespace_of(loaded, config.block_tokens, kv_dtype)
    # Not info: the line would break into the bar that the API process draws on the terminal.
    log.debug("model loaded", dtype=loaded.dtype, seconds=now() - started)
    count = pool_pages(config, namespace.format, free_memory_bytes())
    limits = limits_of(config, loaded.config, count)
    pool = PagePool(namespace.format, count)
    threading.Thread(
        target=pool.prefault, args=(threading.Event(),), name="kvist-pool", daemon=True
    ).start()
    pages = Pages(count)
    events = open_events(config, pages, log)
    cache = open_tiers(config, namespace, log, pages.journal)
    connector = Connector(cache, pool.page_bytes, pages, log, now)
    format = namespace.format
    connector.weigher = Weigher(format.layers, format.payload_bytes, format.block_tokens)
    connector.weigher.by_layers = config.cache_overlap
    runner = Runner(model, pool.tensor, Sampler(config.seed))
    digests, kernels = Digests(namespace), kernels_of(model, loaded)
    return Parts(runner, pages, connector, limits, format, digests, loaded.dtype, kernels, events)


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


def namespace_of(loaded: LoadedModel, block_tokens: int, kv_dtype: str) -> Namespace:
    """What the KV of this model, computed by this program on this machine, is."""
    return Namespace(
        model=loaded.fingerprint,
        format=loaded.block_format(block_tokens, kv_dtype),
        rope=f"theta={loaded.config.rope_theta}",
        compute=compute_tag(loaded.config, loaded.dtype, kv_dtype),
    )


def kv_dtype_of(config: EngineConfig, loaded: LoadedModel) -> str:
    """Dtype of K and V in all tiers.

    With nothing said bfloat16, whatever the processor computes fastest in: half the bytes to
    hold and to move. Who asks for a dtype gets it for K and V too, unless he says otherwise.
    """
    if config.kv_cache_dtype != "auto":
        return config.kv_cache_dtype
    return "bfloat16" if config.dtype == "auto" else loaded.dtype


def pool_pages(config: EngineConfig, format: BlockFormat, free_bytes: int) -> int:
    """Pages of the pool: as many as the setting, or a share of the free memory, has room for.

    Raises:
        ConfigInvalid: not even one.
    """
    size = config.kv_cache_bytes
    if size is None:
        taken = config.cache_dram_bytes if config.cache == CACHE_EMBEDDED else 0
        size = min(int((free_bytes - taken) * POOL_SHARE), POOL_BYTES_MAX)
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
    config: EngineConfig, namespace: Namespace, log: Log, journal: Journal | None = None
) -> CacheClient | None:
    """Open the cache beyond the pool; None when it is off.

    Args:
        journal: where an embedded cache writes what its tiers hold.

    Raises:
        ConfigInvalid: the address cannot be used, or the embedded cache has no room.
    """
    if config.cache == CACHE_OFF or not config.enable_prefix_caching:
        return None
    name = f"kvist-{os.getpid()}"
    if config.cache == CACHE_EMBEDDED:
        client = _open_embedded(config, namespace, name, log, journal)
    else:
        page = PoolPage(namespace.format)
        client = open_cache(config.cache, namespace, name, log, page, config.model_names[0])
    client.pace = Pace(config.cache_load_bytes_per_s, config.cache_store_bytes_per_s)
    # A sidecar that is there answers in milliseconds; one that is not comes when it comes.
    client.wait_attached(ATTACH_WAIT_S)
    return client


def _open_embedded(
    config: EngineConfig, namespace: Namespace, name: str, log: Log, journal: Journal | None
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
    return open_embedded(
        store, namespace, name, log, PoolPage(namespace.format), config.model_names[0]
    )


def free_memory_bytes() -> int:
    """Memory that can still be taken: the machine's, cut by a cgroup limit if there is one."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass
    return free
