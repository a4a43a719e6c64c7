"""`kvist bench serve`: load a server with requests and say how it answered."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvist.engine.bench.arrivals import Arrivals, Ramp
from kvist.engine.bench.client import (
    CHAT,
    ENDPOINTS,
    BenchClient,
    BenchError,
    Outcome,
    Server,
    Target,
)
from kvist.engine.bench.datasets import items_of
from kvist.engine.bench.load import Load
from kvist.engine.bench.report import as_json, result_path, save, stamp, table
from kvist.engine.bench.summary import Wanted, parse_wanted, summarize
from kvist.engine.bench.timeline import parse_thresholds, timeline
from kvist.engine.bench.wire import Wire
from kvist.engine.bench.workload import Item, vocabulary_of, warm_up_items, words_text
from kvist.proto.errors import ConfigInvalid

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
READY_POLL_SECONDS = 0.5
CHARS_PER_TOKEN = 4
REFRESH_HZ = 4


@dataclass(frozen=True, slots=True)
class Run:
    """A run, ready to begin.

    Attributes:
        wire: to the server.
        target: what is asked of it.
        items: the requests.
        warm_up: requests before them.
        due_s: when each of items is due.
        from_due: latencies count from there.
        limit: requests under way at most.
    """

    wire: Wire
    target: Target
    items: Sequence[Item]
    warm_up: Sequence[Item]
    due_s: Sequence[float]
    from_due: bool
    limit: int | None


def run_bench_serve(flags: argparse.Namespace) -> int:
    """Ask, measure, report; flags are those of bench/flags.py.

    Returns:
        0; 1 when no server answers or no request succeeded; 130 after Ctrl-C.

    Raises:
        ConfigInvalid: a flag or a file is wrong; the message names it.
    """
    console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
    wanted = parse_wanted(flags.percentile_metrics, flags.metric_percentiles, flags.goodput)
    arrivals = arrivals_of(flags)
    check_counts(flags)
    parse_thresholds(flags.timeline_itl_thresholds)
    started = datetime.now()
    try:
        run, model = prepare(flags, arrivals, console)
    except BenchError as error:
        console.print(f"kvist bench serve: {error}", style="red")
        return EXIT_FAILED
    bar = contextlib.nullcontext() if flags.disable_tqdm else progress_bar(console, len(run.items))
    allow_connections()
    with bar as advance:
        outcomes, duration_s, stopped = uvloop.run(play(run, advance or (lambda _: None)))
    about = {
        "date": stamp(started),
        "backend": flags.backend,
        "label": flags.label,
        "model_id": model,
        "dataset_name": flags.dataset_name,
        "num_prompts": len(run.items),
        "request_rate": _rate(flags, arrivals),
        "burstiness": flags.burstiness,
        "max_concurrency": flags.max_concurrency,
        "seed": flags.seed,
        **pairs(flags.metadata, "--metadata"),
    }
    figures = about | summarize(outcomes, duration_s, run.from_due, wanted)
    tell(flags, figures, outcomes, wanted)
    if stopped:
        console.print("stopped: these are the requests that had ended", style="yellow")
        return EXIT_INTERRUPTED
    return 0 if figures["completed"] else EXIT_FAILED


def _rate(flags: argparse.Namespace, arrivals: Arrivals) -> float | str:
    if flags.dataset_name == "timed_trace" and flags.self_timed:
        return "trace"
    return arrivals.rate if arrivals.ramp is None else "ramp"


def tell(
    flags: argparse.Namespace,
    figures: dict[str, Any],
    outcomes: Sequence[Outcome],
    wanted: Wanted,
) -> None:
    """Print the table or the JSON, and write the file."""
    print(as_json(figures) if flags.json else table(figures))
    if not flags.json and "itl" in wanted.metrics and figures["token_counts"] != "usage":
        print("The server does not report usage: token counts are estimates.")
    path = result_path(flags.result_dir, flags.result_filename, figures)
    if flags.save_result or flags.save_detailed or flags.append_result:
        whole = figures | (detail(outcomes) if flags.save_detailed else {})
        save(path, as_json(whole) + "\n", flags.append_result)
        print(f"saved: {path}", file=sys.stderr)
    if flags.plot_timeline:
        path = path.with_suffix(".timeline.html")
        save(path, timeline(outcomes, parse_thresholds(flags.timeline_itl_thresholds)))
        print(f"saved: {path}", file=sys.stderr)


def detail(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The times of every request, in seconds from the start of the run.

    First under the names of vLLM's benchmark, whose times count from when a request was sent; then
    all that is known.
    """
    sent = [outcome.due_s if outcome.sent_s is None else outcome.sent_s for outcome in outcomes]
    both = list(zip(outcomes, sent, strict=True))
    return {
        "input_lens": [outcome.prompt_tokens for outcome in outcomes],
        "output_lens": [outcome.output_tokens for outcome in outcomes],
        "start_times": sent,
        "ttfts": [one.chunk_s[0] - at if one.chunk_s else 0.0 for one, at in both],
        "itls": [[b - a for a, b in pairwise(outcome.chunk_s)] for outcome in outcomes],
        "latencies": [one.end_s - at if one.good else 0.0 for one, at in both],
        "requests": [
            {
                "due": outcome.due_s,
                "sent": outcome.sent_s,
                "chunks": outcome.chunk_s,
                "end": outcome.end_s,
                "input_tokens": outcome.prompt_tokens,
                "output_tokens": outcome.output_tokens,
                "cached": outcome.cached,
                "error": outcome.error,
                "done": outcome.done,
            }
            for outcome in outcomes
        ],
    }


