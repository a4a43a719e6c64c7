"""`kvist cache warm`: has prompts computed before anybody waits for them, or raised from flash."""

from __future__ import annotations

import argparse
import http.client
import json
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvist.cachesvc.tools.door import Door, add_door_flags, checked_namespace
from kvist.cachesvc.tools.engine_door import EngineDoor, RequestFailed
from kvist.cachesvc.tools.progress import Bar
from kvist.cachesvc.tools.prompts import PromptLine, read_prompts
from kvist.cachesvc.tools.words import counted
from kvist.proto.errors import ConfigInvalid
from kvist.proto.keys import BlockKey, block_keys

if TYPE_CHECKING:
    from kvist.proto import cache_pb2

URL = "http://127.0.0.1:8000"
REQUEST_TIMEOUT_S = 600.0
CONCURRENCY_MAX = 256
EXIT_DONE, EXIT_SOME_FAILED = 0, 1
# Engines store behind the step; so long may the last blocks be on the way.
SETTLE_S = 2.0
SETTLE_POLL_S = 0.1
# Prompts that are looked up at the end: a call each, and one of /tokenize where they are text.
LOOK_UPS_MAX = 1000
SPACES_MAX = 16


def add_warm_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvist cache warm`."""
    parser.add_argument(
        "file", metavar="FILE", help="JSON lines: text, token ids, or bodies of OpenAI requests"
    )
    parser.add_argument("--url", default=URL, help="of the engine (%(default)s)")
    parser.add_argument("--api-key", help="the engine's key")
    parser.add_argument(
        "--concurrency", type=int, default=2, metavar="N", help="requests at once (%(default)s)"
    )
    parser.add_argument(
        "--from-line", type=int, default=1, metavar="N", help="to go on where one ended (1)"
    )
    parser.add_argument(
        "--priority", default="batch", help="of the requests; empty: none is sent (%(default)s)"
    )
    parser.add_argument(
        "--prefetch",
        action="store_true",
        help="compute nothing; have what is on flash rise to DRAM. The engine is only asked to "
        "tokenize text",
    )
    add_door_flags(parser)
    parser.add_argument("--namespace", metavar="HEX", help="look only there; default: everywhere")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run_warm(flags: argparse.Namespace) -> int:
    """Send the prompts, or prefetch them, and say what is cached.

    Returns: 0; 1 when some of them failed.

    Raises: ConfigInvalid.
    """
    if not 1 <= flags.concurrency <= CONCURRENCY_MAX:
        raise ConfigInvalid(f"--concurrency: {flags.concurrency}; give 1 to {CONCURRENCY_MAX}")
    lines = read_prompts(Path(flags.file), flags.from_line)
    if not lines:
        raise ConfigInvalid(f"FILE: {flags.file} has no prompt from line {flags.from_line} on")
    engine = EngineDoor(flags.url, flags.api_key, REQUEST_TIMEOUT_S)
    if flags.prefetch:
        return _prefetch(flags, engine, lines)
    model = engine.check()
    done = Warmer(engine, _settings(flags, model), flags.concurrency).run(lines)
    document: dict[str, Any] = {
        "prompts": done.prompts,
        "failed": len(done.failed),
        "prompt_tokens": done.prompt_tokens,
        "cached_before_tokens": done.cached_tokens,
        "next_line": done.next_line,
    }
    if done.interrupted:
        print(json.dumps(document) if flags.json else _told(document, done), flush=True)
        raise KeyboardInterrupt
    document["cached_now"] = _cached_now(flags, engine, model, lines, done)
    print(json.dumps(document) if flags.json else _told(document, done))
    return EXIT_SOME_FAILED if done.failed else EXIT_DONE


def _settings(flags: argparse.Namespace, model: str) -> dict[str, Any]:
    settings = {"model": model, "max_tokens": 1, "temperature": 0, "stream": False}
    return {**settings, "priority": flags.priority} if flags.priority else settings


@dataclass(slots=True)
class Done:
    """What became of the prompts.

    Attributes:
        prompts: computed.
        prompt_tokens: of these; cached_tokens: of those, that had been cached before.
        failed: line -> why.
        next_line: all lines before it have been dealt with.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    next_line: int = 1
    interrupted: bool = False


class Warmer:
    """Sends prompts from a few threads; they end with the process, whatever a request does.

    Args:
        engine: to send them to.
        settings: of each request.
        concurrency: requests at once.
    """

    def __init__(self, engine: EngineDoor, settings: dict[str, Any], concurrency: int) -> None:
        self._engine = engine
        self._settings = settings
        self._concurrency = concurrency
        self._todo: queue.SimpleQueue[PromptLine | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[PromptLine, dict[str, Any], str]] = (
            queue.SimpleQueue()
        )

    def run(self, lines: Sequence[PromptLine]) -> Done:
        """Send them all; Ctrl-C ends it early."""
        done, bar = Done(next_line=lines[0].number), Bar(sys.stderr, "prompts")
        for line in [*lines, *[None] * self._concurrency]:
            self._todo.put(line)
        for _ in range(min(self._concurrency, len(lines))):
            threading.Thread(target=self._work, name="kvist-warm", daemon=True).start()
        open_lines = dict.fromkeys(line.number for line in lines)
        try:
            bar.show(0, len(lines))
            for count in range(1, len(lines) + 1):
                self._take(done, open_lines)
                bar.show(count, len(lines))
        except KeyboardInterrupt:
            done.interrupted = True
        finally:
            bar.clear()
        done.next_line = next(iter(open_lines), lines[-1].number + 1)
        return done

    def _take(self, done: Done, open_lines: dict[int, None]) -> None:
        line, usage, problem = self._results.get()
        del open_lines[line.number]
        if problem:
            done.failed[line.number] = problem
            return
        done.prompts += 1
        done.prompt_tokens += int(usage.get("prompt_tokens") or 0)
        details = usage.get("prompt_tokens_details") or {}
        done.cached_tokens += int(details.get("cached_tokens") or 0)

    def _work(self) -> None:
        while (line := self._todo.get()) is not None:
            usage, problem = {}, ""
            try:
                usage = self._engine.complete(line, self._settings)
            except (RequestFailed, OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
            self._results.put((line, usage, problem))


def _told(document: dict[str, Any], done: Done) -> str:
    computed = done.prompt_tokens - done.cached_tokens
    lines = [
        f"{counted(done.prompts, 'prompt')} of {counted(done.prompt_tokens, 'token')}: "
        f"{computed} computed, {done.cached_tokens} had been cached"
    ]
    now = document.get("cached_now")
    if now:
        lines.append(
            f"cached now: {now['tokens']} of {now['of_tokens']} tokens"
            f" ({_where(now['dram_tokens'], now['tokens'])})"
            + (f", of the first {now['prompts']} prompts" if now["prompts"] < done.prompts else "")
        )
    elif not done.interrupted:
        lines.append("cached now: not known, as no sidecar answers (an embedded cache has none)")
    if done.failed:
        line, why = next(iter(sorted(done.failed.items())))
        lines.append(
            f"{counted(len(done.failed), 'prompt')} failed, the first of line {line}: {why}"
        )
    if done.interrupted:
        lines.append(f"interrupted; go on with --from-line {done.next_line}")
    return "\n".join(lines)


def _where(dram_tokens: int, tokens: int) -> str:
    if dram_tokens == tokens:
        return "all in DRAM" if tokens else "none of them"
    return f"{dram_tokens} in DRAM, the others on flash only"


def _cached_now(
    flags: argparse.Namespace,
    engine: EngineDoor,
    model: str,
    lines: Sequence[PromptLine],
    done: Done,
) -> dict[str, int] | None:
    """Tokens of the prompts that the sidecar has; None when none answers."""
    sent = [line for line in lines if line.number not in done.failed][:LOOK_UPS_MAX]
    try:
        with Door(flags.socket) as door:
            finder = Finder(door, flags.namespace)
            prompts = [engine.tokenize(line, model) for line in sent]
            until_s = time.monotonic() + SETTLE_S
            found = [finder.find(tokens, until_s) for tokens in prompts]
    except (ConfigInvalid, RequestFailed, OSError):
        return None
    return {
        "prompts": len(sent),
        "of_tokens": sum(map(len, prompts)),
        "tokens": sum(one.tokens for one in found),
        "dram_tokens": sum(one.dram_tokens for one in found),
    }


@dataclass(frozen=True, slots=True)
class Found:
    """What of a prompt is cached; keys are of its whole blocks."""

    tokens: int = 0
    dram_tokens: int = 0
    keys: tuple[BlockKey, ...] = ()


class Finder:
    """Looks prompts up, under whatever namespace they are stored.

    Args:
        door: to the sidecar.
        namespace: first digits of the only one to look at; None looks at the largest ones.

    Raises: ConfigInvalid.
    """

    def __init__(self, door: Door, namespace: str | None) -> None:
        self._door = door
        wanted = checked_namespace(namespace)
        spaces = [one for one in door.namespaces() if one.namespace.hex().startswith(wanted)]
        self._spaces = [one for one in spaces if one.block_tokens][:SPACES_MAX]

    def find(self, tokens: Sequence[int], until_s: float = 0.0) -> Found:
        """The longest cached prefix; waits for what is still being stored, until until_s."""
        while True:
            best = Found()
            for space in list(self._spaces):
                found = self._find_in(space, tokens)
                if found.tokens > best.tokens:
                    best = found
                    self._spaces.remove(space)
                    self._spaces.insert(0, space)  # the next prompt is there, too, most likely
                    break
            block_tokens = self._spaces[0].block_tokens if self._spaces else 1
            if best.tokens >= len(tokens) // block_tokens * block_tokens:
                return best
            if time.monotonic() >= until_s:
                return best
            time.sleep(SETTLE_POLL_S)

    def _find_in(self, space: cache_pb2.NamespaceInfo, tokens: Sequence[int]) -> Found:
        from kvist.proto import cache_pb2

        keys = block_keys(space.namespace, tokens, space.block_tokens)
        reply = self._door.call("Lookup", cache_pb2.LookupRequest(keys=keys))
        in_dram = sum(tier == "dram" for tier in reply.tiers)
        size = space.block_tokens
        return Found(reply.blocks * size, in_dram * size, tuple(keys))


def _prefetch(flags: argparse.Namespace, engine: EngineDoor, lines: Sequence[PromptLine]) -> int:
    """Have what is on flash rise; compute nothing."""
    from kvist.proto import cache_pb2

    is_text = any(line.tokens is None for line in lines)
    model = engine.check() if is_text else ""
    rising = cached = done = 0
    bar = Bar(sys.stderr, "prompts")

    def told(end: str) -> None:
        bar.clear()
        document = {"prompts": done, "cached_tokens": cached, "rising_blocks": rising}
        words = f"{counted(done, 'prompt')}, {counted(cached, 'token')} of them cached; "
        words += f"{counted(rising, 'block')} to rise from flash"
        print(json.dumps(document) if flags.json else words + end, flush=True)

    with Door(flags.socket) as door:
        finder = Finder(door, flags.namespace)
        try:
            for line in lines:
                found = finder.find(engine.tokenize(line, model))
                if found.keys:
                    request = cache_pb2.PrefetchRequest(keys=found.keys)
                    rising += door.call("Prefetch", request).rising
                cached, done = cached + found.tokens, done + 1
                bar.show(done, len(lines))
        except KeyboardInterrupt:
            told(f"; interrupted, go on with --from-line {lines[done].number}")
            raise
        except (RequestFailed, OSError) as error:
            bar.clear()
            raise ConfigInvalid(f"FILE: line {lines[done].number}: {error}") from None
    told("")
    return EXIT_DONE
