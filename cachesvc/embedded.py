"""The cache inside an engine's own process: the same store on a thread, without gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

from kvist.cachesvc.api.answers import Answers
from kvist.cachesvc.api.calls import Pending
from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.core.beat import Beat, begin_on, call_on, finish
from kvist.cachesvc.core.store import Store, StoreConfig
from kvist.cachesvc.flash.by_size import folder_of_size
from kvist.cachesvc.folders import OwnedFolder, sweep
from kvist.cachesvc.log import Log
from kvist.cachesvc.worker.control import CALL_TIMEOUT_S
from kvist.cachesvc.worker.trial import TrialPage
from kvist.proto import cache_pb2
from kvist.proto.errors import Detached, FolderInUse, FormatRefused
from kvist.proto.keys import Namespace
from kvist.proto.record import RecordShape

__all__ = ["DirectControl", "StoreConfig", "open_embedded"]

FOLDER_PREFIX = "kvist-embedded-"
# Opening reads the flash index: 2 us an entry, so 10 million blocks are 20 s.
OPEN_TIMEOUT_S = 60.0

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class _Begun(Generic[Result_co]):
    """See calls.Pending."""

    def __init__(self, future: Future[Result_co]) -> None:
        self._future = future

    def result(self) -> Result_co:
        """See calls.Pending.result."""
        return finish(self._future, CALL_TIMEOUT_S)


class DirectControl:
    """Control of a store on a daemon thread of this process; see control.Control.

    Args:
        config: of the store; its folders are replaced by a private one.
        log: for the store.

    Attributes:
        calls: see control.Control.

    Raises:
        ConfigInvalid, FormatRefused: the store cannot be opened as configured.
    """

    def __init__(self, config: StoreConfig, log: Log) -> None:
        self.calls = 0
        self._log = log
        self._closing = False
        self._ended = threading.Event()  # of the session that is open; each has its own
        self._session = ""
        self._folder = private_folder(config.dram_bytes, log)
        config = dataclasses.replace(config, run_dir=self._folder.path, shm_dir=self._folder.path)
        self._loop = asyncio.new_event_loop()
        self._store = Store(config, self._loop.call_soon_threadsafe, time.monotonic, log)
        self._beat = Beat(self._loop, self._store, self._fail)
        self._answers = Answers(self._store)
        opened: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(opened,), name="kvist-store", daemon=True
        )
        self._thread.start()
        try:
            opened.result(OPEN_TIMEOUT_S)
        except BaseException:
            self._folder.remove()
            raise

    def _run(self, opened: Future[None]) -> None:
        try:
            self._store.open()
            self._beat.start(self._store.bell_path)
        except BaseException as error:
            self._loop.close()
            opened.set_exception(error)
            return
        opened.set_result(None)
        try:
            self._loop.run_forever()
            self._beat.stop()
            self._store.close()
        finally:
            self._loop.close()

    def _fail(self, error: Exception) -> None:
        """The store is broken: go on without it."""
        self._log.error("embedded cache failed", error=repr(error))
        self._loop.stop()
        self._ended.set()

    def _begin(self, function: Callable[[], Result]) -> _Begun[Result]:
        def active() -> Result:
            self._beat.active()
            return function()

        self.calls += 1
        return _Begun(begin_on(self._loop, active))

    def attach(self, request: cache_pb2.AttachRequest) -> cache_pb2.AttachReply:
        """See Control.attach."""
        self._ended = threading.Event()
        reply = self._begin(lambda: self._answers.attach(request)).result()
        self._session = reply.session
        if self._closing:  # close came in between and found no session to end
            self.hang_up()
        return reply

    def wait_ended(self) -> str:
        """See Control.wait_ended."""
        self._ended.wait()
        return "the embedded store ended the session"

    def hang_up(self) -> None:
        """See Control.hang_up."""
        session, self._session = self._session, ""
        if session:
            try:
                call_on(self._loop, lambda: self._store.session_closed(session), CALL_TIMEOUT_S)
            except Detached as error:
                self._log.debug("session not closed", reason=str(error))
        self._ended.set()

    def reserve(self, request: cache_pb2.ReserveRequest) -> Pending[cache_pb2.ReserveReply]:
        """See Control.reserve."""
        return self._begin(lambda: self._answers.reserve(request))

    def commit(self, request: cache_pb2.CommitRequest) -> Pending[cache_pb2.CommitReply]:
        """See Control.commit."""
        return self._begin(lambda: self._answers.commit(request))

    def clear(self, request: cache_pb2.ClearRequest) -> Pending[cache_pb2.ClearReply]:
        """See Control.clear."""
        return self._begin(lambda: self._answers.clear(request))

    def close(self) -> None:
        """See Control.close; also closes the store and removes its folder."""
        self._closing = True
        self.hang_up()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._folder.remove()


def private_folder(dram_bytes: int, log: Log) -> OwnedFolder:
    """A folder for one store, in memory where that has room; removes those of dead processes."""
    shared, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    for parent in (shared, disk):
        swept = sweep(parent, FOLDER_PREFIX)
        if swept:
            log.info("left-over cache folders removed", parent=parent, folders=swept)
    parent = shared if _has_room(shared, dram_bytes) else disk
    if parent is disk:
        log.warning("arena not in /dev/shm, too little room there", parent=disk)
    return OwnedFolder(parent / f"{FOLDER_PREFIX}{os.getpid()}-{secrets.token_hex(4)}")


def _has_room(parent: Path, wanted_bytes: int) -> bool:
    if not os.access(parent, os.W_OK | os.X_OK):
        return False
    space = os.statvfs(parent)
    return space.f_bavail * space.f_frsize >= wanted_bytes


def open_embedded(
    config: StoreConfig,
    namespace: Namespace,
    name: str,
    log: Log,
    trial: TrialPage | None = None,
    model: str = "",
) -> CacheClient:
    """Start a cache in this process and its client; the client's close ends both.

    Its slots have the size of the model's blocks. A flash folder that cannot be had, because
    another process uses it or a program of another version wrote it, leaves the DRAM tier alone.

    Args:
        config: sizes and flash; run_dir and shm_dir are replaced by a private folder, flash_path
            by a sub-folder (see folder_of_size), slot_bytes by what the model needs.
        trial, model: see CacheClient.

    Raises:
        ConfigInvalid: the store cannot be opened as configured.
    """
    shape = RecordShape(namespace.format.payload_bytes, namespace.format.block_tokens)
    config = dataclasses.replace(config, slot_bytes=shape.record_bytes)
    if config.flash_path is not None:
        folder = folder_of_size(config.flash_path, shape.record_bytes, config.flash_bytes, log)
        config = dataclasses.replace(config, flash_path=folder)
    control, without = _open_control(config, log)
    client = CacheClient(control, namespace, name, log)
    client.trial, client.model, client.without = trial, model, without
    client.start()
    return client


def _open_control(config: StoreConfig, log: Log) -> tuple[DirectControl, str]:
    """A store, and what it has to do without, in words."""
    try:
        return DirectControl(config, log), ""
    except FolderInUse as error:
        without = f"in use by process {error.pid}"
        cure = "give each engine a --cache-flash-path of its own, or all of them one sidecar"
    except FormatRefused as error:
        without = str(error)
        cure = "or give another --cache-flash-path"
    log.warning(
        "flash tier off, the cache is in DRAM alone",
        flash_path=config.flash_path, reason=without, cure=cure,
    )  # fmt: skip
    return DirectControl(dataclasses.replace(config, flash_path=None), log), without
