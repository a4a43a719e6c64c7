"""`kvist bench throughput` and `latency`: the engine in this process, and nothing around it."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from kvist.engine.bench.datasets import items_of
from kvist.engine.bench.direct import DirectEngine, Generated
from kvist.engine.bench.workload import Vocabulary, warm_up_items
from kvist.engine.config import EngineConfig, config_from_flags
from kvist.proto.errors import ConfigInvalid

PERCENTILES = (10, 25, 50, 75, 90, 99)

Advance = Callable[[], None]


def run_bench_throughput(flags: argparse.Namespace) -> int:
    """Hand everything in at once and see how long it takes.

    Raises:
        ConfigInvalid: a flag or a file is wrong, or the model does not fit.
    """
    config = offline_config(flags)
    if flags.num_prompts < 1 or flags.num_warmups < 0:
        raise ConfigInvalid("--num-prompts: give 1 or more, and no --num-warmups below 0")
    console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
    with opened(config, console, flags.disable_tqdm) as engine:
        encode = _encoder(config.model)
        vocabulary = plain_ids(config.model)
        items = items_of(flags, vocabulary, lambda text: len(encode(text)))
        prompts = [encode(i.prompt) if isinstance(i.prompt, str) else i.prompt for i in items]
        for item in warm_up_items(vocabulary, items[0], flags.num_warmups, flags.seed):
            assert isinstance(item.prompt, list)
            engine.generate([item.prompt], [item.output_tokens])
        with bar(console, "requests", len(items), flags.disable_tqdm) as advance:
            answers = engine.generate(prompts, [item.output_tokens for item in items], advance)
    seconds = max(answer.total_s for answer in answers)
    prompt_tokens = sum(map(len, prompts))
    output_tokens = sum(len(answer.tokens) for answer in answers)
    figures = {
        "elapsed_time": seconds,
        "num_requests": len(items),
        "total_prompt_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "total_num_tokens": prompt_tokens + output_tokens,
        "cached_tokens": sum(answer.cached for answer in answers),
        "requests_per_second": len(items) / seconds,
        "tokens_per_second": (prompt_tokens + output_tokens) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        **_about(config),
    }
    text = (
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, "
        f"{figures['tokens_per_second']:.2f} total tokens/s, "
        f"{figures['output_tokens_per_second']:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {prompt_tokens}\nTotal num output tokens:  {output_tokens}"
    )
    tell(flags, figures, text)
    return 0


def run_bench_latency(flags: argparse.Namespace) -> int:
    """Run one batch after the other and see how long each takes.

    Raises:
        ConfigInvalid: a flag is wrong, or the model does not fit.
    """
    config = offline_config(flags)
    for name in ("input_len", "output_len", "batch_size", "num_iters"):
        if getattr(flags, name) < 1:
            raise ConfigInvalid(f"--{name.replace('_', '-')}: give 1 or more")
    if flags.num_iters_warmup < 0:
        raise ConfigInvalid("--num-iters-warmup: give 0 or more")
    console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
    vocabulary, chance = plain_ids(config.model), random.Random(config.seed)
    batches: list[list[Generated]] = []
    with opened(config, console, flags.disable_tqdm) as engine:
        rounds = flags.num_iters_warmup + flags.num_iters
        with bar(console, "batches", rounds, flags.disable_tqdm) as advance:
            for _ in range(rounds):
                prompts = [
                    vocabulary.draw(chance, flags.input_len) for _ in range(flags.batch_size)
                ]
                batches.append(engine.generate(prompts, [flags.output_len] * flags.batch_size))
                advance()
    batches = batches[flags.num_iters_warmup :]
    seconds = np.array([max(answer.total_s for answer in batch) for batch in batches])
    first = np.array([max(answer.first_s for answer in batch) for batch in batches])
    figures: dict[str, Any] = {
        "avg_latency": float(seconds.mean()),
        "latencies": seconds.tolist(),
        "percentiles": {str(p): float(np.percentile(seconds, p)) for p in PERCENTILES},
        "avg_first_token": float(first.mean()),
        "input_len": flags.input_len,
        "output_len": flags.output_len,
        "batch_size": flags.batch_size,
        **_about(config),
    }
    lines = [f"Avg latency: {figures['avg_latency']} seconds"]
    lines += [f"{p}% percentile latency: {s} seconds" for p, s in figures["percentiles"].items()]
    lines.append(f"Avg time to the batch's last first token: {figures['avg_first_token']} seconds")
    if flags.output_len > 1:
        rate = flags.batch_size * (flags.output_len - 1) / float(np.median(seconds - first))
        figures["decode_tokens_per_second"] = rate
        lines.append(f"Median decode rate after it: {rate:.2f} tokens/s")
    tell(flags, figures, "\n".join(lines))
    return 0


def _about(config: EngineConfig) -> dict[str, Any]:
    return {
        "model": config.model_names[0],
        "dtype": config.dtype,
        "threads": config.threads,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.enable_prefix_caching,
        "cache": config.cache,
    }


def offline_config(flags: argparse.Namespace) -> EngineConfig:
    """Settings of the engine.

    Raises:
        ConfigInvalid: there is no model, or a value is out of range.
    """
    return config_from_flags(flags)


def plain_ids(model: str) -> Vocabulary:
    """Every id of a model's vocabulary that is no end of a text.

    Raises:
        ConfigInvalid: the model has no tokenizer that can be read.
    """
    from kvist.engine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    special = {tokenizer.bos_token_id, *tokenizer.eos_token_ids}
    return Vocabulary([each for each in range(tokenizer.vocab_size) if each not in special])


def _encoder(model: str) -> Callable[[str], list[int]]:
    from kvist.engine.tokenizer import load_tokenizer

    return load_tokenizer(model).encode


@contextlib.contextmanager
def opened(config: EngineConfig, console: Console, quiet: bool) -> Iterator[DirectEngine]:
    """An engine, loaded before a bar."""
    with contextlib.ExitStack() as stack:
        showing = contextlib.ExitStack()
        load = showing.enter_context(_loading(console, quiet))
        with showing:
            engine = stack.enter_context(DirectEngine(config, load))
        yield engine


@contextlib.contextmanager
def _loading(console: Console, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    if quiet or not console.is_terminal:
        yield lambda _done, _total: None
        return
    with Progress(
        TextColumn("loading"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def bar(console: Console, what: str, total: int, quiet: bool) -> Iterator[Advance]:
    """A bar on a terminal, nothing elsewhere; yields what moves it by one."""
    if quiet or not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def tell(flags: argparse.Namespace, figures: Mapping[str, Any], text: str) -> None:
    """Print the lines or the JSON, and write the file.

    Raises:
        ConfigInvalid: the file cannot be written.
    """
    print(json.dumps(figures) if flags.json else text)
    if flags.output_json is not None:
        try:
            Path(flags.output_json).write_text(json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise ConfigInvalid(f"--output-json: {error}") from None
