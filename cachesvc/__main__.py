"""kvistd, the sidecar: reads its settings, builds the objects and wires them together."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import uvloop

from kvist.cachesvc.api.answers import Answers
from kvist.cachesvc.api.desk import Desk
from kvist.cachesvc.api.service import CacheService, Server
from kvist.cachesvc.config import SidecarConfig, add_flags, as_toml, load_config
from kvist.cachesvc.core.beat import Beat, call_on
from kvist.cachesvc.core.space import check_space
from kvist.cachesvc.core.store import Store, StoreConfig, StoreStats
from kvist.cachesvc.events.figures import event_use
from kvist.cachesvc.events.journal import Journal
from kvist.cachesvc.events.publisher import Publisher
from kvist.cachesvc.folders import OwnedFolder, sweep
from kvist.cachesvc.log import Log, debug_detail
from kvist.cachesvc.tracer import Tracer, open_tracer
from kvist.cachesvc.view.dashboard import Dashboard
from kvist.cachesvc.view.document import Document
from kvist.cachesvc.view.metrics import Metrics
from kvist.proto.errors import ConfigInvalid, FormatRefused, KvistError
from kvist.proto.numa import chosen_nodes, memory_nodes
from kvist.tiers.flash_clear import clear_directory

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2
# Figures that are not there in 2 s are no use to a page that asks each second.
STATS_TIMEOUT_S = 2.0
ARENA_PREFIX = "kvistd-"


def main(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> int:
    """Run kvistd; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="kvistd",
        description="Kvist's sidecar: owns the DRAM and flash cache of a node.",
        epilog="Every setting can also stand in the file or, as KVIST_NAME, in the environment.",
        allow_abbrev=False,  # --flash-byte is a slip of the pen, and next year perhaps ambiguous
    )
    parser.add_argument("--version", action="version", version=f"kvistd {version('kvist')}")
    parser.add_argument("--print-config", action="store_true", help="print the settings, as TOML")
    parser.add_argument("--clear-flash", action="store_true", help="empty the flash folder")
    add_flags(parser)
    flags = parser.parse_args(arguments)
    try:
        loaded = load_config(flags, environment)
        if flags.print_config:
            sys.stdout.write(as_toml(loaded))
            return EXIT_OK
        if flags.clear_flash:
            return clear_flash(loaded.config)
        return run(loaded.config, debug_detail("cachesvc", environment))
    except (ConfigInvalid, FormatRefused) as error:
        print(f"kvistd: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except (KvistError, OSError) as error:
        print(f"kvistd: {error}", file=sys.stderr)
        return EXIT_FAILED


def clear_flash(config: SidecarConfig) -> int:
    """Remove Kvist's files from the flash folder, unless a process uses them."""
    if config.flash_path is None:
        raise ConfigInvalid("flash_path: not set; say which folder to clear")
    clear_directory(config.flash_path)
    print(f"kvistd: {config.flash_path} is clear")
    return EXIT_OK


def run(config: SidecarConfig, detail: int = 0) -> int:
    """Take a folder in memory, serve until a signal comes, leave nothing behind.

    Args:
        detail: of the log, see cachesvc/log.py.
    """
    os.umask(0o077)
    log = Log(sys.stderr, config.log_level, config.log_format, detail=detail)
    with ExitStack() as stack:
        # Several sidecars may share shm_dir: each life has a folder of its own in it.
        swept = sweep(config.shm_dir, ARENA_PREFIX)
        if swept:
            log.info("left-over arenas removed", shm_dir=config.shm_dir, folders=swept)
        check_space(config)
        name = f"{ARENA_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        arena_folder = OwnedFolder(config.shm_dir / name)
        stack.callback(arena_folder.remove)
        _make_socket_folder(config.socket)
        return uvloop.run(serve(config, arena_folder.path, log))


async def serve(config: SidecarConfig, arena_folder: Path, log: Log) -> int:
    """The wiring diagram: store, beat, service, page; and their end in the other order."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        log.error("store failed", trace="".join(traceback.format_exception(error)))
        stop.set()

    def read() -> StoreStats:
        stats = call_on(loop, store.stats, STATS_TIMEOUT_S)
        return stats if publisher is None else replace(stats, kv_events=event_use(publisher))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        publisher = _open_events(config, log, stack)
        journal = None if publisher is None else publisher.journal
        settings = replace(store_config(config, arena_folder), journal=journal)
        store = Store(settings, loop.call_soon_threadsafe, time.monotonic, log)
        store.on_made = freeze
        store.open()
        stack.callback(store.close)
        beat = Beat(loop, store, fail)
        beat.start(store.bell_path)
        stack.callback(beat.stop)
        tracer = _open_tracer(config, stack)
        desk = Desk(loop, Answers(store), beat, fail)
        desk.tracer = tracer
        desk.start(store.calls_path)
        stack.callback(desk.stop)
        document = Document(read, version("kvist"))
        service = CacheService(store, beat, fail, document.text)
        server = Server(service, config.socket, config.listen, tracer)
        await server.start()
        stack.push_async_callback(server.stop)
        calls = {"grpc": server.calls, "packet": desk.calls}
        metrics = Metrics(read, calls, version("kvist"))
        page_url = _open_page(config, document, metrics, stack)
        freeze()
        _say_ready(log, config, server.listen, page_url)
        await stop.wait()
        log.info("stopping")
    log.info("stopped")
    return EXIT_FAILED if failures else EXIT_OK


def _open_events(config: SidecarConfig, log: Log, stack: AsyncExitStack) -> Publisher | None:
    """Who publishes a store's events, ended by stack; None: events are off.

    Raises: ConfigInvalid: an address cannot be bound.
    """
    events = config.kv_events_config
    if events is None:
        return None
    publisher = Publisher(events, Journal(), log)
    stack.callback(publisher.close)
    replay = events.replay_endpoint or "off"
    log.info("kv events on", endpoint=events.endpoint, replay=replay, topic=events.topic)
    return publisher


def _open_page(
    config: SidecarConfig, document: Document, metrics: Metrics, stack: AsyncExitStack
) -> str:
    """Where the page answers, ended by stack; "": there is none. Raises: ConfigInvalid."""
    if not config.http_listen:
        return ""
    page = Dashboard(config.http_listen, document, metrics.text)
    page.start()
    # The page's threads wait for the loop, so the loop must not wait for them.
    stack.push_async_callback(asyncio.to_thread, page.close)
    return page.url


def _open_tracer(config: SidecarConfig, stack: AsyncExitStack) -> Tracer | None:
    """The tracer, ended by stack; None: traces are off. Raises: ConfigInvalid."""
    tracer = open_tracer("otlp_endpoint", config.otlp_endpoint, "kvistd")
    if tracer is not None:
        stack.push_async_callback(asyncio.to_thread, tracer.close)
    return tracer


def freeze() -> None:
    """What lives now lives as long as the process: the collector need not look at it again.

    Also called when the tables are made, which may be at the first attach: their list of leaves may
    come to have millions of entries, all of which a full collection would look at (8 ms a million).
    """
    gc.collect()
    gc.freeze()


def store_config(config: SidecarConfig, arena_folder: Path) -> StoreConfig:
    """The part of the settings that the store knows. Raises: ConfigInvalid: no such NUMA node."""
    return StoreConfig(
        run_dir=config.run_dir,
        shm_dir=arena_folder,
        dram_bytes=config.dram_bytes,
        dram_nodes=chosen_nodes(config.dram_numa, memory_nodes(), os.sched_getaffinity(0)),
        flash_path=config.flash_path,
        flash_bytes=config.flash_bytes,
        slot_bytes=config.slot_bytes,
        flash_admission=config.flash_admission,
        flash_write_bytes_per_day=config.flash_write_bytes_per_day,
        flash_write_burst_bytes=config.flash_write_burst_bytes,
        io_threads=config.io_threads,
        flash_queue_blocks=config.flash_queue_blocks,
        tenants=config.tenants,
        pin_bytes=config.pin_bytes,
        reservation_share=config.reservation_share,
        eviction=config.eviction,
        dram_verify=config.dram_verify,
        flash_verify=config.flash_verify,
        show_tokens=config.page_tokens == "shown",
    )


def _say_ready(log: Log, config: SidecarConfig, listen: str, page_url: str) -> None:
    log.info(
        "ready",
        socket=config.socket,
        listen=listen or "off",
        page=page_url or "off",
        metrics=f"{page_url}metrics" if page_url else "off",
        start_ms=round(1000 * (time.clock_gettime(time.CLOCK_BOOTTIME) - _started_s())),
    )


def _started_s() -> float:
    """When the kernel started this process, seconds since boot; to 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _make_socket_folder(socket: Path) -> None:
    try:
        socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigInvalid(
            f"socket: cannot make {socket.parent}: {error.strerror}; give a path of this user"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
