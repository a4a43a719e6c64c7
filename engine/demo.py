"""`kvist demo`: one sidecar, two engines, eight chats; what the cache saved, and no wrong token."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Table

from kvist.engine.demo_text import CHATS, SYSTEM_PROMPT
from kvist.engine.demo_visitors import visitors
from kvist.engine.local import Answer, LocalEngine, LocalSidecar, ask

ANSWER_TOKENS = 32
WAIT_SECONDS = 60.0
# One question in so many seconds leaves the cores to whoever chats beside it.
KEEP_PAUSE_S = 2.0
PICTURE_COLUMNS = 84
LIKE_TOKENS = 64
TIERS = ("hbm", "dram", "flash")
# A tenant for each chat in turn: they share no block, so three requests find their whole prefix
# in DRAM, and three on flash after the restart. One request would show a chance, not a tier.
SALTS = ("harbour:demo", "hill:demo", "station:demo")


@dataclass(slots=True)
class Turn:
    """One request of the demo, answered with the cache and without it.

    Attributes:
        chat: number of the chat, from 1.
        turn: number of the turn in it, from 1.
        engine: index of the engine that answers.
        messages: what is sent.
        salt: of its tenant: what has another salt is never shared.
        hit: the answer with the cache, once there is one.
        miss: the answer of the same engine with the cache bypassed.
    """

    chat: int
    turn: int
    engine: int
    messages: list[dict[str, str]]
    salt: str
    hit: Answer | None = None
    miss: Answer | None = None

    @property
    def equal(self) -> bool:
        """Both answers are there and are the same text."""
        return self.hit is not None and self.miss is not None and self.hit.text == self.miss.text

    @property
    def sooner(self) -> float:
        """TTFT of the same request on the same engine without the cache, over that with it."""
        assert self.hit is not None, "only an answered request has a TTFT"
        assert self.miss is not None, "only an answered request has a TTFT"
        return self.miss.ttft_s / self.hit.ttft_s


class Demo:
    """The processes, the chats and what came of them."""

    def __init__(self, console: Console, folder: Path, model: str) -> None:
        self.console = console
        self.model = model
        self.sidecar = LocalSidecar(
            folder / "sidecar", {"dram_bytes": "512MiB", "flash_bytes": "1GiB"}
        )
        # Two engines on a small machine: one compute thread each for every two cores.
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        flags = ["--cache", str(self.sidecar.socket), "--threads", str(threads)]
        # Room for 8,700 tokens: what visitors ask for after the chats does not fit it all.
        flags += ["--kv-cache-memory-bytes", "192MiB", "--served-model-name", "demo"]
        self.engines = [
            LocalEngine(model, folder / f"engine-{number}.log", flags) for number in (1, 2)
        ]
        self.turns: list[Turn] = []
        self.again: list[Turn] = []

    def run(self) -> bool:
        """Play it all; True if every answer was equal and every tier had hits."""
        self._start()
        self.turns = self._chats()
        self._without_cache("the same requests without a cache", self.turns)
        self.console.print(request_table("Eight chats of three tenants on two engines", self.turns))
        self._restart()
        self.again = self._ask_again()
        self.console.print(
            request_table("After the restart: DRAM is lost, flash is not", self.again)
        )
        return self._verdict()

    def stop(self) -> None:
        """End every process that runs."""
        for process in (*self.engines, self.sidecar):
            if process.running:
                process.stop()

    def _start(self) -> None:
        with self.console.status("starting the sidecar and two engines"):
            self.sidecar.start()
            for engine in self.engines:
                engine.start()
            for process in (self.sidecar, *self.engines):
                process.wait_ready()
            self._wait("the engines to attach", self._all_attached)
        self.console.print(f"page     [link]{self.sidecar.url}/[/link]  open it now and watch")
        for number, engine in enumerate(self.engines, 1):
            self.console.print(f"engine {number} {engine.url}/v1  (OpenAI API)")

    def _chats(self) -> list[Turn]:
        """Play the chats, two at a time; a chat's next turn goes to the other engine.

        The first chat of each tenant computes the system prompt on one engine, and its second
        turn finds that in DRAM on the other.
        """
        turns: list[Turn] = []
        with self._progress() as progress, ThreadPoolExecutor(len(self.engines)) as pool:
            bar = progress.add_task("chats with the cache", total=sum(map(len, CHATS)))
            locks = [threading.Lock() for _ in self.engines]

            def play(chat: int) -> list[Turn]:
                played: list[Turn] = []
                messages = [{"role": "system", "content": SYSTEM_PROMPT}]
                for number, question in enumerate(CHATS[chat]):
                    messages = [*messages, {"role": "user", "content": question}]
                    engine, salt = (chat + number) % len(locks), SALTS[chat % len(SALTS)]
                    turn = Turn(chat + 1, number + 1, engine, messages, salt)
                    with locks[engine]:
                        turn.hit = self._ask(turn, "on")
                    self._wait("blocks to be stored", self._nothing_reserved)
                    messages = [*messages, {"role": "assistant", "content": turn.hit.text}]
                    played.append(turn)
                    progress.advance(bar)
                return played

            for played in pool.map(play, range(len(CHATS))):
                turns += played
        return turns

    def _without_cache(self, what: str, turns: Sequence[Turn]) -> None:
        """Answer the same requests on the same engines with every tier bypassed."""
        with self._progress() as progress, ThreadPoolExecutor(len(self.engines)) as pool:
            bar = progress.add_task(what, total=len(turns))

            def replay(engine: int) -> None:
                for turn in turns:
                    if turn.engine == engine:
                        turn.miss = self._ask(turn, "bypass")
                        progress.advance(bar)

            for done in [pool.submit(replay, engine) for engine in range(len(self.engines))]:
                done.result()

    def _restart(self) -> None:
        engine = self.engines[0]
        with self.console.status("waiting until every block is on flash"):
            self._wait("blocks to reach flash", self._all_on_flash)
        with self.console.status("stopping engine 1, killing the sidecar, starting both again"):
            engine.stop()
            self.sidecar.kill()
            self.sidecar.start()
            engine.start()
            self.sidecar.wait_ready()
            engine.wait_ready()
            self._wait("the engines to attach", self._all_attached)
        self.console.print("engine 1 was stopped and the sidecar killed (SIGKILL); both run again")

    def _ask_again(self) -> list[Turn]:
        turns = [
            Turn(turn.chat, turn.turn, 0, turn.messages, turn.salt)
            for turn in self.turns
            if turn.turn == len(CHATS[turn.chat - 1])
        ][: len(SALTS)]
        with self._progress() as progress:
            bar = progress.add_task("asking engine 1 again", total=len(turns))
            for turn in turns:
                turn.hit = self._ask(turn, "on")
                progress.advance(bar)
        self._without_cache("the same without a cache", turns)
        return turns

    def keep_asking(self) -> None:
        """Ask on, one request each few seconds, each engine in turn, until interrupted."""
        for number, body in visitors(seed=1):
            with contextlib.suppress(httpx.HTTPError, RuntimeError):  # what was stopped by hand
                ask(self.engines[number % len(self.engines)].url, body)
            time.sleep(KEEP_PAUSE_S)

    def _ask(self, turn: Turn, cache: str) -> Answer:
        body: dict[str, Any] = {"model": "demo", "messages": turn.messages, "temperature": 0}
        body |= {"max_tokens": ANSWER_TOKENS, "kv_cache": cache, "cache_salt": turn.salt}
        return ask(self.engines[turn.engine].url, body)

    def _verdict(self) -> bool:
        every = [*self.turns, *self.again]
        equal = all(turn.equal for turn in every)
        hits = {tier: sum(t.hit.cached[tier] for t in every if t.hit) for tier in TIERS}
        self.console.print()
        for line in savings(every):
            self.console.print(line)
        if equal:
            self.console.print(f"All {len(every)} answers equal the answers without a cache.")
        else:
            wrong = sum(not turn.equal for turn in every)
            self.console.print(
                f"[red]{wrong} of {len(every)} answers differ from those without.[/]"
            )
        for tier in TIERS:
            if not hits[tier]:
                self.console.print(f"[red]The {tier} tier had no hit.[/]")
        return equal and all(hits.values())

    def _all_attached(self) -> bool:
        return all(
            "kvist_engine_cache_attached 1.0" in httpx.get(f"{engine.url}/metrics").text
            for engine in self.engines
        )

    def _nothing_reserved(self) -> bool:
        return bool(self.sidecar.stats()["reserved_slots"] == 0)

    def _all_on_flash(self) -> bool:
        used = {row["tier"]: row["used_slots"] for row in self.sidecar.stats()["tiers"]}
        return bool(used["flash"] >= used["dram"] > 0)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {WAIT_SECONDS:.0f} s for {what}\n{self.sidecar.tail()}")
            time.sleep(0.05)

    def _progress(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            console=self.console,
        )


def request_table(title: str, turns: Sequence[Turn]) -> Table:
    """One row per request: tokens by tier, TTFT with and without the cache, equality."""
    table = Table(
        title=title,
        title_justify="left",
        caption="TTFT in ms, with the cache and without it; the tiers' columns are tokens",
        caption_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for name in ("chat", "turn", "engine", "tokens", *TIERS, "TTFT", "uncached", "equal"):
        table.add_column(name, justify="right", no_wrap=True)
    for turn in turns:
        hit, miss = turn.hit, turn.miss
        assert hit is not None, "a table is drawn when all is answered"
        assert miss is not None, "a table is drawn when all is answered"
        table.add_row(
            str(turn.chat),
            str(turn.turn),
            str(turn.engine + 1),
            str(hit.prompt_tokens),
            *(str(hit.cached[tier] or "-") for tier in TIERS),
            f"{hit.ttft_s * 1e3:,.0f}",
            f"{miss.ttft_s * 1e3:,.0f}",
            "yes" if turn.equal else "[red]NO[/]",
        )
    return table


def savings(turns: Sequence[Turn]) -> list[str]:
    """What the cache saved, in plain words; a tier's ratio is the median of its requests' own."""
    answered = [(turn, turn.hit) for turn in turns if turn.hit is not None]
    misses = [turn.miss.ttft_s for turn in turns if turn.miss is not None]
    prompt = sum(hit.prompt_tokens for _, hit in answered)
    cached = sum(hit.cached_tokens for _, hit in answered)
    lines = [
        f"Prefill not computed: {cached:,} of {prompt:,} prompt tokens ({cached / prompt:.0%}).",
        f"TTFT without a cache: {statistics.median(misses) * 1e3:,.0f} ms (median).",
    ]
    for tier in TIERS:
        found = [(turn, hit) for turn, hit in answered if _mostly_from(hit, tier)]
        if found:
            ttft_s = statistics.median(hit.ttft_s for _, hit in found)
            sooner = statistics.median(turn.sooner for turn, _ in found)
            lines.append(
                f"TTFT with the prefix in {tier.upper() if tier != 'flash' else 'flash'}: "
                f"{ttft_s * 1e3:,.0f} ms, {sooner:.0f} times sooner "
                f"({len(found)} request{'s' * (len(found) > 1)})."
            )
    return [*lines, "Times sooner: each request against itself without a cache, the median."]


def draw(console: Console, file: Path) -> None:
    """Save what the console showed as a picture that needs no font from elsewhere."""
    picture = console.export_svg(title="make demo")
    file.write_text(re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL))


def _mostly_from(hit: Answer, tier: str) -> bool:
    """One tier had nearly all of the prompt, so that TTFT by tier compares like with like."""
    computed = hit.prompt_tokens - hit.cached_tokens
    return computed <= LIKE_TOKENS and hit.cached[tier] > 0.9 * hit.prompt_tokens


def run_demo(model: str, keep: bool, svg: str | None) -> int:
    """Play the demo.

    Args:
        model: as `kvist serve` takes it.
        keep: leave everything running until Ctrl-C.
        svg: file for a picture of the output, or None.

    Returns:
        exit code: 0 if all answers were equal and every tier had hits.
    """
    # As Ctrl-C: the processes are in sessions of their own and would live on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(record=svg is not None, width=PICTURE_COLUMNS if svg else None)
    with tempfile.TemporaryDirectory(prefix="kvist-demo-") as folder:
        demo = Demo(console, Path(folder), model)
        try:
            good = demo.run()
            if svg is not None:
                draw(console, Path(svg))
            if keep:
                _linger(console, demo)
            else:
                console.print(
                    "Look around: make demo KEEP=1 leaves it running, with a page and /metrics."
                )
        except RuntimeError as error:
            console.print(f"[red]The demo failed:[/] {error}", highlight=False)
            return 1
        except KeyboardInterrupt:
            console.print("stopped")
            return 130
        finally:
            demo.stop()
    return 0 if good else 1


def _linger(console: Console, demo: Demo) -> None:
    pause = f"{KEEP_PAUSE_S:.0f} s"
    console.print(f"\nStill running, a question every {pause}; Ctrl-C here stops everything.")
    console.print(
        f"Page:    [bold]{demo.sidecar.url}/[/]  hit rate, misses by reason, is it worth it"
    )
    console.print(f"Metrics: {demo.sidecar.url}/metrics and {demo.engines[0].url}/metrics")
    console.print(f"Chat:    kvist chat --url {demo.engines[0].url}")
    try:
        demo.keep_asking()
    except KeyboardInterrupt:
        console.print("stopping")
