"""Watch: whether the flash tier works, what workers are told of it, and how it comes back.

ready       works. rebuilding: what is on it is not known yet, or not all of it
failed      the device failed, or the folder could not be opened. Once a second a flash thread
            looks whether it works again. When it stays failed the folder is let go: what was on
            flash is forgotten and the files are closed, so that the file system can be repaired
            and mounted anew, which no remount does after an error of ext4; from then on it is
            opened anew, more and more seldom, and read as at a start
off         there is to be none
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from kvist.cachesvc.core.host import Threads
from kvist.cachesvc.flash.flashio import FlashIo, Post
from kvist.cachesvc.flash.restore import Restore
from kvist.cachesvc.log import Log
from kvist.cachesvc.placing.placement import Placement
from kvist.proto.errors import KvistError
from kvist.proto.shm import (
    FLASH_FAILED,
    FLASH_OFF,
    FLASH_READY,
    FLASH_REBUILDING,
    FLASH_UNREAD,
)
from kvist.tiers.flash import FlashTier

FlashState = Literal["off", "ready", "rebuilding", "failed"]
PROBE_S = 1.0
# Between two attempts to open a folder: to claim room may take a disk a while.
OPEN_S_MAX = 30.0
# A hiccup of the device costs nothing; who unmounts it waits 5 s.
PROBES_BEFORE_LETTING_GO = 5
# 15 us a block: 4 ms away.
_STEP_BLOCKS = 256

_STATES: dict[FlashState, int] = {
    "off": FLASH_OFF,
    "ready": FLASH_READY,
    "rebuilding": FLASH_REBUILDING,
    "failed": FLASH_FAILED,
}


def backoff_s(failures: int) -> float:
    """Until the next attempt to open a folder."""
    return min(PROBE_S * float(1 << min(failures, 10)), OPEN_S_MAX)


class Watch:
    """Looks after the flash tier. One thread.

    Attributes:
        state: what workers are told.
        opened: called when a folder was opened while the service ran.

    Args:
        placement: the blocks. flash: its tier. io: whose threads touch the device.
        threads: starts the one that scans.
        post: runs a callable on this thread.
        log: where changes of state are told.
    """

    def __init__(
        self,
        placement: Placement,
        flash: FlashTier,
        io: FlashIo,
        threads: Threads,
        post: Post,
        log: Log,
    ) -> None:
        self.state: FlashState = "off"
        self.opened: Callable[[], None] = lambda: None
        self._placement = placement
        self._flash = flash
        self._io = io
        self._log = log
        self._restore = Restore(placement, flash, threads, post, self._restored)
        self._probe_at_s = 0.0
        self._probing = False
        self._failed_probes = 0
        self._unread = False
        self._told = ""
        self._leaving: Iterator[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Take over what the last life left on flash; scans in the background if it must."""
        if self._flash.failure:
            self._restore.expect(frozenset())
            self._unread = True
            self.fail(self._flash.failure)
        else:
            self._restore.load()
            self._resume()

    def close(self) -> None:
        """End a scan; nothing changes any more."""
        self._closed = True
        self._restore.close()

    def clear(self, namespace: bytes | None) -> None:
        """What is not known yet of a namespace, or at all, is not wanted."""
        self._restore.clear(namespace)

    def fail(self, reason: str) -> None:
        """The device failed."""
        if self.state != "failed":
            self._enter("failed")
            self._failed_probes = 0
        if reason != self._told:
            self._told = reason
            self._log.error("flash tier failed", reason=reason)

    def poll(self, now_s: float, idle: bool) -> None:
        """Every few milliseconds, in state "failed".

        Args:
            idle: no move is under way.
        """
        if self._leaving is not None:
            self._leave()
        elif not self._probing and now_s >= self._probe_at_s:
            patience_over = self._failed_probes >= PROBES_BEFORE_LETTING_GO
            if patience_over and not self._unread and idle and not self._restore.busy:
                self._restore.expect(frozenset())  # what is cleared from here on is not wanted
                self._leaving = self._forget()
                return
            self._probing = True
            self._probe_at_s = now_s + self._wait_s()
            self._io.probe(self._probed)

    def _wait_s(self) -> float:
        return backoff_s(self._failed_probes) if self._unread else PROBE_S

    def _leave(self) -> None:
        assert self._leaving is not None
        if next(self._leaving, "over") == "over":
            self._leaving = None
            self._restore.expect(self._io.undeleted())
            self._flash.let_go()
            self._unread = True
            self._failed_probes = 0
            self._enter("failed")
            failed_s = round(PROBES_BEFORE_LETTING_GO * PROBE_S)
            self._log.warning(
                "flash folder let go", reason=f"it failed for {failed_s} s; opened anew later"
            )

    def _forget(self) -> Iterator[None]:
        """Forget what is on flash, pausing now and then; nothing gets there meanwhile."""
        placement = self._placement
        rows = placement.blocks.in_namespace(None)
        for count, row in enumerate(rows, 1):
            if placement.index.flash(row) is not None:
                placement.forget_flash(row)
            if not count % _STEP_BLOCKS:
                yield

    def _enter(self, state: FlashState) -> None:
        self.state = state
        unread = state == "failed" and self._unread
        self._placement.index.set_flash_state(FLASH_UNREAD if unread else _STATES[state])

    def _probed(self, works: bool) -> None:
        self._probing = False
        if self._closed:
            return
        if not works:
            self._failed_probes += 1
            if self._flash.failure:
                self.fail(self._flash.failure)
        elif self._unread:
            self._unread = False
            self.opened()
            self._enter("rebuilding")
            self._restore.load_late()
        else:
            self._resume()

    def _resume(self) -> None:
        self._failed_probes, self._told = 0, ""
        if self._flash.needs_rebuild:
            self._enter("rebuilding")
            self._placement.counts.flash_rebuilds += 1
            self._log.warning("flash index is being rebuilt")
            self._restore.scan()
        else:
            self._enter("ready")
            self._log.info("flash tier ready", blocks=self._flash.slots - self._flash.free_slots)

    def _restored(self, problem: KvistError | None) -> None:
        if self._closed:
            return
        if problem is None:
            self._resume()
        else:
            self.fail(str(problem))
