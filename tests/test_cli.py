"""The command line: flags, their errors, and the chat through a pipe."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.models import tiny_llama
from sim.server import SimServer

from kvist.engine.cli import build_parser, main
from kvist.engine.config import EngineConfig, config_from_flags
from kvist.engine.process import core_environment
from kvist.proto.errors import ConfigInvalid


def config(*flags: str) -> EngineConfig:
    return config_from_flags(build_parser().parse_args(["serve", "model", *flags]))


def kvist(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "kvist.engine.cli", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60)


def test_flags_and_fields_have_the_same_defaults() -> None:
    assert config() == EngineConfig(model="model")


def test_sizes_and_addresses_are_read_as_people_write_them() -> None:
    got = config(
        "--kv-cache-memory-bytes=1GiB", "--cache-flash-bytes=0", "--cache=/run/kvist/kvistd.sock"
    )
    assert got.kv_cache_bytes == 2**30
    assert got.cache_flash_bytes == 0
    assert got.cache == "unix:/run/kvist/kvistd.sock"
    assert config("--cache=node1:7000").cache == "node1:7000"
    assert not config("--no-enable-prefix-caching").enable_prefix_caching


def test_a_model_is_called_by_its_folder_unless_told(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    path = str(tmp_path / "tiny")
    assert EngineConfig(model=path).model_names == ("tiny", path)
    assert EngineConfig(model="org/name").model_names == ("org/name",)
    assert EngineConfig(model=path, served_model_name="x").model_names == ("x",)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "70000"),
        ("--port", "web"),
        ("--block-size", "48"),
        ("--dtype", "int3"),
        ("--kv-cache-memory-bytes", "lots"),
        ("--kv-cache-memory-bytes", "5"),
        ("--max-num-seqs", "0"),
        ("--max-num-seqs", "600"),
        ("--max-model-len", "1"),
        ("--threads", "0"),
        ("--cache", "somewhere"),
        ("--cache", "host:99999"),
        ("--cache-load-bandwidth", "5"),
        ("--cache-store-bandwidth", "fast"),
        ("--log-level", "loud"),
        ("--host", "no.such.host.invalid"),
    ],
)
def test_a_bad_value_names_its_flag_and_exits_with_two(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["serve", "model", flag, value])
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "usage", "meant"),
    [
        ("serve m --max-model-length 5", "kvist serve", "--max-model-len"),
        ("bench throughput --num-promts=5", "kvist bench throughput", "--num-prompts"),
        ("cache ls --sockett /x", "kvist cache ls", "--socket"),
    ],
)
def test_an_unknown_flag_gets_its_subcommands_usage_and_the_flag_that_was_meant(
    words: str, usage: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(words.split())
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"usage: {usage} ")
    assert f"did you mean {meant}?" in told


@pytest.mark.parametrize(
    ("words", "noted"),
    [
        ("serve --model m --tensor-parallel-size 1 --trust-remote-code", 2),
        ("serve m -tp=1 --enable-chunked-prefill", 2),
        ("bench throughput --model m --backend vllm --tokenizer m --async-engine --n 1", 4),
        ("bench latency --model m --disable-detokenize", 1),
        ("bench serve --model m --tokenizer-mode auto --request-id-prefix x --logprobs 2", 2),
        ("bench serve --model m --disable-shuffle --skip-chat-template", 2),
    ],
)
def test_flags_of_vllm_without_meaning_here_are_noted_and_the_rest_is_done(
    words: str, noted: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_parser().parse_args(words.split()).model == "m"
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == noted
    assert all("has no effect" in note for note in notes)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("serve m --tensor-parallel-size 2", "on one device"),
        ("serve m --tokenizer other", "among the model's files"),
        ("serve m --no-enable-chunked-prefill", "in chunks"),
        ("bench throughput --model m --backend hf", "the engine in this process"),
        ("bench throughput --model m --n 4", "one answer"),
        ("bench serve --profile", "profiler"),
    ],
)
def test_flags_of_vllm_that_would_be_missed_are_refused_with_the_reason(
    words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(words.split())
    assert reason in capsys.readouterr().err


def test_a_server_without_a_model_says_which_there_can_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve"]) == 2
    assert "MODEL or --model: say which: folder of safetensors" in capsys.readouterr().err


def test_a_taken_port_is_told_before_anything_is_loaded(
    server: SimServer, capsys: pytest.CaptureFixture[str]
) -> None:
    port = server.url.rsplit(":", 1)[1]
    assert main(["serve", "no-such-model", "--port", port]) == 2
    assert f"--port: cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_an_empty_key_is_no_key() -> None:
    with pytest.raises(ConfigInvalid, match="--api-key"):
        EngineConfig(model="m", api_key="")


def test_the_core_gets_its_threads_before_torch_is_imported() -> None:
    environment = core_environment(EngineConfig(model="m", threads=3), {"PATH": "x"})
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["GOMP_SPINCOUNT"] == "10000"
    assert environment["PATH"] == "x"
    own = core_environment(EngineConfig(model="m"), {"GOMP_SPINCOUNT": "5"})
    assert own["GOMP_SPINCOUNT"] == "5"


def test_the_api_process_never_imports_torch() -> None:
    code = "import sys, kvist.engine.serve, kvist.engine.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60).returncode == 0


def test_the_tools_of_operators_need_none_of_the_engines_packages() -> None:
    code = """
