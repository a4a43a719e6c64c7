"""Flags of `kvist bench`, under vLLM's names where vLLM has one; needs nothing heavy."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable

from kvist.engine.bench.timed_trace import MOONCAKE_CHUNK_TOKENS
from kvist.engine.bench.workload import RandomPrompts, RepeatedPrefixes
from kvist.engine.config import add_serve_flags
from kvist.engine.vllm_flags import BENCH_SERVE, LATENCY, THROUGHPUT, add_foreign_flags

OFFLINE_DATASETS = ("random", "sharegpt", "burstgpt", "prefix_repetition", "custom")
SERVE_DATASETS = (*OFFLINE_DATASETS, "timed_trace")
# Flags of `kvist serve` that mean nothing without a server.
HTTP_FLAGS = ("host", "port", "served_model_name", "api_key", "drain_seconds")


def add_bench_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvist bench serve`."""
    to = parser.add_argument_group("server")
    to.add_argument(
        "--backend",
        choices=("openai", "vllm", "openai-chat"),
        default="openai",
        help="completions (both of the first) or chat (%(default)s)",
    )
    to.add_argument("--base-url", metavar="URL", help="of the server, instead of host and port")
    to.add_argument("--host", default="127.0.0.1", help="of the server (%(default)s)")
    to.add_argument("--port", type=int, default=8000, help="of the server (%(default)s)")
    to.add_argument("--endpoint", metavar="PATH", help="default: the backend's")
    to.add_argument("--model", help="name in requests; default: the first that the server lists")
    to.add_argument("--served-model-name", metavar="NAME", help="in requests, instead of --model")
    to.add_argument(
        "--tokenizer", metavar="MODEL", help="folder or .gguf file; default: the server's /tokenize"
    )
    to.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        help="the server's key ($OPENAI_API_KEY, as with vLLM's benchmark)",
    )
    to.add_argument("--header", metavar="NAME=VALUE", nargs="*", help="of every request")
    to.add_argument(
        "--extra-body", metavar="JSON", help='fields of every request, like {"kv_cache": ...}'
    )
    to.add_argument(
        "--ready-check-timeout-sec",
        type=int,
        default=0,
        metavar="S",
        help="wait this long for the server (%(default)s)",
    )
    _add_load_flags(parser.add_argument_group("load"))
    _add_sampling_flags(parser.add_argument_group("sampling"))
    add_dataset_flags(parser, SERVE_DATASETS, "random")
    _add_trace_flags(parser.add_argument_group("timed_trace"))
    _add_report_flags(parser.add_argument_group("report"))
    add_foreign_flags(parser, BENCH_SERVE)


def _add_load_flags(load: argparse._ArgumentGroup) -> None:
    load.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="RPS",
        help="inf sends everything at once (%(default)s)",
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="1 is Poisson, less is burstier, inf is a clock (%(default)s)",
    )
    load.add_argument("--max-concurrency", type=int, metavar="N", help="requests under way at most")
    load.add_argument("--ramp-up-strategy", choices=("linear", "exponential"))
    load.add_argument("--ramp-up-start-rps", type=float, metavar="RPS")
    load.add_argument("--ramp-up-end-rps", type=float, metavar="RPS")
    load.add_argument(
        "--num-warmups", type=int, default=0, metavar="N", help="requests before (%(default)s)"
    )


def _add_sampling_flags(sampling: argparse._ArgumentGroup) -> None:
    sampling.add_argument("--ignore-eos", action="store_true", help="answers as long as asked for")
    sampling.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)"
    )
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--top-k", type=int, metavar="K")
    sampling.add_argument("--min-p", type=float, metavar="P")
    sampling.add_argument(
        "--logprobs", type=int, metavar="N", help="of so many tokens at each place"
    )


