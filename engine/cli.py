"""`kvist`: one parser, one function per subcommand, heavy imports only where they are needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from kvist.engine.bench.flags import (
    add_bench_latency_flags,
    add_bench_serve_flags,
    add_bench_throughput_flags,
)
from kvist.engine.cache_commands import CACHE, TOP
from kvist.engine.commands import Command, Group
from kvist.engine.config import (
    DTYPES,
    QUANTIZATIONS,
    add_serve_flags,
    config_from_flags,
)
from kvist.engine.host import usable_cores
from kvist.engine.kv_dtype import add_kv_dtype_flags
from kvist.engine.usage import Parser
from kvist.engine.vllm_flags import SERVE, add_foreign_flags
from kvist.proto.errors import ConfigInvalid, KvistError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
# As the shell says it of a program that SIGPIPE has ended.
EXIT_PIPE = 141


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    add_serve_flags(parser)
    add_foreign_flags(parser, SERVE)


def _serve(flags: argparse.Namespace) -> int:
    config = config_from_flags(flags)
    from kvist.engine.process import CoreProcess
    from kvist.engine.serve import serve

    return serve(config, CoreProcess())


def _add_chat_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a server (%(default)s)")
    parser.add_argument("--api-key", help="the server's key")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="per answer")
    # The API's own default of 1 makes small models ramble.
    parser.add_argument(
        "--temperature", type=float, default=0.2, metavar="T", help="0 is greedy (%(default)s)"
    )


def _chat(flags: argparse.Namespace) -> int:
    from kvist.engine.chat import chat

    settings = {"max_tokens": flags.max_tokens, "temperature": flags.temperature}
    return chat(flags.url, flags.api_key, flags.system, settings)


def _add_demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="demo", help="as for serve (%(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end")
    parser.add_argument("--svg", metavar="FILE", help="draw the output as a picture too")


def _demo(flags: argparse.Namespace) -> int:
    from kvist.engine.demo import run_demo

    return run_demo(flags.model, flags.keep, flags.svg)


def _add_eval_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as for serve")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="compare this one; default: all modes that work here"
    )
    parser.add_argument(
        "--device", default="auto", metavar="WHERE", help="as for serve (%(default)s)"
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="the same")
    add_kv_dtype_flags(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8; default: 7 KB that come with kvist")
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="N", help="of it, at most (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), metavar="N", help="(%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def _eval(flags: argparse.Namespace) -> int:
    from kvist.engine.evaluate import run_eval

    return run_eval(flags)


def _bench_serve(flags: argparse.Namespace) -> int:
    from kvist.engine.bench.serve import run_bench_serve

    return run_bench_serve(flags)


def _bench_throughput(flags: argparse.Namespace) -> int:
    from kvist.engine.bench.offline import run_bench_throughput

    return run_bench_throughput(flags)


def _bench_latency(flags: argparse.Namespace) -> int:
    from kvist.engine.bench.offline import run_bench_latency

    return run_bench_latency(flags)


BENCH = Group(
    "bench",
    "measure a server, or the engine alone",
    (
        Command(
            "serve",
            "load any OpenAI server with requests and say how it answers",
            add_bench_serve_flags,
            _bench_serve,
        ),
        Command(
            "throughput",
            "many requests at once, the engine in this process, no HTTP",
            add_bench_throughput_flags,
            _bench_throughput,
        ),
        Command(
            "latency",
            "one batch after the other, the engine in this process, no HTTP",
            add_bench_latency_flags,
            _bench_latency,
        ),
    ),
)
COMMANDS = (
    Command("serve", "serve a model over OpenAI's HTTP interface", _add_serve_flags, _serve),
    Command("chat", "chat in the terminal with a running server", _add_chat_flags, _chat),
    Command("demo", "one sidecar, two engines, and what the cache saves", _add_demo_flags, _demo),
    Command("eval", "how far each dtype and quantization is from float32", _add_eval_flags, _eval),
    BENCH,
    CACHE,
    TOP,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = Parser(
        prog="kvist",
        description="An inference engine that keeps its KV cache in tiers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvist {version('kvist')}")
    _add_commands(parser, "command", COMMANDS)
    return parser


def _add_commands(
    parser: argparse.ArgumentParser, dest: str, commands: Sequence[Command | Group]
) -> None:
    subcommands = parser.add_subparsers(dest=dest, metavar="COMMAND", required=True)
    for command in commands:
        sub = subcommands.add_parser(
            command.name, help=command.text, description=command.text, allow_abbrev=False
        )
        if isinstance(command, Group):
            _add_commands(sub, "subcommand", command.commands)
        else:
            command.add_flags(sub)
            sub.set_defaults(run=command.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        its exit code; 1 when what it asked for is not there, 2 for a bad setting, 130 after
        Ctrl-C, 141 when whoever read its output has gone.
    """
    flags = build_parser().parse_args(arguments)
    name = f"kvist {flags.command} {getattr(flags, 'subcommand', '')}".rstrip()
    try:
        code: int = flags.run(flags)
        sys.stdout.flush()  # here, where a reader that has gone is no error yet
    except ConfigInvalid as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KvistError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == "kvist":
            raise
        print(
            f"{name}: error: {error.name} is not installed; this command needs the engine. In a "
            "checkout of Kvist: install torch first (README.md says why), then run "
            "pip install '.[engine]'",
            file=sys.stderr,
        )
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # What is left in the buffer goes nowhere; without this Python complains at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    return code


if __name__ == "__main__":
    sys.exit(main())
