"""`kvist serve`: two processes, started, watched and ended together."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import version
from typing import Any

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from kvist.cachesvc.log import Log
from kvist.cachesvc.tracer import Tracer, open_tracer
from kvist.engine.api import create_app
from kvist.engine.config import EngineConfig
from kvist.engine.ipc import CoreLink
from kvist.engine.kv_dtype import KV_DTYPES
from kvist.engine.logs import LibraryLines, open_log
from kvist.engine.process import CoreProcess
from kvist.engine.request import Fatal, FromCore, Loading, Ready
from kvist.engine.service import Clock, Service
from kvist.engine.stats import EngineMetrics, Pace
from kvist.engine.tokenizer import Tokenizer, load_tokenizer
from kvist.engine.tracing import TraceRequests
from kvist.proto.errors import ConfigInvalid, KvistError
from kvist.proto.sizes import format_bytes

PACE_SECONDS = 10.0
# A core that dies says why first; this is how long its last words may be on the way.
LAST_WORDS_SECONDS = 0.1
FLUSH_SECONDS = 5


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: when to stop is the supervisor's to say."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class EngineServer:
    """The API process's life, from the first line to the exit code.

    Args:
        config: checked settings.
        core: the process that will compute; not started yet.
        console: for the few lines that say what is going on while it starts.
        log: for what comes after.
    """

    def __init__(self, config: EngineConfig, core: CoreProcess, console: Console, log: Log) -> None:
        self._config = config
        self._core = core
        self._console = console
        self._log = log
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._tracer: Tracer | None = None

    async def run(self) -> int:
        """Serve until a signal comes or the core dies.

        Returns:
            0 after SIGTERM or SIGINT, 1 when the core could not start or died.

        Raises:
            ConfigInvalid: the address cannot be listened on.
        """
        listener = bind(self._config.host, self._config.port)
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._on_signal)
        metrics = EngineMetrics(CollectorRegistry(), self._config.model_names[0], time.monotonic)
        ProcessCollector(registry=metrics.others)
        endpoint = self._config.otlp_traces_endpoint
        self._tracer = open_tracer("--otlp-traces-endpoint", endpoint, "kvist")
        self._announce()
        with listener, tempfile.TemporaryDirectory(prefix="kvist-") as folder:
            endpoint = f"ipc://{folder}/core"
            link = CoreLink(endpoint, metrics.observe_outputs)
            try:
                # The core has no use for the key, so it does not get it.
                await self._core.start(dataclasses.replace(self._config, api_key=None), endpoint)
                return await self._run_with(link, listener, metrics)
            finally:
                await self._core.stop()
                link.close()
                if self._tracer is not None:
                    await asyncio.to_thread(self._tracer.close)

    async def _run_with(
        self, link: CoreLink, listener: socket.socket, metrics: EngineMetrics
    ) -> int:
        died = asyncio.create_task(self._core.wait())
        stop = asyncio.create_task(self._stop.wait())
        try:
            started = await self._load(link, died, stop)
            if started is None:
                return 0
            ready, tokenizer = started
            metrics.observe_ready(ready, self._config.enable_prefix_caching)
            clock = Clock(time.time, lambda: secrets.token_hex(12))
            names = self._config.model_names
            service = Service(link, ready, tokenizer, names, metrics, clock)
            failed = asyncio.create_task(self._watch(link, died))
            pace = asyncio.create_task(self._log_pace(link))
            try:
                return await self._serve(service, link, listener, failed, stop)
            finally:
                await _cancel(failed, pace)
        except KvistError as error:
            self._console.print(f"kvist serve: {error}", style="red")
            return 1
        finally:
            await _cancel(died, stop)

    async def _load(
        self, link: CoreLink, died: asyncio.Task[str], stop: asyncio.Task[bool]
    ) -> tuple[Ready, Tokenizer] | None:
        """Wait for the core and the tokenizer; None when a signal came first.

        Raises:
            KvistError: one of them failed; the message says why.
        """
        with self._progress() as tell:
            core = asyncio.create_task(self._first_words(link, died, tell))
            tokenizer = asyncio.create_task(asyncio.to_thread(load_tokenizer, self._config.model))
            both = asyncio.gather(core, tokenizer)
            try:
                await asyncio.wait((both, stop), return_when=asyncio.FIRST_COMPLETED)
                if not both.done():
                    return None
                ready, loaded = both.result()
            except (OSError, ValueError) as error:
                raise KvistError(f"cannot load the tokenizer: {error}") from None
            finally:
                await _cancel(both, core, tokenizer)
        self._announce_ready(ready)
        return ready, loaded

    async def _first_words(
        self, link: CoreLink, died: asyncio.Task[str], tell: Callable[[Loading], None]
    ) -> Ready:
        async def listen() -> FromCore:
            while isinstance(message := await link.receive(), Loading):
                tell(message)
            return message

        words = asyncio.create_task(listen())
        await asyncio.wait((words, died), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((words,), timeout=LAST_WORDS_SECONDS)
        if not words.done():
            await _cancel(words)
            raise KvistError(f"{died.result()} before it was ready")
        message = words.result()
        if isinstance(message, Ready):
            return message
        text = message.message if isinstance(message, Fatal) else "the engine core spoke too early"
        raise KvistError(text)

    async def _watch(self, link: CoreLink, died: asyncio.Task[str]) -> str:
        """Hand on the core's outputs until it ends; say why it did."""

        async def listen() -> str:
            while True:
                message = await link.receive()
                if isinstance(message, Fatal):
                    return message.message

        words = asyncio.create_task(listen())
        try:
            await asyncio.wait((words, died), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((words,), timeout=LAST_WORDS_SECONDS)
            reason = words.result() if words.done() else died.result()
        except Exception as error:
            reason = f"the engine core cannot be understood: {error}"
        finally:
            await _cancel(words)
        link.fail(reason)
        return reason

    async def _serve(
        self,
        service: Service,
        link: CoreLink,
        listener: socket.socket,
        failed: asyncio.Task[str],
        stop: asyncio.Task[bool],
    ) -> int:
        app = create_app(service, version("kvist"), self._config.api_key)
        if self._tracer is not None:
            app = traced = TraceRequests(app, self._tracer)
            link.on_notes = traced.observe
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        http = _Http(settings)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        while not http.started and not serving.done():
            await asyncio.sleep(0.005)
        self._console.print(f"Ready    {url_of(listener)}", style="bold")
        await asyncio.wait((serving, failed, stop), return_when=asyncio.FIRST_COMPLETED)
        if not failed.done():
            await self._drain(service, link, failed)
        link.fail("the server is shutting down")
        http.should_exit = True
        await serving
        if failed.done():
            self._console.print(f"kvist serve: {failed.result()}", style="red")
            return 1
        return 0

    async def _drain(self, service: Service, link: CoreLink, failed: asyncio.Task[str]) -> None:
        service.drain()
        if not link.live:
            return
        self._log.info("draining", requests=link.live, hint="a second signal ends them now")
        hurry = asyncio.create_task(self._hurry.wait())
        deadline = time.monotonic() + self._config.drain_seconds
        while link.live and not failed.done() and time.monotonic() < deadline:
            done, _ = await asyncio.wait((hurry,), timeout=0.02)
            if done:
                break
        await _cancel(hurry)

    async def _log_pace(self, link: CoreLink) -> None:
        pace = Pace(time.monotonic)
        while True:
            await asyncio.sleep(PACE_SECONDS)
            line = pace.line(link.stats)
            if line is not None:
                self._log.info("pace", now=line)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _announce(self) -> None:
        config = self._config
        self._console.print(f"{'Model':<8} {config.model}, {config.threads} threads")

    def _announce_ready(self, ready: Ready) -> None:
        """What follows from the model and the machine, which only the core knows."""
        for name, text in (
            (
                "Dtype",
                f"{ready.dtype}, K and V {_kv_dtype(ready)}; namespace {ready.namespace[:12]}",
            ),
            ("Device", ready.device),
            ("Kernels", ready.kernels),
            (
                "Pages",
                f"{ready.pages} of {ready.block_tokens} tokens and "
                f"{format_bytes(ready.page_bytes)}, {format_bytes(ready.pages * ready.page_bytes)}"
                f" in all; context {ready.max_model_len} tokens",
            ),
            ("Cache", ready.cache),
        ):
            self._console.print(f"{name:<8} {text}")

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[Loading], None]]:
        """A bar on a terminal, a line elsewhere; yields what moves the bar."""
        if not self._console.is_terminal:
            self._console.print("Loading  ...")
            # What comes after the tensors is told when it is done: a line for each would be noise.
            yield (
                lambda loading: (
                    self._console.print(f"{'':<8} {loading.what}")
                    if loading.what and loading.done == loading.total
                    else None
                )
            )
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            # Without a total the bar pulses: that is the time until the core's first word.
            bar = progress.add_task("Loading", total=None)
            yield lambda loading: progress.update(
                bar,
                completed=loading.done,
                total=loading.total,
                description=loading.what or "Loading",
            )


