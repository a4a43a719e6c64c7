"""Where `kvist top` gets its figures: a thread that asks a sidecar again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from kvist.cachesvc.tools.door import Address, Door, short_words
from kvist.cachesvc.tools.listing import run_document
from kvist.cachesvc.tools.top.data import Now, Reading, Window
from kvist.cachesvc.tools.top.view import Scene
from kvist.proto.errors import KvistError

PREFIXES_SHOWN = 50
# Pages asked for between two readings; a listing of a million blocks takes some hundred.
PAGES_A_TURN = 16


class Prefixes:
    """The most used prefixes, found a few pages at a time; each full turn replaces what is shown.

    Attributes:
        runs: of the last full turn, or of this one as long as there was none; None when the
            socket does not answer, or is not known.
    """

    def __init__(self, where: Address | None) -> None:
        self.runs: list[dict[str, Any]] | None = []
        self._where = where
        self._door: Door | None = None
        self._pages: Any = None
        self._found: list[dict[str, Any]] = []
        self._spaces: dict[bytes, Any] = {}
        self._had_turn = False

    def look(self) -> None:
        """A few pages more."""
        if self._where is None:
            self.runs = None
            return
        try:
            self._door = self._door or Door(self._where)
            self._look(self._door)
        except KvistError:
            self.close()
            self.runs = None
            self._had_turn = False

    def _look(self, door: Door) -> None:
        for _ in range(PAGES_A_TURN):
            if self._pages is None:
                self._pages, self._found, self._spaces = door.pages(min_uses=1), [], {}
            page = next(self._pages)
            self._spaces |= {one.namespace: one for one in page.namespaces}
            self._found += [
                run_document(run, self._spaces.get(run.namespace), page.slot_bytes)
                for run in page.runs
            ]
            self._found.sort(key=lambda run: (-run["uses"], run["idle_s"]))
            del self._found[PREFIXES_SHOWN:]
            is_last = not page.next_page_token
            if is_last or not self._had_turn:
                self.runs = list(self._found)
            if is_last:
                self._pages, self._had_turn = None, True
                return

    def close(self) -> None:
        """Hang up; look dials again."""
        if self._door is not None:
            self._door.__exit__(None, None, None)
        self._door, self._pages = None, None


class Feed:
    """Asks for figures on a thread of its own, which ends with the process.

    Args:
        where: shown to people.
        ask: the sidecar's figures; raises KvistError when it does not answer.
        prefixes: None shows none.
        interval_s: between two questions.

    Attributes:
        scene: the latest; a new object with each answer, or failure.
    """

    def __init__(
        self,
        where: str,
        ask: Callable[[], dict[str, Any]],
        prefixes: Prefixes | None,
        interval_s: float,
    ) -> None:
        self.scene = Scene(where, None, "waiting for the first answer")
        self._ask = ask
        self._prefixes = prefixes
        self._interval_s = interval_s
        self._window = Window()
        self._answered = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvist-top", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more; a question that is under way is not waited for."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            started = time.monotonic()
            self.turn()
            self._stopping.wait(max(0.0, self._interval_s - (time.monotonic() - started)))

    def turn(self) -> Now | None:
        """Ask once; what there is to see, None when no answer came."""
        old = self.scene
        try:
            self._window.add(Reading(time.monotonic(), self._ask()))
        except KvistError as error:
            problem = f"{self._in_words(error)}; asking again"
            self.scene = Scene(old.where, old.now, problem, old.prefixes)
            return None
        self._answered = time.strftime("%H:%M:%S")
        if self._prefixes is not None:
            self._prefixes.look()
        now = self._window.now()
        self.scene = Scene(old.where, now, "", self._prefixes.runs if self._prefixes else None)
        return now

    def _in_words(self, error: KvistError) -> str:
        if not self._answered:
            return str(error)
        return f"kvistd has not answered since {self._answered}: {short_words(str(error))}"