def arrivals_of(flags: argparse.Namespace) -> Arrivals:
    """Read the flags of the load.

    Raises:
        ConfigInvalid: names the flag.
    """
    ramp = None
    if flags.ramp_up_strategy is not None:
        if flags.ramp_up_start_rps is None or flags.ramp_up_end_rps is None:
            raise ConfigInvalid(
                "--ramp-up-strategy: give --ramp-up-start-rps and --ramp-up-end-rps, too"
            )
        if flags.request_rate != float("inf"):
            raise ConfigInvalid("--request-rate: leave it out with --ramp-up-strategy")
        ramp = Ramp(flags.ramp_up_strategy, flags.ramp_up_start_rps, flags.ramp_up_end_rps)
    return Arrivals(flags.request_rate, flags.burstiness, ramp)


def check_counts(flags: argparse.Namespace) -> None:
    """Counts are in range.

    Raises:
        ConfigInvalid: names the flag.
    """
    if flags.num_prompts < 1:
        raise ConfigInvalid("--num-prompts: give 1 or more")
    if flags.num_warmups < 0:
        raise ConfigInvalid("--num-warmups: give 0 or more")
    if flags.max_concurrency is not None and flags.max_concurrency < 1:
        raise ConfigInvalid("--max-concurrency: give 1 or more, or leave it out")