async def _cancel(*work: Awaitable[Any]) -> None:
    for item in work:
        if isinstance(item, asyncio.Future):
            item.cancel()
    await asyncio.gather(*work, return_exceptions=True)


def bind(host: str, port: int) -> socket.socket:
    """Take the address before the model loads, so that a taken port is known at once.

    Raises:
        ConfigInvalid: it cannot be taken; the message names the flag.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigInvalid(f"--host: {host!r} is no address of this machine ({error})") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigInvalid(
            f"--port: cannot listen on {host}:{port} ({error.strerror}); "
            "give another port, or 0 for any free one"
        ) from None
    return listener


def _kv_dtype(ready: Ready) -> str:
    """What K and V are in, with the scale where there can be one."""
    scaled = ready.kv_dtype == KV_DTYPES["fp8"]
    return f"{ready.kv_dtype} times {ready.kv_scale:g}" if scaled else ready.kv_dtype


def url_of(listener: socket.socket) -> str:
    """The URL under which a bound socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(config: EngineConfig, core: CoreProcess) -> int:
    """Run the server to its end on this thread, which must be the main one.

    Raises:
        ConfigInvalid: the address cannot be listened on.
    """
    log = open_log(config)
    logging.basicConfig(level=logging.WARNING, handlers=[LibraryLines(log)])
    console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)

    async def main() -> int:
        return await EngineServer(config, core, console, log).run()

    return uvloop.run(main())
