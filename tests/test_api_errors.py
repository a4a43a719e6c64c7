"""What goes wrong: bad requests named, dead cores noticed, shutdowns clean."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, AuthenticationError, BadRequestError, NotFoundError, OpenAI
from prometheus_client import CollectorRegistry
from sim.models import tiny_llama
from sim.server import SimServer, metric

from kvist.engine.api import create_app
from kvist.engine.ipc import CoreLink
from kvist.engine.openai import BODY_BYTES_MAX
from kvist.engine.request import Ready
from kvist.engine.service import Clock, Service
from kvist.engine.stats import EngineMetrics
from kvist.engine.tokenizer import load_tokenizer

FLAGS = ("--block-size", "16", "--served-model-name", "tiny", "--cache", "off")
CONTEXT = 512
ENDLESS = {"prompt": "a b c d", "max_tokens": 500, "ignore_eos": True, "stream": True}
WAIT_SECONDS = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(folder, 1)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    server = SimServer(model, log, (*FLAGS, "--max-model-len", str(CONTEXT)))
    server.start()
    server.wait_ready()
    yield server.url
    assert server.stop() == 0
    assert "Traceback" not in server.tail(500)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., SimServer]]:
    """Start servers of a test's own; they are gone when it ends."""
    servers: list[SimServer] = []

    def begin(*flags: str) -> SimServer:
        server = SimServer(model, tmp_path / f"log{len(servers)}", (*FLAGS, *flags))
        servers.append(server)
        server.start()
        return server

    yield begin
    for server in servers:
        server.stop()


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def events(url: str, body: dict[str, Any], got: list[dict[str, Any]]) -> None:
    """Read a stream to its end, whatever it is."""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                got.append(event)


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"prompt": "a", "temperature": 3}, "temperature"),
    ("completions", {"prompt": "a", "top_p": 0}, "top_p"),
    ("completions", {"prompt": "a", "top_k": -2}, "top_k"),
    ("completions", {"prompt": "a", "min_p": 1.5}, "min_p"),
    ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("completions", {"prompt": "a", "max_tokens": "many"}, "max_tokens"),
    ("completions", {"prompt": "a", "n": 0}, "n"),
    ("completions", {"prompt": "a", "seed": 2**70}, "seed"),
    ("completions", {"prompt": "a", "stop": [""]}, "stop"),
    ("completions", {"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ("completions", {"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
    ("completions", {"prompt": "a", "logprobs": 99}, "logprobs"),
    ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
    ("completions", {"prompt": "a", "best_of": 2}, "best_of"),
    ("completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
    ("completions", {"prompt": "a", "priority": "urgent"}, "priority"),
    ("completions", {"prompt": "a", "priority": 0.5}, "priority"),
    ("completions", {"prompt": "a", "priority": True}, "priority"),
    ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ("completions", {"prompt": "a", "kv_cache": "maybe"}, "kv_cache"),
    ("completions", {"prompt": "a", "cache_hints": {"priority": 4}}, "cache_hints"),
    ("completions", {"prompt": "a", "cache_hints": {"tool_pause_s": -1}}, "cache_hints"),
    ("completions", {"prompt": "a", "cache_hints": {"session_ends": True}}, "cache_hints"),
    ("completions", {"prompt": ["a"] * 70, "n": 2}, "n"),
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [1, "a"]}, "prompt"),
    ("completions", {"prompt": [[1], []]}, "prompt"),
    ("completions", {"prompt": [2**31]}, "prompt"),
    ("completions", {}, "prompt"),
    ("chat/completions", {}, "messages"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages",
    ),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs"),
    ("chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    ("chat/completions", {**CHAT, "logit_bias": {"1": 5}}, "logit_bias"),
    ("chat/completions", {**CHAT, "presence_penalty": 0.5}, "presence_penalty"),
    ("chat/completions", {**CHAT, "frequency_penalty": -1}, "frequency_penalty"),
    ("chat/completions", {**CHAT, "audio": {"voice": "a"}}, "audio"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_parameter_is_refused_by_name(
    url: str, path: str, body: dict[str, Any], param: str
) -> None:
    answer = httpx.post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]


def test_parameters_that_ask_for_nothing_are_let_through(url: str) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "logit_bias": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "return_cached_tokens_details": True,
        "parallel_tool_calls": True,
        "top_k": -1,
        "stop": None,
        "max_tokens": 2,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **harmless})
    assert answer.status_code == 200, answer.text


def test_a_prompt_longer_than_the_context_is_told_both_lengths(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=[5] * (CONTEXT + 100))
        assert caught.value.code == "context_length_exceeded"
        assert str(CONTEXT) in caught.value.message
        assert str(CONTEXT + 100) in caught.value.message
        with pytest.raises(BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=[5] * 100, max_tokens=CONTEXT)
        assert caught.value.param == "max_tokens"