def prepare(flags: argparse.Namespace, arrivals: Arrivals, console: Console) -> tuple[Run, str]:
    """Ask the server what it has, and make the requests.

    Raises:
        BenchError: no server answers.
        ConfigInvalid: a flag or a file is wrong.
    """
    url = flags.base_url or f"http://{flags.host}:{flags.port}"
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    headers |= {} if flags.api_key is None else {"authorization": f"Bearer {flags.api_key}"}
    headers |= pairs(flags.header, "--header")
    wire = Wire(url, headers)
    with (
        httpx.Client(base_url=url, headers=headers, trust_env=False) as http,
        console.status("making requests"),
    ):
        server = Server(http)
        named = flags.served_model_name or flags.model
        model = wait_ready(server, flags.ready_check_timeout_sec, named)
        tokenize = tokenizer_of(flags, server, model)
        vocabulary = vocabulary_of(None if flags.backend == CHAT else tokenize(words_text()))

        def count(text: str) -> int:
            tokens = tokenize(text)
            return max(1, len(text) // CHARS_PER_TOKEN) if tokens is None else len(tokens)

        items = items_of(flags, vocabulary, count)
    if flags.backend == CHAT and any(isinstance(item.prompt, list) for item in items):
        raise ConfigInvalid("--backend: openai-chat takes text; the dataset has token ids")
    timed = flags.dataset_name == "timed_trace" and flags.self_timed
    due_s = [item.at_s or 0.0 for item in items]
    endpoint = flags.endpoint or ENDPOINTS[flags.backend]
    target = Target(flags.backend, endpoint, fields_of(flags, model))
    return Run(
        wire,
        target,
        items,
        warm_up_items(vocabulary, items[0], flags.num_warmups, flags.seed),
        due_s if timed else arrivals.due_s(len(items), flags.seed),
        timed or arrivals.scheduled,
        flags.max_concurrency,
    ), model


def tokenizer_of(
    flags: argparse.Namespace, server: Server, model: str
) -> Callable[[str], list[int] | None]:
    """What turns a text into ids, or gives None: a tokenizer from files, or the server's.

    Raises:
        ConfigInvalid: --tokenizer cannot be read.
    """
    if flags.tokenizer is None:
        return lambda text: server.tokenize(model, text)
    from kvist.engine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(flags.tokenizer)
    return lambda text: tokenizer.encode(text, False)


def wait_ready(server: Server, timeout_s: float, named: str | None) -> str:
    """The model named, or else the first that the server lists, once it answers.

    Raises:
        BenchError: it does not answer in time, or lists nothing though no model was named.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            listed = server.model()
            return named or listed
        except BenchError:
            if server.answers and named is not None:
                return named
            if time.monotonic() >= deadline:
                raise
        time.sleep(READY_POLL_SECONDS)


def fields_of(flags: argparse.Namespace, model: str) -> dict[str, Any]:
    """What is in every body.

    Raises:
        ConfigInvalid: --extra-body is not a JSON object.
    """
    fields: dict[str, Any] = {"model": model, "temperature": flags.temperature}
    for name in ("top_p", "top_k", "min_p"):
        if getattr(flags, name) is not None:
            fields[name] = getattr(flags, name)
    if flags.logprobs is not None:
        chat = {"logprobs": True, "top_logprobs": flags.logprobs}
        fields |= chat if flags.backend == CHAT else {"logprobs": flags.logprobs}
    # A trace says how long its answers were.
    if flags.ignore_eos or flags.dataset_name == "timed_trace":
        fields["ignore_eos"] = True
    if flags.extra_body is not None:
        try:
            extra = json.loads(flags.extra_body)
        except ValueError as error:
            raise ConfigInvalid(f"--extra-body: not JSON: {error}") from None
        if not isinstance(extra, dict):
            raise ConfigInvalid("--extra-body: not a JSON object")
        fields |= extra
    return fields


def pairs(words: Sequence[str] | None, flag: str) -> dict[str, str]:
    """NAME=VALUE words as a dict.

    Raises:
        ConfigInvalid: one has no equals sign.
    """
    if bad := [word for word in words or () if "=" not in word]:
        raise ConfigInvalid(f"{flag}: {bad[0]!r}; give NAME=VALUE")
    return {name: value for name, _, value in (word.partition("=") for word in words or ())}


async def play(run: Run, progress: Callable[[Outcome], None]) -> tuple[list[Outcome], float, bool]:
    """Warm up, then run; Ctrl-C ends it with what there is.

    Returns:
        the outcomes, the duration in seconds, and whether it was stopped.
    """
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    started = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - started

    with contextlib.closing(run.wire):
        client = BenchClient(run.wire, run.target, now)
        warm_up = Load(client.ask, now, run.limit or 1, lambda _: None)
        await warm_up.run(run.warm_up, [0.0] * len(run.warm_up), stop)
        started = time.perf_counter()
        load = Load(client.ask, now, run.limit, progress)
        outcomes = await load.run(run.items, run.due_s, stop)
        return outcomes, now(), stop.is_set()


def allow_connections() -> None:
    """Raise this process's limit of open files as far as it may: each request is a connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[Outcome], None] | None]:
    """A bar on a terminal; yields what moves it, or None elsewhere."""
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    failed = 0
    # Each drawing holds up the requests for about 2 ms.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=REFRESH_HZ
    ) as progress:
        bar = progress.add_task("requests", total=total)

        def advance(outcome: Outcome) -> None:
            nonlocal failed
            failed += outcome.error is not None
            text = f"requests ({failed} failed)" if failed else "requests"
            progress.update(bar, advance=1, description=text)

        yield advance