def _add_report_flags(report: argparse._ArgumentGroup) -> None:
    report.add_argument(
        "--goodput", nargs="+", metavar="NAME:MS", help="like ttft:500 tpot:50 e2el:10000"
    )
    report.add_argument(
        "--percentile-metrics",
        default="ttft,tpot,itl",
        metavar="NAMES",
        help="of ttft, tpot, itl, e2el (%(default)s)",
    )
    report.add_argument(
        "--metric-percentiles", default="99", metavar="PERCENTS", help="with commas (%(default)s)"
    )
    report.add_argument("--save-result", action="store_true", help="write a JSON file")
    report.add_argument(
        "--save-detailed", action="store_true", help="with the times of every request"
    )
    report.add_argument(
        "--append-result", action="store_true", help="add a line to the file instead"
    )
    report.add_argument("--metadata", metavar="KEY=VALUE", nargs="*", help="into the JSON")
    report.add_argument("--result-dir", metavar="FOLDER")
    report.add_argument("--result-filename", metavar="FILE")
    report.add_argument("--label", help="of the run, into the JSON")
    report.add_argument(
        "--plot-timeline", action="store_true", help="draw every request in an HTML file beside it"
    )
    report.add_argument(
        "--timeline-itl-thresholds",
        default="25,50",
        metavar="MS,MS",
        help="between three colours of inter-token latency (%(default)s)",
    )
    report.add_argument("--json", action="store_true", help="print one JSON object, no table")
    report.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def add_dataset_flags(
    parser: argparse.ArgumentParser, datasets: tuple[str, ...], default: str
) -> None:
    """Flags of what is asked."""
    data = parser.add_argument_group("dataset")
    data.add_argument(
        "--dataset-name", choices=datasets, default=default, help="what to ask (%(default)s)"
    )
    data.add_argument("--dataset-path", metavar="FILE", help="where the dataset is a file")
    data.add_argument(
        "--num-prompts", type=int, default=1000, metavar="N", help="requests (%(default)s)"
    )
    if "seed" not in {action.dest for action in parser._actions}:
        data.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (0)")
    data.add_argument("--input-len", type=int, metavar="N", help="of any dataset that has it")
    data.add_argument("--output-len", type=int, metavar="N", help="of any dataset")
    prompts, prefixes = RandomPrompts(), RepeatedPrefixes()
    for flag, value in (
        ("--random-input-len", prompts.input_tokens),
        ("--random-output-len", prompts.output_tokens),
        ("--random-prefix-len", prompts.prefix_tokens),
        ("--random-range-ratio", prompts.range_ratio),
        ("--prefix-repetition-prefix-len", prefixes.prefix_tokens),
        ("--prefix-repetition-suffix-len", prefixes.suffix_tokens),
        ("--prefix-repetition-num-prefixes", prefixes.prefixes),
        ("--prefix-repetition-output-len", prefixes.output_tokens),
        ("--custom-output-len", 256),
    ):
        kind: Callable[[str], float] = type(value)
        data.add_argument(flag, type=kind, default=value, metavar="N", help="(%(default)s)")
    data.add_argument("--sharegpt-output-len", type=int, metavar="N", help="default: as recorded")


def _add_trace_flags(trace: argparse._ArgumentGroup) -> None:
    trace.add_argument(
        "--timed-trace-chunk-hash-size",
        type=int,
        default=MOONCAKE_CHUNK_TOKENS,
        metavar="N",
        help="tokens that a hash id stands for (%(default)s)",
    )
    trace.add_argument(
        "--timed-trace-sec-multiplier",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds per unit of timestamp; smaller is faster (%(default)s)",
    )
    for flag, what in (("input", "prompts"), ("output", "answers")):
        trace.add_argument(
            f"--timed-trace-{flag}-scale",
            type=float,
            default=1.0,
            metavar="F",
            help=f"factor of the length of {what} (%(default)s)",
        )
    trace.add_argument(
        "--timed-trace-max-len",
        type=int,
        default=0,
        metavar="N",
        help="leave out requests with more tokens, as scaled; 0 is none (%(default)s)",
    )
    trace.add_argument(
        "--self-timed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="send when the trace says; --no-self-timed takes --request-rate",
    )


def add_bench_throughput_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvist bench throughput`."""
    _add_engine_flags(parser)
    add_dataset_flags(parser, OFFLINE_DATASETS, "random")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--num-warmups", type=int, default=0, metavar="N", help="requests before (%(default)s)"
    )
    _add_output_flags(run)
    add_foreign_flags(parser, THROUGHPUT)


def add_bench_latency_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvist bench latency`."""
    _add_engine_flags(parser)
    run = parser.add_argument_group("run")
    for flag, value, what in (
        ("--input-len", 32, "tokens of each prompt"),
        ("--output-len", 128, "tokens of each answer"),
        ("--batch-size", 8, "prompts at a time"),
        ("--num-iters-warmup", 10, "batches before"),
        ("--num-iters", 30, "batches that count"),
    ):
        run.add_argument(flag, type=int, default=value, metavar="N", help=f"{what} (%(default)s)")
    _add_output_flags(run)
    add_foreign_flags(parser, LATENCY)


def _add_output_flags(run: argparse._ArgumentGroup) -> None:
    run.add_argument("--output-json", metavar="FILE", help="write the result there, too")
    run.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    run.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `kvist serve` without those of HTTP."""
    add_serve_flags(parser)
    for action in parser._actions:
        if action.dest in HTTP_FLAGS:
            action.help = argparse.SUPPRESS
    # As vLLM does: repeated batches of the same prompts would measure the cache.
    parser.set_defaults(enable_prefix_caching=False, cache="off")