def test_an_unknown_model_is_not_found(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(NotFoundError) as caught:
            client.completions.create(model="other", prompt="a")
        assert caught.value.code == "model_not_found"
        with pytest.raises(NotFoundError):
            client.models.retrieve("other")


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[1]", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400),
        ("POST", "/v1/completions", b" " * (BODY_BYTES_MAX + 1), 413),
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/v1/embeddings", b"", 404),
    ],
    ids=["broken", "list", "deep", "surrogate", "large", "method", "route"],
)
def test_what_is_no_request_gets_an_error_in_the_same_shape(
    url: str, method: str, path: str, content: bytes, status: int
) -> None:
    answer = httpx.request(method, f"{url}{path}", content=content, timeout=30)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_error_of_the_core_reaches_the_client(url: str) -> None:
    body = {"prompt": "a b c", "cache_salt": "fail"}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the simulated core refuses"
    got: list[dict[str, Any]] = []
    events(url, {**body, "stream": True}, got)
    assert got[-1]["error"]["code"] == "engine_error"


def test_a_key_is_asked_for_where_one_is_set(start: Callable[..., SimServer]) -> None:
    server = start("--api-key", "secret")
    server.wait_ready()
    for key, good in (("wrong", False), ("secret", True)):
        with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            if good:
                assert client.models.list().data
            else:
                with pytest.raises(AuthenticationError):
                    client.models.list()
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}).status_code == 401


def test_a_dead_core_ends_its_requests_with_an_error_and_the_server_with_a_reason(
    start: Callable[..., SimServer],
) -> None:
    server = start()
    server.wait_ready()
    got: list[dict[str, Any]] = []
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="tiny", prompt="a b c d", max_tokens=3000, stream=True
        )
        next(iter(stream))
        body = {**ENDLESS, "max_tokens": 3000}
        reader = threading.Thread(target=events, args=(server.url, body, got))
        reader.start()
        wait_until(lambda: metric(server.url, "vllm:num_requests_running") == 2)
        os.kill(server.core_pid, signal.SIGKILL)
        with pytest.raises(APIError, match="SIGKILL"):
            list(stream)
        reader.join(WAIT_SECONDS)
    assert got[-1]["error"]["code"] == "engine_error"
    wait_until(lambda: not server.running)
    assert server.stop() == 1
    assert "ended by signal SIGKILL" in server.tail()
    assert "Traceback" not in server.tail(500)


def test_health_tells_why_no_requests_are_taken(model: Path, tmp_path: Path) -> None:
    async def scene() -> None:
        link = CoreLink(f"ipc://{tmp_path}/core", lambda _outputs: None)
        ready = Ready(64, 16, 4, 1024, "float32", "bfloat16", "ab")
        metrics = EngineMetrics(CollectorRegistry(), "tiny", time.monotonic)
        clock = Clock(time.time, lambda: "name")
        service = Service(link, ready, load_tokenizer(str(model)), ["tiny"], metrics, clock)
        transport = httpx.ASGITransport(create_app(service, "0", None))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/health")).status_code == 200
            link.fail("the engine core burned")
            answer = await client.get("/health")
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the engine core burned"
            assert (await client.post("/v1/completions", json=ENDLESS)).status_code == 503
        link.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("trouble", "reason"), [("fatal", "model is too large"), ("exit", "exit code 3")]
)
def test_a_core_that_cannot_start_ends_the_server_with_its_reason(
    start: Callable[..., SimServer], monkeypatch: pytest.MonkeyPatch, trouble: str, reason: str
) -> None:
    monkeypatch.setenv("KVIST_SIM", trouble)
    server = start()
    wait_until(lambda: not server.running)
    assert server.stop() == 1
    assert reason in server.tail()
    assert "Traceback" not in server.tail(500)


def test_sigterm_lets_running_requests_end_and_takes_no_more(
    start: Callable[..., SimServer],
) -> None:
    server = start()
    server.wait_ready()
    got: list[dict[str, Any]] = []
    # Long enough that the server still drains when it is asked for more.
    body = {**ENDLESS, "max_tokens": 1500}
    reader = threading.Thread(target=events, args=(server.url, body, got))
    reader.start()
    wait_until(lambda: len(got) > 1)
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    assert httpx.post(f"{server.url}/v1/completions", json=ENDLESS).status_code == 503
    reader.join(WAIT_SECONDS)
    assert got[-1]["choices"][0]["finish_reason"] == "length"
    assert server.stop() == 0
    assert "Traceback" not in server.tail(500)


def test_requests_that_outlast_the_drain_get_an_error(start: Callable[..., SimServer]) -> None:
    server = start("--drain-seconds", "0")
    server.wait_ready()
    got: list[dict[str, Any]] = []
    body = {**ENDLESS, "max_tokens": 3000}
    reader = threading.Thread(target=events, args=(server.url, body, got))
    reader.start()
    wait_until(lambda: len(got) > 1)
    assert server.stop() == 0
    reader.join(WAIT_SECONDS)
    assert "shutting down" in got[-1]["error"]["message"]


def test_the_core_dies_with_its_server(start: Callable[..., SimServer]) -> None:
    server = start()
    server.wait_ready()
    core = server.core_pid
    assert alive(core)
    server.kill()
    wait_until(lambda: not alive(core))