import sys
for name in ("torch", "httpx", "starlette", "uvicorn", "tokenizers", "safetensors", "gguf",
             "jinja2", "numba"):
    sys.modules[name] = None
from kvist.engine.cli import main
for words in (["cache", "ls"], ["cache", "warm", "/nowhere"], ["cache", "show", "00"],
              ["top", "--once", "--url", "http://127.0.0.1:9"]):
    assert main([*words, "--socket", "/nowhere.sock"]) == 2, words
assert main(["cache", "doctor", "--socket", "/nowhere.sock", "--http-listen", ""]) in (0, 1)
import kvist.cachesvc.study.replay_table, kvist.cachesvc.tools.top.live
assert main(["chat"]) == 2
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "kvist chat: error: httpx is not installed" in done.stderr
    assert "pip install '.[engine]'" in done.stderr


def test_version_and_help_are_there() -> None:
    assert kvist("--version").stdout.startswith("kvist ")
    assert "serve" in kvist("--help").stdout
    assert kvist().returncode == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimServer]:
    folder = tmp_path_factory.mktemp("server")
    tiny_llama(folder / "model", 1)
    server = SimServer(folder / "model", folder / "log", ("--block-size", "16", "--cache", "off"))
    server.start()
    server.wait_ready()
    yield server
    assert server.stop() == 0


def test_a_server_says_what_it_computes_in_and_how_large_its_pool_is(server: SimServer) -> None:
    assert "Dtype    float32, K and V bfloat16; namespace 515151515151" in server.tail()
    assert "Pages    256 of 16 tokens and 16KiB, 4MiB in all; context " in server.tail()


def test_a_chat_through_a_pipe_answers_each_line_and_measures_it(server: SimServer) -> None:
    typed = "Tell me about blocks.\n/help\nAnd about pages, please.\n/reset\n/nonsense\nAgain.\n"
    done = kvist(
        "chat", "--url", server.url, "--max-tokens", "8", "--temperature", "0", typed=typed
    )
    assert done.returncode == 0, done.stderr
    measures = [line for line in done.stdout.splitlines() if line.startswith("prompt ")]
    assert len(measures) == 3
    assert all("TTFT" in line and "tok/s" in line for line in measures)
    assert "cached 0" in measures[0]
    assert "(hbm " in measures[1]
    assert "Ctrl-C" in done.stdout
    assert "no command /nonsense" in done.stdout


def test_a_chat_ends_at_quit(server: SimServer) -> None:
    done = kvist("chat", "--url", server.url, typed="/quit\nNot asked.\n")
    assert done.returncode == 0
    assert "prompt " not in done.stdout


def test_a_chat_without_a_server_says_what_to_do() -> None:
    done = kvist("chat", "--url", "http://127.0.0.1:9", typed="hello\n")
    assert done.returncode == 1
    assert "no server answers" in done.stderr
    assert "kvist serve" in done.stderr
