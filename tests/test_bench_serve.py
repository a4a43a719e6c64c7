"""`kvist bench` against real servers, servers that misbehave, and none; and the engine alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sim.models import tiny_llama
from sim.server import metric

from kvist.engine.cli import main
from kvist.engine.local import LocalEngine

FLAGS = ("--block-size", "16", "--served-model-name", "tiny", "--cache", "off")
SMALL = ("--threads", "1", "--kv-cache-memory-bytes", "16MiB")
WAIT_SECONDS = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", 1)


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = LocalEngine(str(model), tmp_path_factory.mktemp("log") / "log", (*FLAGS, *SMALL))
    server.start()
    try:
        server.wait_ready()
        yield server.url
        assert server.stop() == 0, server.tail()
        assert "Traceback" not in server.tail(500)
    finally:
        server.stop()


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run `kvist bench` for its JSON."""
    code = main(["bench", *arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    figures: dict[str, Any] = json.loads(captured.out)
    return figures


def test_tokens_are_counted_to_the_last_one(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    got = bench(
        capsys,
        *("serve", "--base-url", url, "--num-prompts", "12", "--random-input-len", "40"),
        *("--backend", "vllm"),
        *("--random-output-len", "7", "--ignore-eos", "--max-concurrency", "3"),
        *("--num-warmups", "2", "--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--metric-percentiles", "50,90", "--goodput", "ttft:600000"),
    )
    assert got["model_id"] == "tiny"
    assert (got["completed"], got["failed"], got["interrupted"]) == (12, 0, 0)
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (12 * 40, 12 * 7)
    assert got["token_counts"] == "usage"
    assert (got["cached_tokens"], got["computed_tokens"]) == (0, 12 * 40)
    assert 1 <= got["max_concurrent_requests"] <= 3
    assert got["request_goodput"] == got["request_throughput"]
    assert got["latency_from"] == "sent"
    assert 0 < got["p50_ttft_ms"] <= got["p90_ttft_ms"]
    assert got["mean_e2el_ms"] == pytest.approx(
        got["mean_ttft_ms"] + 6 * got["mean_tpot_ms"], rel=1e-6
    )


def test_repeated_prefixes_are_found_in_their_tier(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got = bench(
        capsys,
        *("serve", "--base-url", url, "--dataset-name", "prefix_repetition", "--num-prompts", "8"),
        *("--prefix-repetition-prefix-len", "32", "--prefix-repetition-suffix-len", "8"),
        *("--prefix-repetition-num-prefixes", "2", "--output-len", "2", "--seed", "5"),
        *("--max-concurrency", "1", "--ignore-eos"),
    )
    assert got["cached_tokens_by_tier"] == {"hbm": 6 * 32, "dram": 0, "flash": 0}
    assert got["computed_tokens"] == 8 * 40 - 6 * 32


def test_a_trace_is_replayed_with_its_own_times_and_lengths(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1024, "output_length": 12, "hash_ids": [7, 8]},
        {"timestamp": 9, "input_length": 1400, "output_length": 8, "hash_ids": [7, 8, 9]},
        {"timestamp": 20, "input_length": 999, "output_length": 4, "hash_ids": [4, 5]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    got = bench(
        capsys,
        *("serve", "--base-url", url, "--dataset-name", "timed_trace", "--dataset-path", str(path)),
        *("--timed-trace-sec-multiplier", "0.01", "--timed-trace-input-scale", "0.0625"),
        *("--timed-trace-output-scale", "0.5", "--max-concurrency", "1"),
    )
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (64 + 88 + 62, 6 + 4 + 2)
    assert got["cached_tokens"] == 64
    assert got["duration"] >= 0.2
    assert (got["request_rate"], got["latency_from"]) == ("trace", "due")


def test_waiting_for_a_seat_counts_when_requests_had_a_time(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got = bench(
        capsys,
        *("serve", "--base-url", url, "--num-prompts", "10", "--input-len", "20"),
        *("--output-len", "6", "--ignore-eos", "--request-rate", "5000", "--max-concurrency", "1"),
    )
    assert got["max_concurrent_requests"] == 1
    assert got["max_send_delay_ms"] > got["mean_send_delay_ms"] > 0
    assert got["mean_ttft_ms"] > got["mean_send_delay_ms"]


def test_chats_are_answered_and_the_table_has_its_rows(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "folder" / "r.json"
    flags = ["bench", "serve", "--base-url", url, "--backend", "openai-chat", "--num-prompts", "3"]
    flags += ["--input-len", "9", "--output-len", "4", "--ignore-eos", "--append-result"]
    flags += ["--save-detailed", "--result-dir", str(path.parent), "--result-filename", path.name]
    flags += ["--metadata", "host=here", "--burstiness", "inf", "--request-rate", "200"]
    flags += ["--plot-timeline"]
    assert main(flags) == 0
    table = capsys.readouterr().out.splitlines()
    rows = {line.split(":")[0]: line.split(":")[1].split()[0] for line in table if ":" in line}
    assert rows["Successful requests"] == "3"
    assert rows["Total generated tokens"] == "12"
    assert float(rows["Mean TTFT (ms)"]) > 0
    assert {"P99 TPOT (ms)", "Median ITL (ms)", "Peak concurrent requests", "Computed"} <= set(rows)
    assert all(len(line) <= 60 for line in table)
    assert main(flags) == 0
    first, _second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["host"] == "here"
    assert [each["output_tokens"] for each in first["requests"]] == [4, 4, 4]
    assert [each["due"] for each in first["requests"]] == pytest.approx([0.005, 0.01, 0.015])
    assert all(each["sent"] >= each["due"] for each in first["requests"])
    assert first["start_times"] == [each["sent"] for each in first["requests"]]
    assert first["output_lens"] == [4, 4, 4]
    for ttft, gaps, latency in zip(first["ttfts"], first["itls"], first["latencies"], strict=True):
        assert 0 < ttft <= latency
        assert ttft + sum(gaps) == pytest.approx(latency, rel=0.2, abs=0.05)
    assert (path.parent / "r.timeline.html").read_text().count("<g>") == 3


def test_refused_requests_are_failures_with_the_servers_words(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"prompt": [5] * 3000}) + "\n")
    flags = ["bench", "serve", "--base-url", url, "--dataset-name", "custom", "--num-prompts", "2"]
    assert main([*flags, "--dataset-path", str(path), "--json"]) == 1
    got = json.loads(capsys.readouterr().out)
    assert (got["completed"], got["failed"]) == (0, 2)
    ((text, count),) = got["errors"].items()
    assert count == 2
    assert text.startswith("400: the prompt has 3000 tokens")


def test_ctrl_c_reports_what_has_ended(url: str) -> None:
    before = metric(url, "vllm:request_success_total")
    child = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "kvist.engine.cli", "bench", "serve", "--json"),
            *("--base-url", url, "--num-prompts", "500", "--request-rate", "20"),
            *("--input-len", "8", "--output-len", "2", "--ignore-eos"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + WAIT_SECONDS
    while metric(url, "vllm:request_success_total") < before + 3:
        assert time.monotonic() < deadline, "no request came"
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=WAIT_SECONDS)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert "stopped" in err
    got = json.loads(out)
    assert 2 <= got["completed"] < 500
    assert got["failed"] == 0


def test_without_a_server_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "no server answers" in said
    assert "--base-url" in said


class Scripted(BaseHTTPRequestHandler):
    """A server that lists a model and answers as the last part of its base URL says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._whole(b'{"data": [{"id": "other"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/tokenize"):
            self.send_error(404)
            return
        assert isinstance(body["prompt"], str)
        events = [{"choices": [{"text": " x", "finish_reason": None}]}] * 3
        last = {"choices": [{"text": " y", "finish_reason": "length"}]}
        fault = {"error": {"message": "out of pages"}}
        script = {"/short": events, "/error": [events[0], fault], "/plain": [*events, last]}
        data = b"".join(
            b"data: " + json.dumps(event).encode() + b"\r\n\r\n"
            for event in script[self.path.removesuffix("/v1/completions")]
        )
        self._whole(data + b"data: [DONE]\r\n\r\n")

    def _whole(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def other() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_tokenizer_from_files_stands_in_for_the_servers(
    url: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got = bench(
        capsys,
        *("serve", "--base-url", url, "--tokenizer", str(model), "--served-model-name", "tiny"),
        *("--model", "some/name", "--num-prompts", "2", "--input-len", "11", "--output-len", "2"),
    )
    assert (got["model_id"], got["total_input_tokens"]) == ("tiny", 22)


def test_a_server_that_counts_nothing_gets_words_and_its_chunks_counted(
    other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got = bench(
        capsys,
        *("serve", "--base-url", f"{other}/plain", "--num-prompts", "4", "--input-len", "5"),
    )
    assert (got["completed"], got["total_output_tokens"]) == (4, 16)
    assert got["total_input_tokens"] == 20
    assert got["token_counts"] != "usage"
    assert got["cached_tokens"] is None


@pytest.mark.parametrize(
    ("way", "text"),
    [("short", "the stream ended before the answer did"), ("error", "out of pages")],
)
def test_an_answer_that_breaks_off_is_a_failure(
    other: str, way: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--base-url", f"{other}/{way}", "--num-prompts", "2"]) == 1
    shown = capsys.readouterr().out
    assert f"2 x {text}" in shown
    assert "Failed requests:                         2" in shown


def offline(model: Path) -> tuple[str, ...]:
    return ("--model", str(model), "--block-size", "16", *SMALL)


def test_throughput_counts_every_token_of_the_engine_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    got = bench(
        capsys,
        *("throughput", *offline(model), "--input-len", "24", "--output-len", "5"),
        *("--num-prompts", "9", "--num-warmups", "1", "--output-json", str(path)),
    )
    assert (got["total_prompt_tokens"], got["total_output_tokens"]) == (9 * 24, 9 * 5)
    assert got["requests_per_second"] == pytest.approx(9 / got["elapsed_time"])
    assert got["cached_tokens"] == 0
    assert json.loads(path.read_text()) == got


def test_latency_runs_batch_after_batch(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = bench(
        capsys,
        *("latency", *offline(model), "--input-len", "8", "--output-len", "4", "--batch-size", "3"),
        *("--num-iters-warmup", "1", "--num-iters", "4"),
    )
    assert len(got["latencies"]) == 4
    assert got["avg_latency"] == pytest.approx(sum(got["latencies"]) / 4)
    assert 0 < got["avg_first_token"] < got["avg_latency"]
    assert got["percentiles"]["10"] <= got["percentiles"]["99"] <= max(got["latencies"])


def test_the_peers_benchmark_measures_our_engine_in_every_figure(model: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "peers" / "engine_cpu.py"
    done = subprocess.run(
        [
            *(sys.executable, "-P", str(script), "--model-dir", str(model), "--threads", "1"),
            *("--rounds", "1", "--repeats", "2", "--decode-tokens", "3"),
            *("--prefills", "64", "100", "--prefix", "128"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    figures = {"decode_b1_tok_s", "decode_b16_tok_s", "prefill_64_tok_s", "prefill_100_tok_s"}
    assert got["medians"]["kvist"].keys() == figures | {"ttft_new_ms", "ttft_cached_ms"}
    # Decode is what is left of an answer's time without its first token's: with so small a model
    # that may be less than the noise of either, so only the others must be more than nothing.
    timed = {name: value for name, value in got["medians"]["kvist"].items() if "decode" not in name}
    assert all(value > 0 for value in timed.values())
    assert got["greedy_equal_tokens"] == {"kvist": [12, 12, 12]}
    assert got["ratios"] == {}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("latency",), "--model"),
        (("latency", "x", "--batch-size", "0"), "--batch-size"),
        (("latency", "x", "--num-iters-warmup", "-1"), "--num-iters-warmup"),
        (("throughput", "/no/such/model"), "/no/such/model"),
        (("serve", "--dataset-name", "sharegpt", "--base-url", "ftp:/x"), "--base-url"),
        (("serve", "--ramp-up-strategy", "linear"), "--ramp-up-start-rps"),
        (("serve", "--max-concurrency", "0"), "--max-concurrency"),
        (("serve", "--num-prompts", "0"), "--num-prompts"),
        (("serve", "--goodput", "speed:1"), "--goodput"),
        (("serve", "--timeline-itl-thresholds", "9"), "--timeline-itl-thresholds"),
    ],
)
def test_a_bad_flag_is_named(
    flags: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 2
    assert named in capsys.readouterr().err
